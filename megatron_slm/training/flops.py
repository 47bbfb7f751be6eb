"""Floating-point operations of a token, and what the hardware could do at best."""

import re
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PretrainedConfig

DENSE_BF16_PEAKS = {
    # Dense tensor-core peaks in FLOP/s, from NVIDIA's datasheets: SXM where the name says no more.
    # The sparse figures printed larger there are twice as high.
    "B200": 2.25e15,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
    "V100": 125e12,
}


@dataclass(frozen=True)
class TokenFlops:
    """FLOPs of a token's forward through one model: by its weights, and of attention. A backward takes twice that."""

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
    """Of the models of a run.

    student    of a token
    reference  forward of a token through all references that run along
    backward   the run's `selection.backward`
    """

    student: TokenFlops
    reference: float
    backward: str = "exact"


@dataclass(frozen=True)
class StepTokens:
    """Tokens of one step over all ranks; positions, whether their labels count or not.

    candidates    read, to choose from; 0 where all that is read is trained on
    trained       in batches with a backward
    selected      of these, what a selective backward runs through; None under CLM, whose backward is the exact one
    reference     that the reference was asked about
    ranked_first  the whole step was ranked together: what was run for that is run again
    """

    candidates: int
    trained: int
    selected: int | None
    reference: int
    ranked_first: bool = False


@dataclass(frozen=True)
class StudentTokens:
    """What the student ran in one step, in tokens.

    scored     forwards without a gradient
    forward    forwards that a backward follows
    backward   backwards through the weights
    attention  backwards through attention
    """

    scored: int
    forward: int
    backward: int
    attention: int


def student_tokens(tokens: StepTokens, backward: str) -> StudentTokens:
    """What each way of `selection.backward` runs (models/exact.py, rows.py, replay.py).

    Attention's backward under rows counts in full, also where a CPU runs that of the selected queries alone.
    """
    trained, selected = tokens.trained, tokens.selected
    first = tokens.candidates + (trained if tokens.ranked_first else 0)
    if selected is None or backward == "exact":
        return StudentTokens(first, trained, trained, trained)
    if backward == "rows":
        return StudentTokens(first, trained, selected, trained)
    return StudentTokens(first + trained, selected, selected, selected)


def step_flops(models: ModelFlops, tokens: StepTokens) -> float:
    """FLOPs of one step over all ranks. What activation checkpointing runs again is not counted."""
    ran, student = student_tokens(tokens, models.backward), models.student
    backward = 2 * (student.weights * ran.backward + student.attention * ran.attention)
    return student.forward * (ran.scored + ran.forward) + backward + models.reference * tokens.reference


def token_flops(module: nn.Module, config: PretrainedConfig, seq_length: int) -> TokenFlops:
    """2 FLOPs a weight that multiplies, and 4 * layers * width * T of attention, not halved for causality.

    The convention of PaLM (appendix B). Embeddings are looked up, not multiplied; one that is
    tied is the head, and counts. All experts count, also those that a token is not routed to.
    """
    size = {id(parameter): getattr(parameter, "ds_numel", parameter.numel()) for parameter in module.parameters()}
    looked_up = {id(child.weight) for child in module.modules() if isinstance(child, nn.Embedding)}
    multiplied = {id(child.weight) for child in module.modules() if isinstance(child, nn.Linear)}
    weights = sum(size.values()) - sum(size[key] for key in looked_up - multiplied)
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    return TokenFlops(2.0 * weights, 4.0 * config.num_hidden_layers * width * seq_length)


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 peak of one device in FLOP/s; None where it is not known, as for any CPU."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in DENSE_BF16_PEAKS.items() if re.search(rf"\b{key}\b", name)), None)
