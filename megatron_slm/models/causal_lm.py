"""Any Hugging Face causal language model as a module that answers with a loss a token."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from megatron_slm.errors import UserError
from megatron_slm.models.head import token_loss
from megatron_slm.models.settings import ModelSettings
from megatron_slm.types import Batch, TokenSignals

IGNORED = -100
"""Label of a position without a loss, as in Hugging Face."""


class CausalLM(nn.Module):
    """A model whose forward ends in the loss of each token.

    Head and cross-entropy live inside, because ZeRO-3 gathers a weight only for the module whose
    forward reads it.
    """

    def __init__(self, lm: PreTrainedModel, head_chunk: int | None = None) -> None:
        super().__init__()
        self.lm = lm
        self._head_chunk = head_chunk

    def forward(
        self, tokens_BT: Tensor, labels_BT: Tensor, position_ids_BT: Tensor, want: tuple[str, ...] = ()
    ) -> TokenSignals:
        """Args:
            tokens_BT, labels_BT, position_ids_BT: int64; labels below 0 are ignored and have loss 0.
            want: further columns: `entropy`.

        Returns:
            float32 `[B, T]` columns: `loss` in nats, and those wanted.
        """
        hidden_BTD = self.lm.base_model(
            input_ids=tokens_BT, position_ids=position_ids_BT, use_cache=False
        ).last_hidden_state
        head = self.lm.get_output_embeddings()
        loss_N, entropy_N = token_loss(
            hidden_BTD.flatten(0, 1),
            head.weight,
            labels_BT.flatten(),
            bias_V=getattr(head, "bias", None),
            with_entropy="entropy" in want,
            chunk=self._head_chunk,
        )
        signals = {"loss": loss_N.view_as(tokens_BT)}
        if "entropy" in want:
            signals["entropy"] = entropy_N.view_as(tokens_BT)
        return signals


def score_batch(module: nn.Module, batch: Batch, want: tuple[str, ...] = ()) -> TokenSignals:
    """The columns of `CausalLM.forward` for a batch; positions that are not valid have loss 0."""
    labels_BT = batch.labels_BT.masked_fill(~batch.valid_BT, IGNORED)
    return module(batch.tokens_BT, labels_BT, batch.position_ids_BT, want)


def model_config(settings: ModelSettings, vocab_size: int, special_ids: dict[str, int | None]) -> PretrainedConfig:
    """The Hugging Face configuration of the student.

    Args:
        settings: a path, or a configuration from scratch, which takes its vocabulary from the corpus.
        vocab_size: entries of the corpus's tokenizer.
        special_ids: bos_token_id and the like, for a model from scratch.

    Raises:
        UserError: unknown model type, or a vocabulary smaller than the tokenizer's.
    """
    if settings.path is not None:
        config = _load(AutoConfig.from_pretrained, settings.path, "model", settings.trust_remote_code)
        config.update(settings.config)
    else:
        multiple = settings.make_vocab_size_divisible_by
        defaults = {"vocab_size": -(-vocab_size // multiple) * multiple, **special_ids}
        options = defaults | settings.config
        try:
            config = AutoConfig.for_model(options.pop("model_type"), **options)
        except (ValueError, TypeError) as error:
            raise UserError(f"model.config is not a Hugging Face configuration: {_one_line(error)}.") from error
    if config.vocab_size < vocab_size:
        raise UserError(
            f"The student has {config.vocab_size} vocabulary entries and the corpus's tokenizer {vocab_size}: "
            "use the model's own tokenizer in prepare."
        )
    return config


def build_student(
    settings: ModelSettings, config: PretrainedConfig, precision: torch.dtype, device: torch.device
) -> PreTrainedModel:
    """The student: read from `settings.path` to host memory, or made on the device, to be initialised."""
    options: dict[str, Any] = {"dtype": precision}
    if settings.attn_implementation:
        options["attn_implementation"] = settings.attn_implementation
    if settings.path is not None:
        return load_pretrained(settings.path, "model", settings.trust_remote_code, config=config, **options)
    with device:
        return AutoModelForCausalLM.from_config(config, trust_remote_code=settings.trust_remote_code, **options)


def load_pretrained(path: str, setting: str, trust_remote_code: bool, **options: Any) -> PreTrainedModel:
    """A pretrained model, from safetensors only: other weight files are pickles, which can run code.

    Args:
        path: Hugging Face folder or hub name.
        setting: `model` or `reference`, for the message.
        trust_remote_code: run Python that comes with the model.
        options: for `from_pretrained`.

    Raises:
        UserError: it cannot be read.
    """
    return _load(
        AutoModelForCausalLM.from_pretrained, path, setting, trust_remote_code, use_safetensors=True, **options
    )


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


def check_head(model: PreTrainedModel, module: nn.Module) -> None:
    """Refuse a model whose logits are more than hidden states times the head: soft caps, scales, extra layers.

    One forward of eight tokens on every rank, compared with the model's own logits. Hidden states
    are enlarged for it: a soft cap changes nothing at the small logits of fresh weights.

    Raises:
        UserError: the losses differ.
    """
    device = next(model.parameters()).device
    tokens_BT = (torch.arange(9, device=device) * 7919 % model.config.vocab_size)[None]
    positions_BT = torch.arange(8, device=device)[None]
    with torch.no_grad(), _enlarged_hidden_states(model), _evaluating(model):
        logits_BTV = model(input_ids=tokens_BT[:, :-1], position_ids=positions_BT, use_cache=False).logits
        own_T = nn.functional.cross_entropy(logits_BTV[0].float(), tokens_BT[0, 1:], reduction="none")
        ours_T = module(tokens_BT[:, :-1], tokens_BT[:, 1:], positions_BT)["loss"][0]
    if not torch.allclose(own_T, ours_T, rtol=2e-2, atol=2e-2):
        raise UserError(
            f"{type(model).__name__} computes its logits in a way that this system does not know "
            "(a soft cap or a scale): use another architecture."
        )


@contextmanager
def _enlarged_hidden_states(model: PreTrainedModel) -> Iterator[None]:
    def enlarge(module: nn.Module, inputs: Any, output: Any) -> Any:
        output.last_hidden_state = 100 * output.last_hidden_state
        return output

    hook = model.base_model.register_forward_hook(enlarge)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Without dropout, which two forwards would draw differently."""
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)


def _initializers(model: PreTrainedModel) -> dict[str, Callable[[nn.Module], None]]:
    """For each module the `_init_weights` of the nearest model around it."""
    owners: dict[str, Callable[[nn.Module], None]] = {}
    for name, module in model.named_modules():
        parent = name.rpartition(".")[0]
        owners[name] = module._init_weights if isinstance(module, PreTrainedModel) else owners[parent]
    return owners


def _seed_of(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:7], "big")


def _load(read: Callable[..., Any], path: str, setting: str, trust_remote_code: bool, **options: Any) -> Any:
    try:
        return read(path, trust_remote_code=trust_remote_code, **options)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{setting}.path is '{path}', which cannot be loaded: {_one_line(error)}.") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")
