"""A Hugging Face causal language model that returns the loss of each token; construction of the student."""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from megatron_slm.errors import UserError
from megatron_slm.models.head import token_loss
from megatron_slm.models.pretrained import load_pretrained, one_line
from megatron_slm.models.router import RouterLoss
from megatron_slm.models.settings import ModelSettings
from megatron_slm.models.transformers_internals import initializer
from megatron_slm.types import Batch, TokenSignals

IGNORED = -100
"""Label of a position without a loss, as Hugging Face defines it."""


class CausalLM(nn.Module):
    """A model whose forward returns the loss of each token.

    The head and the cross-entropy are inside the module that DeepSpeed wraps, because ZeRO-3 gathers a weight only
    during the forward of the module that owns it, or of a module around that one.

    Args:
        lm: the Hugging Face model.
        head_chunk: tokens per chunk of logits; default: see `token_loss`.
        router: the model's router loss, if it has one.
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
        layer_options: Mapping[str, Any] | None = None,
    ) -> TokenSignals:
        """Return float32 `[B, T]` columns: `loss` in nats, and the columns in `want`.

        If gradients are enabled and the model has a router loss, the result includes it, without its coefficient, as
        the 0-dim term `router`.

        Args:
            tokens_BT, labels_BT, position_ids_BT: int64; labels below 0 are ignored and have loss 0.
            want: further columns of `megatron_slm.signals.COLUMNS`, such as `entropy`.
            layer_options: further arguments for the model's layers, such as `selective`
                (models/sparse_backward/attention.py).
        """
        options = dict(layer_options or {})
        if self.router is not None:
            # Scoring does not need the router loss, and the logits of all routers take memory.
            options["output_router_logits"] = torch.is_grad_enabled()
        # The model without its head: Hugging Face's own forward would hold the logits of all tokens.
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
    module: nn.Module, batch: Batch, want: tuple[str, ...] = (), layer_options: Mapping[str, Any] | None = None
) -> TokenSignals:
    """Return the columns of `CausalLM.forward` for a batch; positions that are not valid have loss 0."""
    signals: TokenSignals = module(batch.tokens_BT, masked_labels(batch), batch.position_ids_BT, want, layer_options)
    return signals


def masked_labels(batch: Batch) -> Tensor:
    """Return the labels, int64 `[B, T]`, with `IGNORED` at positions that are not valid."""
    return batch.labels_BT.masked_fill(~batch.valid_BT, IGNORED)


def build_student(
    settings: ModelSettings, config: PretrainedConfig, precision: torch.dtype, device: torch.device
) -> PreTrainedModel:
    """Return the student: loaded from `settings.path` to host memory, or built on the device without initial weights.

    Args:
        settings: the group `model` of the configuration.
        config: the model's configuration, from `model_config`.
        precision: dtype of the weights.
        device: device for a model from scratch.

    Raises:
        UserError: Hugging Face cannot load or build it.
    """
    options: dict[str, Any] = {"dtype": precision}
    if settings.attn_implementation:
        options["attn_implementation"] = settings.attn_implementation
    if settings.path is not None:
        lm = load_pretrained(settings.path, "model", settings.trust_remote_code, config=config, **options)
    else:
        try:
            with device:
                lm = AutoModelForCausalLM.from_config(config, trust_remote_code=settings.trust_remote_code, **options)
        except Exception as error:
            reason = f"Hugging Face cannot build the model ({one_line(error)})"
            remedy = "Change model.config or model.attn_implementation"
            if settings.attn_implementation:
                raise UserError("model.attn_implementation", settings.attn_implementation, reason, remedy) from error
            raise UserError("model.config", settings.config, reason, remedy) from error
    # With `padding_idx`, the pad token's row would start at zero and get no gradient. Samples are packed and never
    # padded, and the pad token is often one that occurs in text, such as eos.
    embedding = lm.get_input_embeddings()
    if getattr(embedding, "padding_idx", None) is not None:
        embedding.padding_idx = None
    return lm


def initialize_weights(
    model: PreTrainedModel,
    seed: int,
    gathered: Callable[[Iterable[nn.Parameter]], AbstractContextManager[object]],
) -> None:
    """Initialise each module with Hugging Face's function, from a seed of its own; every rank calls it.

    The weights depend only on the configuration and the seed, not on the order in which a backend constructs modules.
    Under ZeRO-3, one module at a time is gathered, never the whole model.

    Args:
        model: the student, constructed by a backend.
        seed: the run's.
        gathered: `Backend.gathered`.
    """
    # By name of the module, the initialiser of the innermost model around it: parts of a model can be models too.
    owners: dict[str, Callable[[nn.Module], None]] = {}
    for name, module in model.named_modules():
        parent = name.rpartition(".")[0]
        owners[name] = initializer(module) if isinstance(module, PreTrainedModel) else owners[parent]
    # From the leaves up, so that what a family's function writes to children is not overwritten.
    for name, module in reversed(list(model.named_modules())):
        # A family's function may also write to direct children of a module: GPT-2 rescales `c_proj`.
        parameters = {*module.parameters(recurse=False)}
        parameters |= {p for child in module.children() for p in child.parameters(recurse=False)}
        with gathered(parameters), torch.no_grad():
            digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
            torch.manual_seed(int.from_bytes(digest[:7], "big"))
            owners[name](module)
