from dataclasses import field
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from megatron_slm.errors import UserError
from megatron_slm.settings import STRICT, NotNegative, Number, Positive, Share, Whole


@dataclass(config=STRICT)
class RankedScore:
    """One of several scores that are combined, and the share that it selects.

    score  as selection.score [; ours]
    ratio  share of the valid tokens that this score selects [share; the paper, NeurIPS version, section 3.4]
    """

    score: str
    ratio: Share


@dataclass(config=STRICT)
class SelectionSettings:
    """The rule that selects the tokens that count toward the loss.

    score            built-in score (docs/choosing.md), or your own as package.module:function [; the paper, equation 3]
    ratio            share of the valid tokens to select; the paper uses 0.6 to 0.7 [share; the paper's k %]
    scope            tokens compete across all ranks (global), within each rank, or within each sequence [; ours]
    pool             tokens compete within one micro-step, or within the whole optimizer step [; ours]
    backward         exact: the full gradient of the selected loss; rows: an approximation whose backward runs for the
                     selected tokens only; replay: the same, and only their activations are stored [; the paper,
                     equation 4]
    quantiles        quantiles of the excess loss to log [share; ours]
    combine          select the tokens that any score (union) or every score (intersection) in selection.of selects
                     [; the paper, NeurIPS version, section 3.4]
    of               scores to combine, instead of score: [{score: reference_loss, ratio: 0.7}, ...] [; ours]
    unit             token: select tokens; sequence: select whole sequences by their mean score; both: select sequences,
                     then tokens in them [; RHO-LOSS]
    sequence_ratio   with unit both: share of the sequences to select first [share; ours]
    weighting        hard: select the highest scores; stochastic: sample without replacement in proportion to
                     exp(score/temperature); soft: weight every token by sigmoid((score - threshold)/temperature) [;
                     ours]
    temperature      temperature of the weightings stochastic and soft [of the score; ours]
    schedule         constant: always ratio; linear or cosine: from 1 to ratio over schedule_tokens; steps: as in
                     ratio_steps [; ours]
    schedule_tokens  with schedule linear or cosine: tokens over which the ratio falls, counted from the end of start
                     [tokens; ours]
    ratio_steps      with schedule steps: [[tokens, ratio], ...]; each ratio applies from that number of trained tokens,
                     and 1 before the first [; ours]
    min_context      with a store of kind document: number of tokens that must precede a token in its sample before it
                     can be selected, if its document began before the sample; default: 64, or a quarter of
                     data.seq_length if that is less [tokens; ours]
    candidates       samples to score, without gradients, per sample to train on; each rank trains on its best ones
                     [samples; RHO-LOSS]
    start            share of training.train_tokens, at the start of the run, for which the run trains on all tokens and
                     does not run the reference [share; ours]
    """

    score: str = "excess"
    ratio: Share = 0.6
    scope: Literal["global", "rank", "sequence"] = "global"
    pool: Literal["micro_step", "step"] = "micro_step"
    backward: Literal["exact", "rows", "replay"] = "exact"
    quantiles: tuple[Annotated[Number, Field(gt=0, lt=1)], ...] = (0.1, 0.5, 0.9)
    combine: Literal["union", "intersection"] | None = None
    of: list[RankedScore] = field(default_factory=list)
    unit: Literal["token", "sequence", "both"] = "token"
    sequence_ratio: Share | None = None
    weighting: Literal["hard", "stochastic", "soft"] = "hard"
    temperature: Positive[Number] = 1.0
    schedule: Literal["constant", "linear", "cosine", "steps"] = "constant"
    schedule_tokens: Positive[Whole] | None = None
    ratio_steps: list[tuple[NotNegative[Whole], Share]] = field(default_factory=list)
    min_context: NotNegative[Whole] | None = None
    candidates: Positive[Whole] = 1
    start: Annotated[Number, Field(ge=0, le=1)] = 0.0

    def __post_init__(self) -> None:
        if self.weighting == "soft" and self.backward != "exact":
            reason = f"selection.backward {self.backward} skips unselected tokens, and soft weights select every token"
            raise UserError("weighting", self.weighting, reason, "Use selection.backward=exact")
        self._check_combination()
        self._check_unit()
        self._check_schedule()
        self._check_candidates()

    def _check_combination(self) -> None:
        if self.combine is None:
            if self.of:
                reason = "selection.of lists scores to combine"
                raise UserError("combine", None, reason, "Set it to union or intersection, or use selection.score")
            return
        if not self.of:
            remedy = "List them, such as selection.of=[{score: excess, ratio: 0.7}, {score: student_loss, ratio: 0.7}]"
            raise UserError("of", None, "selection.combine needs scores to combine", remedy)
        if self.weighting == "soft":
            reason = "soft weights need one threshold, and a combination has several"
            raise UserError("combine", self.combine, reason, "Use selection.weighting hard or stochastic")
        if self.schedule != "constant":
            reason = "the ratios in selection.of have no schedule"
            raise UserError("schedule", self.schedule, reason, "Use constant, or one score without selection.combine")

    def _check_unit(self) -> None:
        if self.unit != "token" and self.scope == "sequence":
            reason = "selection.scope sequence ranks within each sequence, where there is only one sequence to select"
            raise UserError("unit", self.unit, reason, "Use unit token, or selection.scope global or rank")
        if self.unit == "both" and self.sequence_ratio is None:
            reason = "selection.unit both first selects sequences"
            raise UserError("sequence_ratio", None, reason, "Set it to the share of the sequences to select")
        if self.unit != "both" and self.sequence_ratio is not None:
            reason = "only selection.unit both uses it"
            raise UserError("sequence_ratio", self.sequence_ratio, reason, "Remove it, or set selection.unit=both")

    def _check_schedule(self) -> None:
        falls = self.schedule in ("linear", "cosine")
        if falls and self.schedule_tokens is None:
            reason = f"selection.schedule {self.schedule} needs a length"
            raise UserError("schedule_tokens", None, reason, "Set it to the tokens over which the ratio falls")
        if not falls and self.schedule_tokens is not None:
            reason = "only selection.schedule linear and cosine use it"
            raise UserError("schedule_tokens", self.schedule_tokens, reason, "Remove it, or set selection.schedule")
        steps = [list(step) for step in self.ratio_steps]
        if self.schedule == "steps" and not steps:
            reason = "selection.schedule steps needs its steps"
            raise UserError("ratio_steps", None, reason, "List them, such as [[1B, 0.8], [2B, 0.6]]")
        if self.schedule != "steps" and steps:
            reason = "only selection.schedule steps uses them"
            raise UserError("ratio_steps", steps, reason, "Remove them, or set selection.schedule=steps")
        tokens = [first for first, _ in self.ratio_steps]
        if sorted(set(tokens)) != tokens:
            reason = "the tokens of each pair [tokens, ratio] must be more than those of the pair before"
            raise UserError("ratio_steps", steps, reason, "Order the pairs by their tokens")

    def _check_candidates(self) -> None:
        if self.candidates > 1 and self.combine is not None:
            reason = "candidates are ranked by one score, and selection.combine uses several"
            raise UserError("candidates", self.candidates, reason, "Use 1, or one score without selection.combine")
        if self.candidates > 1 and self.start > 0:
            reason = f"candidates are scored from the first step on, and selection.start is {self.start}"
            raise UserError("candidates", self.candidates, reason, "Use candidates=1, or selection.start=0")


