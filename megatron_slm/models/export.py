"""A Hugging Face folder from consolidated weights: it holds what `from_pretrained` needs, and says what it is."""

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from megatron_slm.errors import UserError


def fill_model(
    config: PretrainedConfig, weights: dict[str, Tensor], dtype: torch.dtype, trust_remote_code: bool
) -> PreTrainedModel:
    """The Hugging Face model with a run's weights.

    Args:
        config: the student's.
        weights: of a `CausalLM`, whose names are the Hugging Face model's behind `lm.`.
        dtype: of the exported weights.
        trust_remote_code: run Python that came with the model that the run began from.

    Raises:
        UserError: weights are missing, or too many.
    """
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    own = {name.removeprefix("lm."): weight for name, weight in weights.items()}
    missing, unexpected = model.load_state_dict(own, strict=False)
    # A tied head is saved once; loading the embedding has filled it.
    absent = set(missing) - set(model.all_tied_weights_keys)
    if absent or unexpected:
        raise UserError(f"The checkpoint does not fit the run's model: {sorted([*absent, *unexpected])[:3]}.")
    model.config.use_cache = True
    return model


def write_folder(model: PreTrainedModel, tokenizer: Any, card: str, output: Path) -> None:
    """Write weights (safetensors), configurations, tokenizer and model card to a folder that does not exist yet."""
    aside = output.with_name(f".{output.name}.writing")
    shutil.rmtree(aside, ignore_errors=True)  # Of an export that was killed.
    model.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    (aside / "README.md").write_text(card, encoding="utf-8")
    aside.rename(output)
