"""Token selection for any training loop: from scores to an exact mask over all ranks.

It needs torch and, from this package, only the errors and the types of settings. Read the files in this order:
`scores.py` (the score of each token), `threshold.py` (the exact threshold over all ranks), `select.py` (the mask and
the summed loss), `rule.py` (the complete rule, which `settings.py` configures). Names are imported on first use, so
that the settings load without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_slm.selection.rule import Rule as Rule
    from megatron_slm.selection.rule import ratio_at as ratio_at
    from megatron_slm.selection.scores import find_score as find_score
    from megatron_slm.selection.scores import score as score
    from megatron_slm.selection.scores import token_uniform as token_uniform
    from megatron_slm.selection.select import Selection as Selection
    from megatron_slm.selection.select import plan_k as plan_k
    from megatron_slm.selection.select import plan_pools as plan_pools
    from megatron_slm.selection.select import select_tokens as select_tokens
    from megatron_slm.selection.select import selected_loss as selected_loss
    from megatron_slm.selection.settings import SelectionSettings as SelectionSettings

_HOME = {
    "Rule": "rule",
    "Selection": "select",
    "SelectionSettings": "settings",
    "find_score": "scores",
    "plan_k": "select",
    "plan_pools": "select",
    "ratio_at": "rule",
    "score": "scores",
    "select_tokens": "select",
    "selected_loss": "select",
    "token_uniform": "scores",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