def rule_in_words(settings: SelectionSettings) -> str:
    """Return a rule as one line for dry runs and model cards, such as `top 60% of the tokens by excess; ...`."""
    candidates = f"each rank's best 1/{settings.candidates} of its candidates" if settings.candidates > 1 else ""
    backward = f"backward {settings.backward}, without the unselected tokens" if settings.backward != "exact" else ""
    ranked = f"scope {settings.scope}, pool {settings.pool}"
    parts = (_selected(settings), _weighting(settings), ranked, candidates, *_schedule(settings), backward)
    return "; ".join(filter(None, parts))


def _selected(settings: SelectionSettings) -> str:
    unit, by = ("sequences", "by mean") if settings.unit == "sequence" else ("tokens", "by")
    parts = settings.of or [RankedScore(settings.score, settings.ratio)]
    tops = [f"top {_percent(part.ratio)} of the {unit} {by} {part.score}" for part in parts]
    if settings.ratio_steps:
        tops = [f"top {unit} {by} {settings.score}"]
    selected = f"{settings.combine} of {' and '.join(tops)}" if settings.combine else tops[0]
    if settings.unit == "both":
        return f"top {_percent(settings.sequence_ratio or 1.0)} of the sequences by mean score, then {selected}"
    return selected


def _weighting(settings: SelectionSettings) -> str:
    return {
        "hard": "",
        "stochastic": f"sampled in proportion to exp(score/{settings.temperature:g})",
        "soft": f"all tokens weighted by sigmoid((score - threshold)/{settings.temperature:g})",
    }[settings.weighting]


def _schedule(settings: SelectionSettings) -> list[str]:
    parts = []
    if settings.schedule_tokens is not None:
        parts.append(f"{settings.schedule} schedule of the ratio from 100% over {settings.schedule_tokens:,} tokens")
    if settings.ratio_steps:
        steps = (f"{_percent(ratio)} from {tokens:,} tokens" for tokens, ratio in settings.ratio_steps)
        parts.append(f"ratio {', '.join(steps)}")
    if settings.start:
        parts.append(f"all tokens for the first {_percent(settings.start)} of the run")
    return parts


def _percent(share: float) -> str:
    return f"{100 * share:.4g}%"
