"""Configurations of commands that need less of one than a run does."""

from typing import Any

from megatron_slm.config import Config, parse_config

_UNUSED = {"run_dir": "unused", "model": {"config": {"model_type": "llama"}}}
"""What a configuration needs for training, and not for reading its corpora."""


def parse_partial(tree: dict[str, Any], *, whole_training: bool = False) -> Config:
    """A configuration of which the corpora, and what names them, are enough.

    Args:
        tree: as read.
        whole_training: its training group counts, and must be as a run needs it.

    Raises:
        UserError: as `parse_config`.
    """
    training = {} if whole_training else {"training": _training(tree.get("training"))}
    return parse_config(_UNUSED | tree | training)


def _training(given: Any) -> Any:
    """The training group, with what it needs for a run and not for its corpora."""
    if not isinstance(given, dict | None):
        return given
    length = {} if given and {"train_tokens", "train_epochs"} & given.keys() else {"train_tokens": 1}
    return {"global_batch_size": 1} | length | (given or {})
