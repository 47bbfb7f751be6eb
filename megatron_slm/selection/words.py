"""The rule in words, for people: dry runs and model cards."""

from megatron_slm.selection.settings import SelectionSettings


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
