"""Any Hugging Face causal language model as a module that answers with a loss a token."""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from megatron_slm.errors import UserError
from megatron_slm.models.checks import refuse_untied
from megatron_slm.models.configuration import load, one_line
from megatron_slm.models.head import token_loss
from megatron_slm.models.router import RouterLoss
from megatron_slm.models.settings import ModelSettings
from megatron_slm.types import Batch, TokenSignals

IGNORED = -100
"""Label of a position without a loss, as in Hugging Face."""


class CausalLM(nn.Module):
    """A model whose forward ends in the loss of each token.

    Head and cross-entropy live inside, because ZeRO-3 gathers a weight only for the module whose
    forward reads it.
    """

    def __init__(self, lm: PreTrainedModel, head_chunk: int | None = None, router: RouterLoss | None = None) -> None:
        super().__init__()
        self.lm = lm
        self.router = router
        self._head_chunk = head_chunk

    def forward(
        self,
        tokens_BT: Tensor,
        labels_BT: Tensor,
        position_ids_BT: Tensor,
        want: tuple[str, ...] = (),
        brought: Mapping[str, Any] | None = None,
    ) -> TokenSignals:
        """Args:
            tokens_BT, labels_BT, position_ids_BT: int64; labels below 0 are ignored and have loss 0.
            want: further columns of `megatron_slm.signals.COLUMNS`, such as `entropy`.
            brought: what the call brings to the layers of the model beside: `selective`, see
                models/sparse_backward/attention.py.

        Returns:
            float32 columns `[B, T]`: `loss` in nats, and those wanted. Where gradients are recorded and the model has a
            router loss, also the 0-dim term `router`: that loss, without its coefficient.
        """
        options = dict(brought or {})
        if self.router is not None:
            options["output_router_logits"] = torch.is_grad_enabled()
        output = self.lm.base_model(input_ids=tokens_BT, position_ids=position_ids_BT, use_cache=False, **options)
        hidden_BTD = output.last_hidden_state
        head = self.lm.get_output_embeddings()
        columns = token_loss(
            hidden_BTD.flatten(0, 1),
            head.weight,
            labels_BT.flatten(),
            bias_V=getattr(head, "bias", None),
            want=want,
            chunk=self._head_chunk,
        )
        signals = {name: column_N.view_as(tokens_BT) for name, column_N in zip(("loss", *want), columns, strict=True)}
        if self.router is not None and torch.is_grad_enabled():
            signals["router"] = self.router.balance(output.router_logits)
        return signals


def score_batch(
    module: nn.Module, batch: Batch, want: tuple[str, ...] = (), brought: Mapping[str, Any] | None = None
) -> TokenSignals:
    """The columns of `CausalLM.forward` for a batch; positions that are not valid have loss 0."""
    signals: TokenSignals = module(batch.tokens_BT, masked_labels(batch), batch.position_ids_BT, want, brought)
    return signals


def masked_labels(batch: Batch) -> Tensor:
    """The labels, int64 `[B, T]`; those of positions that are not valid are ignored."""
    return batch.labels_BT.masked_fill(~batch.valid_BT, IGNORED)


def build_student(
    settings: ModelSettings, config: PretrainedConfig, precision: torch.dtype, device: torch.device
) -> PreTrainedModel:
    """The student: read from `settings.path` to host memory, or made on the device, to be initialised.

    Raises:
        UserError: Hugging Face cannot read or make it.
    """
    options: dict[str, Any] = {"dtype": precision}
    if settings.attn_implementation:
        options["attn_implementation"] = settings.attn_implementation
    if settings.path is not None:
        lm = load_pretrained(settings.path, "model", settings.trust_remote_code, config=config, **options)
        return _learning_every_row(lm)
    try:
        with device:
            lm = AutoModelForCausalLM.from_config(config, trust_remote_code=settings.trust_remote_code, **options)
        return _learning_every_row(lm)
    except Exception as error:
        raise UserError(
            f"No model can be made from model.config and model.attn_implementation: {one_line(error)}."
        ) from error


def _learning_every_row(lm: PreTrainedModel) -> PreTrainedModel:
    """Let the input embedding learn the row of the pad token, which would get no gradient and start at zero.

    Samples are packed, so nothing is padded, and the pad token is often one that occurs in text, such as eos.
    """
    embedding = lm.get_input_embeddings()
    if getattr(embedding, "padding_idx", None) is not None:
        embedding.padding_idx = None
    return lm


def load_pretrained(path: str, setting: str, trust_remote_code: bool, **options: Any) -> PreTrainedModel:
    """A pretrained model, from safetensors only: other weight files are pickles, which can run code.

    Args:
        path: Hugging Face folder or hub name.
        setting: `model` or `reference`, for the message.
        trust_remote_code: run Python that comes with the model.
        options: for `from_pretrained`.

    Raises:
        UserError: it cannot be read, its files do not hold all of its weights, or a student's hold two that it ties.
    """
    read = AutoModelForCausalLM.from_pretrained
    options |= {"use_safetensors": True, "output_loading_info": True, "ignore_mismatched_sizes": True}
    model, found = load(read, path, setting, trust_remote_code, **options)
    # Hugging Face would fill them with random numbers, of another seed on each rank.
    lacking = sorted({*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])})
    if lacking:
        raise UserError(
            f"{setting}.path is '{path}', whose files lack {len(lacking)} of the model's weights or hold them in "
            f"another shape, {lacking[0]} among them: check that they are complete, and model.config if you set it."
        )
    if setting == "model":
        refuse_untied(model, path)
    return model


def initialize_weights(
    model: PreTrainedModel,
    seed: int,
    gathered: Callable[[Iterable[nn.Parameter]], AbstractContextManager[object]],
) -> None:
    """Hugging Face's initialisation, each module from its own seed.

    So the weights are a function of (configuration, seed) alone. Construction under ZeRO-3
    draws other numbers than a plain one, and a module at a time is gathered, never the model.
    """
    owners = _initializers(model)
    for name, module in reversed(list(model.named_modules())):
        # A model's initialiser may also write to direct children (GPT-2 rescales `c_proj`).
        parameters = {*module.parameters(recurse=False)}
        parameters |= {p for child in module.children() for p in child.parameters(recurse=False)}
        with gathered(parameters), torch.no_grad():
            torch.manual_seed(_seed_of(seed, name))
            owners[name](module)


def _initializers(model: PreTrainedModel) -> dict[str, Callable[[nn.Module], None]]:
    """For each module the `_init_weights` of the nearest model around it."""
    owners: dict[str, Callable[[nn.Module], None]] = {}
    for name, module in model.named_modules():
        parent = name.rpartition(".")[0]
        owners[name] = module._init_weights if isinstance(module, PreTrainedModel) else owners[parent]
    return owners


def _seed_of(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:7], "big")
