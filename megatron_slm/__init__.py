"""Selective Language Modeling: pretrain on the tokens that a frozen reference model scores as worth learning.

The names below are imported on first use, so that `import megatron_slm` stays light.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_slm.commands.train import train
    from megatron_slm.errors import UserError
    from megatron_slm.selection import Selection, plan_k, score, select_tokens, selected_loss
    from megatron_slm.training.trainer import Callback

__version__ = "0.2.0"

__all__ = ["Callback", "Selection", "UserError", "plan_k", "score", "select_tokens", "selected_loss", "train"]

_ELSEWHERE = {"Callback": "training.trainer", "UserError": "errors", "train": "commands.train"}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"megatron_slm.{_ELSEWHERE.get(name, 'selection')}"), name)
