"""The cost of a step in floating-point operations, the size of a model, and the peak speed of devices."""

import copy
import re
from dataclasses import dataclass

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from megatron_slm.backend.deepspeed_internals import whole_shape
from megatron_slm.devices import DENSE_BF16_PEAKS
from megatron_slm.models.head import CHUNK_BYTES
from megatron_slm.torch_internals import fake_tensors, storage_id
from megatron_slm.training.optimizer import decay_groups


@dataclass(frozen=True)
class TokenFlops:
    """The FLOPs per token of a forward through one model, by part. A backward takes twice as many."""

    weights: float
    attention: float

    @property
    def forward(self) -> float:
        return self.weights + self.attention

    @property
    def training(self) -> float:
        return 3 * self.forward


@dataclass(frozen=True)
class ModelFlops:
    """The FLOPs per token of the models of a run.

    student    of the student, by part
    reference  of a forward through all reference models that run
    backward   the run's `selection.backward`
    """

    student: TokenFlops
    reference: float
    backward: str = "exact"


@dataclass(frozen=True)
class StepTokens:
    """The tokens of one step over all ranks, including those whose labels do not count toward the loss.

    candidates    tokens read as candidates; 0 if the run trains on all samples that it reads
    trained       tokens in batches with a backward
    selected      selected tokens, which a selective backward runs through; None under CLM, whose backward is exact
    reference     tokens that the reference scored
    ranked_first  True if the whole step was ranked together, so that its forwards run again
    """

    candidates: int
    trained: int
    selected: int | None
    reference: int
    ranked_first: bool = False


@dataclass(frozen=True)
class StudentTokens:
    """The tokens that the student ran in one step.

    scored     in forwards without a gradient
    forward    in forwards that a backward follows
    backward   in backwards through the weights
    attention  in backwards through attention
    """

    scored: int
    forward: int
    backward: int
    attention: int


def student_tokens(tokens: StepTokens, backward: str) -> StudentTokens:
    """Return the tokens that the student runs for one value of `selection.backward`.

    Under rows, the backward of attention counts in full, although a CPU runs it for the selected queries only.

    Args:
        tokens: tokens of the step.
        backward: `selection.backward` (models/student.py, models/sparse_backward/).
    """
    trained, selected = tokens.trained, tokens.selected
    first = tokens.candidates + (trained if tokens.ranked_first else 0)
    if selected is None or backward == "exact":
        return StudentTokens(first, trained, trained, trained)
    if backward == "rows":
        return StudentTokens(first, trained, selected, trained)
    return StudentTokens(first + trained, selected, selected, selected)


def step_flops(models: ModelFlops, tokens: StepTokens) -> float:
    """Return the FLOPs of one step over all ranks, without the forwards that activation checkpointing runs again."""
    ran, student = student_tokens(tokens, models.backward), models.student
    backward = 2 * (student.weights * ran.backward + student.attention * ran.attention)
    return student.forward * (ran.scored + ran.forward) + backward + models.reference * tokens.reference


def token_flops(module: nn.Module, config: PretrainedConfig, seq_length: int) -> TokenFlops:
    """Return the FLOPs per token, by the convention of PaLM (appendix B).

    Count 2 per weight that is multiplied, and 4 * layers * width * T for attention, not halved for causality.
    Embeddings are looked up and do not count, unless they are tied to the head. All experts count, even those that a
    token is not routed to.

    Args:
        module: the model; its parameters may be partitioned.
        config: configuration of the model.
        seq_length: tokens per sample, T.
    """
    size = {id(parameter): whole_shape(parameter).numel() for parameter in module.parameters()}
    looked_up = {id(child.weight) for child in module.modules() if isinstance(child, nn.Embedding)}
    multiplied = {id(child.weight) for child in module.modules() if isinstance(child, nn.Linear)}
    weights = sum(size.values()) - sum(size[key] for key in looked_up - multiplied)
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    return TokenFlops(2.0 * weights, 4.0 * config.num_hidden_layers * width * seq_length)


