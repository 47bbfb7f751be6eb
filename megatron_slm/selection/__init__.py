"""Token selection for anyone's training loop: scores in, an exact mask for all ranks out.

Needs torch and nothing else of this package. Data flows through four files in this order:
`scoring.py` (a column to rank by), `threshold.py` (the exact cut over all ranks), `select.py`
(the mask), `loss.py` (the summed loss). Imported on first use, so that reading the settings
beside them does not load torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_slm.selection.loss import selected_loss as selected_loss
    from megatron_slm.selection.scoring import find_score as find_score
    from megatron_slm.selection.scoring import score as score
    from megatron_slm.selection.select import Selection as Selection
    from megatron_slm.selection.select import plan_k as plan_k
    from megatron_slm.selection.select import select_tokens as select_tokens

_HOME = {
    "Selection": "select",
    "plan_k": "select",
    "select_tokens": "select",
    "selected_loss": "loss",
    "find_score": "scoring",
    "score": "scoring",
}

__all__ = ["Selection", "find_score", "plan_k", "score", "select_tokens", "selected_loss"]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
