"""The rule in words, for people: dry runs and model cards."""

from dataclasses import dataclass, field, fields
from typing import Literal, get_args, get_origin


@dataclass
class RankedScore:
    """One of several scores that are combined, and the share that it keeps.

    score  as selection.score [; ours]
    ratio  share that this score keeps [share; the paper, NeurIPS version, section 3.4]
    """

    score: str
    ratio: float

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 1:
            raise ValueError("ratio is the share that this score keeps: give a number above 0 and at most 1")


@dataclass
class SelectionSettings:
    """Which tokens count.

    score            a file of selection/scores, or package.module:function of yours [; the paper, equation 3]
    ratio            share of the valid tokens that is kept; the paper keeps 0.6 to 0.7 [share; the paper's k %]
    scope            ranked together: all ranks, each rank alone, or each sequence alone [; ours]
    pool             ranked together: one micro-step of all ranks, or the whole optimizer step [; ours]
    backward         exact: gradients of the selected loss through every token; rows, replay: what was not selected is
                     a constant, and costs no backward, or no activations either [; the paper, equation 4]
    quantiles        of the excess loss that are logged [share; ours]
    combine          keep what any (union) or all (intersection) of the scores in of keep [; the paper, NeurIPS
                     version, section 3.4]
    of               scores to combine in place of score, such as [{score: reference_loss, ratio: 0.7}, ...] [; ours]
    unit             token; sequence: whole sequences by their mean score; both: sequences, then tokens in them [;
                     RHO-LOSS]
    sequence_ratio   under unit both, share of the sequences whose tokens compete [share; ours]
    weighting        hard: the highest; stochastic: drawn without replacement in proportion to exp(score/temperature);
                     soft: all, weighed by sigmoid((score - threshold)/temperature) [; ours]
    temperature      of the weightings stochastic and soft [of the score; ours]
    schedule         of the ratio: constant; linear or cosine, from 1 to ratio; or steps [; ours]
    schedule_tokens  after start, tokens that linear and cosine take [tokens; ours]
    ratio_steps      for steps, [[tokens, ratio], ...]: the ratio after training on so many tokens, 1 before [; ours]
    min_context      with a store of kind document: in a document that began before the sample, tokens with fewer tokens
                     before them in the sample are not selected; default: 64 with such a store [tokens; ours]
    candidates       score so many times the samples without gradients, and train on each rank's best [; RHO-LOSS]
    start            share of training.train_tokens before which all tokens count and the reference rests [share; ours]
    """

    score: str = "excess"
    ratio: float = 0.6
    scope: Literal["global", "rank", "sequence"] = "global"
    pool: Literal["micro_step", "step"] = "micro_step"
    backward: Literal["exact", "rows", "replay"] = "exact"
    quantiles: tuple[float, ...] = (0.1, 0.5, 0.9)
    combine: Literal["union", "intersection"] | None = None
    of: list[RankedScore] = field(default_factory=list)
    unit: Literal["token", "sequence", "both"] = "token"
    sequence_ratio: float | None = None
    weighting: Literal["hard", "stochastic", "soft"] = "hard"
    temperature: float = 1.0
    schedule: Literal["constant", "linear", "cosine", "steps"] = "constant"
    schedule_tokens: int | None = None
    ratio_steps: list[tuple[int, float]] = field(default_factory=list)
    min_context: int | None = None
    candidates: int = 1
    start: float = 0.0

    def __post_init__(self) -> None:
        self._check_choices()
        if not 0 < self.ratio <= 1:
            raise ValueError("ratio is the share of tokens to keep: give a number above 0 and at most 1")
        if any(not 0 < q < 1 for q in self.quantiles):
            raise ValueError("quantiles must lie between 0 and 1")
        if self.min_context is not None and self.min_context < 0:
            raise ValueError("min_context must be 0 or more")
        if not self.temperature > 0:
            raise ValueError("temperature must be above 0")
        if self.weighting == "soft" and self.backward != "exact":
            raise ValueError(f"weighting soft leaves nothing out that backward {self.backward} could save: use exact")
        self._check_combination()
        self._check_unit()
        self._check_schedule()
        self._check_candidates()

    def _check_choices(self) -> None:
        """What a configuration refuses anyway; in a loop of one's own a misspelt rule would be another rule."""
        for setting in fields(self):
            hints = [hint for hint in (setting.type, *get_args(setting.type)) if get_origin(hint) is Literal]
            choices, value = [choice for hint in hints for choice in get_args(hint)], getattr(self, setting.name)
            if choices and value not in (*choices, setting.default):
                raise ValueError(f"{setting.name} is '{value}': use one of {', '.join(choices)}")

    def _check_combination(self) -> None:
        if self.combine is None:
            if self.of:
                raise ValueError("of lists scores to combine: set combine to union or intersection, or use score")
            return
        if not self.of:
            raise ValueError("combine needs scores: list them in of, such as [{score: excess, ratio: 0.7}, ...]")
        if self.weighting == "soft":
            raise ValueError("combine has no one threshold to weigh by: use weighting hard or stochastic")
        if self.schedule != "constant":
            raise ValueError("combine keeps by the ratios in of, which have no schedule: use schedule constant")

    def _check_unit(self) -> None:
        if self.unit != "token" and self.scope == "sequence":
            raise ValueError(
                f"unit {self.unit} ranks sequences among each other, and scope sequence each alone: "
                "use scope global or rank, or unit token"
            )
        if (self.unit == "both") != (self.sequence_ratio is not None):
            raise ValueError("sequence_ratio belongs to unit both: give them together, or neither")
        if self.sequence_ratio is not None and not 0 < self.sequence_ratio <= 1:
            raise ValueError("sequence_ratio is a share of the sequences: give a number above 0 and at most 1")

    def _check_schedule(self) -> None:
        if not 0 <= self.start <= 1:
            raise ValueError("start is a share of train_tokens: give a number from 0 to 1")
        if (self.schedule in ("linear", "cosine")) != (self.schedule_tokens is not None):
            raise ValueError("schedule_tokens belongs to schedule linear or cosine: give them together, or neither")
        if self.schedule_tokens is not None and self.schedule_tokens < 1:
            raise ValueError("schedule_tokens must be 1 or more")
        if (self.schedule == "steps") != bool(self.ratio_steps):
            raise ValueError("ratio_steps belongs to schedule steps: give them together, or neither")
        tokens = [first for first, _ in self.ratio_steps]
        if any(first < 0 for first in tokens) or sorted(set(tokens)) != tokens:
            raise ValueError("ratio_steps must be pairs [tokens, ratio] whose tokens rise, from 0 or more")
        if any(not 0 < ratio <= 1 for _, ratio in self.ratio_steps):
            raise ValueError("ratio_steps must be pairs [tokens, ratio] with ratios above 0 and at most 1")

    def _check_candidates(self) -> None:
        if self.candidates < 1:
            raise ValueError("candidates must be 1 or more")
        if self.candidates > 1 and self.combine is not None:
            raise ValueError("candidates are ranked by one score, and combine has several: use score, or 1")
        if self.candidates > 1 and self.start > 0:
            raise ValueError(
                "candidates are scored from the first step on, and start begins later: use start 0, or candidates 1"
            )


