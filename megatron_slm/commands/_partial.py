"""Configurations for commands that need fewer settings than a run."""

from typing import Any

from megatron_slm.config import Config, parse_config

_UNUSED = {"run_dir": "unused", "model": {"config": {"model_type": "llama"}}}
"""Settings that a run needs, and that reading its corpora does not."""


def parse_partial(tree: dict[str, Any], *, whole_training: bool = False) -> Config:
    """Return a configuration in which only the corpora, and the settings that name them, are required.

    Args:
        tree: the configuration as nested dicts.
        whole_training: also require the training group of a run.

    Raises:
        UserError: as `parse_config`.
    """
    training = {} if whole_training else {"training": _training(tree.get("training"))}
    return parse_config(_UNUSED | tree | training)


def _training(given: Any) -> Any:
    """Return the training group, with the settings filled in that reading corpora does not need."""
    if not isinstance(given, dict | None):
        return given
    length = {} if given and {"train_tokens", "train_epochs"} & given.keys() else {"train_tokens": 1}
    return {"global_batch_size": 1} | length | (given or {})