def peak_flops(device: torch.device) -> float | None:
    """Return the dense bf16 peak of one device in FLOP/s; None if unknown, as for any CPU."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in DENSE_BF16_PEAKS.items() if re.search(rf"\b{key}\b", name)), None)


@dataclass(frozen=True)
class ModelSize:
    """The size of a model, derived from its configuration without allocating weights.

    numels            number of elements of each parameter
    decayed           number of parameters with weight decay
    layers            number of decoder layers
    layer_bytes       bytes that one layer keeps for the backward of one micro-batch
    boundary_bytes    bytes of the hidden states of one micro-batch
    cache_bytes       bytes of the keys and values of one layer for one micro-batch
    head_bytes        bytes of the head's chunk of logits and of its exponentials
    head              number of parameters of the head
    flops             FLOPs per token
    """

    numels: tuple[int, ...]
    decayed: int
    layers: int
    layer_bytes: int
    boundary_bytes: int
    cache_bytes: int
    head_bytes: int
    head: int
    flops: TokenFlops

    @property
    def parameters(self) -> int:
        return sum(self.numels)

    @property
    def largest(self) -> int:
        """The number of elements of the largest parameter."""
        return max(self.numels)


def model_size(config: PretrainedConfig, samples: int, seq_length: int, precision: torch.dtype) -> ModelSize:
    """Return the size of a model.

    It builds one layer and two layers without memory, and measures how much more the second keeps for the backward.

    Args:
        config: configuration of the whole model.
        samples: sequences per micro-batch.
        seq_length: tokens per sequence.
        precision: dtype of weights and activations.
    """
    layers = config.num_hidden_layers
    with fake_tensors():
        one, two = (_kept(_with_layers(config, n, precision), samples, seq_length) for n in (1, 2))
        whole = _with_layers(config, layers, precision)
    numels = tuple(parameter.numel() for parameter in whole.parameters())
    output = whole.get_output_embeddings()
    boundary = samples * seq_length * config.hidden_size * precision.itemsize
    head = 2 * min(CHUNK_BYTES, 4 * samples * seq_length * config.vocab_size)
    groups = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cache = 2 * samples * seq_length * groups * width * precision.itemsize
    return ModelSize(
        numels,
        sum(parameter.numel() for parameter in decay_groups(whole)[0]),
        layers,
        layer_bytes=two - one,
        boundary_bytes=boundary,
        cache_bytes=cache,
        head_bytes=head,
        head=sum(parameter.numel() for parameter in output.parameters()),
        flops=token_flops(whole, config, seq_length),
    )


def _with_layers(config: PretrainedConfig, layers: int, precision: torch.dtype) -> PreTrainedModel:
    """Return the model with this number of layers."""
    smaller = copy.deepcopy(config)
    smaller.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        smaller.layer_types = (config.layer_types * layers)[:layers]
    return AutoModelForCausalLM.from_config(smaller, dtype=precision)


def _kept(model: PreTrainedModel, samples: int, seq_length: int) -> int:
    """Return the bytes that a forward without the head keeps for its backward, without weights and T x T matrices.

    Fused attention keeps no T x T matrices. Without fused attention, the true figure is higher.
    """
    weights = {storage_id(parameter) for parameter in model.parameters()}
    storages: dict[int, int] = {}

    def record(tensor: torch.Tensor) -> torch.Tensor:
        if storage_id(tensor) not in weights and tensor.shape[-2:] != (seq_length, seq_length):
            storages[storage_id(tensor)] = tensor.untyped_storage().nbytes()
        # If this tensor were freed, a later one could reuse its storage and would not be counted.
        kept_alive.append(tensor)
        return tensor

    kept_alive: list[torch.Tensor] = []
    tokens_BT = torch.zeros(samples, seq_length, dtype=torch.long)
    with saved_tensors_hooks(record, lambda tensor: tensor):
        model.base_model(input_ids=tokens_BT, use_cache=False)
    return sum(storages.values())
