"""Token selection for anyone's training loop: scores in, an exact mask for all ranks out.

Needs torch and nothing else of this package. Data flows through the files in this order: `scoring.py` (a column
to rank by), `threshold.py` (the exact cut over all ranks), `select.py` (the mask), `units.py` (whole sequences),
`weighting.py` (how much a token counts), `rule.py` (all of it, as `settings.py` says), `loss.py` (the summed loss);
`schedule.py` says the ratio. Imported on first use, so that reading the settings beside them does not load torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_slm.selection.loss import selected_loss as selected_loss
    from megatron_slm.selection.rule import Rule as Rule
    from megatron_slm.selection.schedule import ratio_at as ratio_at
    from megatron_slm.selection.scoring import find_score as find_score
    from megatron_slm.selection.scoring import score as score
    from megatron_slm.selection.select import Selection as Selection
    from megatron_slm.selection.select import plan_k as plan_k
    from megatron_slm.selection.select import plan_pools as plan_pools
    from megatron_slm.selection.select import select_tokens as select_tokens
    from megatron_slm.selection.settings import SelectionSettings as SelectionSettings
    from megatron_slm.selection.uniform import token_uniform as token_uniform

_HOME = {
    "Rule": "rule",
    "Selection": "select",
    "SelectionSettings": "settings",
    "find_score": "scoring",
    "plan_k": "select",
    "plan_pools": "select",
    "ratio_at": "schedule",
    "score": "scoring",
    "select_tokens": "select",
    "selected_loss": "loss",
    "token_uniform": "uniform",
}

__all__ = [
    "Rule",
    "Selection",
    "SelectionSettings",
    "find_score",
    "plan_k",
    "plan_pools",
    "ratio_at",
    "score",
    "select_tokens",
    "selected_loss",
    "token_uniform",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
