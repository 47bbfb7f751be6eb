"""The ratio as a function of the tokens that were trained on, so that resuming needs no state and all ranks agree."""

import math

from megatron_slm.selection.settings import SelectionSettings


def ratio_at(settings: SelectionSettings, tokens: int, train_tokens: int) -> float | None:
    """Share to keep in the step that begins after `tokens`; None while all tokens count and no score is needed.

    Starting to select after a share of the run is the switch of open_lm's Rho-1 branch; linear and
    cosine then lead from 1 to `ratio` over `schedule_tokens`; steps counts from the first token of the run.

    Args:
        settings: `schedule` and what belongs to it, `ratio`, `start`.
        tokens: trained on before the step, over all ranks.
        train_tokens: length of the run, of which `start` is a share.
    """
    begin = settings.start * train_tokens
    if tokens < begin:
        return None
    if settings.schedule == "steps":
        reached = [ratio for first, ratio in settings.ratio_steps if first <= tokens]
        return reached[-1] if reached else 1.0
    progress = (tokens - begin) / settings.schedule_tokens if settings.schedule_tokens else 1.0
    if progress >= 1:
        return settings.ratio
    remaining = 1 - progress if settings.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return settings.ratio + (1 - settings.ratio) * remaining