def rule_in_words(settings: SelectionSettings) -> str:
    """What is kept, by which score, how it is weighed, what is ranked together, how the ratio moves, the backward."""
    ranked = f"scope {settings.scope}, pool {settings.pool}"
    chosen = f"each rank's best 1/{settings.candidates} of its candidates" if settings.candidates > 1 else ""
    backward = "" if settings.backward == "exact" else f"backward of the kept alone, by {settings.backward}"
    parts = (_kept(settings), _weighed(settings), ranked, chosen, *_scheduled(settings), backward)
    return "; ".join(filter(None, parts))


def _kept(settings: SelectionSettings) -> str:
    within = {
        "token": "",
        "sequence": "whole sequences by their mean: ",
        "both": f"within the {_share(settings.sequence_ratio or 1.0)} of sequences of highest mean: ",
    }[settings.unit]
    if settings.combine is None:
        return within + (settings.score if settings.ratio_steps else _highest(settings.score, settings.ratio))
    parts = " and ".join(f"({_highest(part.score, part.ratio)})" for part in settings.of)
    return f"{within}{settings.combine} of {parts}"


def _highest(score: str, ratio: float) -> str:
    return f"{score}, the highest {_share(ratio)}"


def _weighed(settings: SelectionSettings) -> str:
    return {
        "hard": "",
        "stochastic": f"drawn in proportion to exp(score/{settings.temperature:g})",
        "soft": f"every token weighed by sigmoid((score - threshold)/{settings.temperature:g})",
    }[settings.weighting]


def _scheduled(settings: SelectionSettings) -> list[str]:
    words = []
    if settings.schedule_tokens is not None:
        words.append(f"ratio {settings.schedule} from 100% over {settings.schedule_tokens:,} tokens")
    if settings.ratio_steps:
        steps = ", ".join(f"{_share(ratio)} from {tokens:,} tokens on" for tokens, ratio in settings.ratio_steps)
        words.append(f"ratio {steps}")
    if settings.start:
        words.append(f"all tokens for the first {_share(settings.start)} of the run")
    return words


def _share(ratio: float) -> str:
    return f"{100 * ratio:.4g}%"
