"""Shapes of models, and random models, batches and steps of these shapes, for checks and measurements of a device."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from transformers import AutoConfig, PretrainedConfig

from megatron_slm.backend import Backend, EngineSettings, TrainingEngine
from megatron_slm.backend.plain import PlainBackend
from megatron_slm.dist import World
from megatron_slm.models.causal_lm import CausalLM, build_student, initialize_weights
from megatron_slm.models.settings import ModelSettings
from megatron_slm.training.optimizer import adamw
from megatron_slm.training.settings import TrainingSettings
from megatron_slm.types import Batch


@dataclass(frozen=True)
class Shape:
    """A Llama and the micro-batch that it is trained on.

    repeats        number of measurements
    checkpointing  activation checkpointing in whole steps
    """

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int
    seq_length: int
    micro_batch_size: int
    repeats: int
    checkpointing: bool = False

    def __str__(self) -> str:
        return (
            f"{self.layers} layers of {self.hidden} ({self.intermediate}, {self.heads} heads in {self.kv_heads} "
            f"groups), vocabulary {self.vocabulary}, T {self.seq_length}, B {self.micro_batch_size}"
        )

    @property
    def tokens(self) -> int:
        """The tokens of a micro-batch."""
        return self.micro_batch_size * self.seq_length

    def hf_config(self) -> PretrainedConfig:
        """Return the configuration of the model."""
        return AutoConfig.for_model(
            "llama",
            num_hidden_layers=self.layers,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            vocab_size=self.vocabulary,
            max_position_embeddings=self.seq_length,
        )


SMALL = Shape(2, 256, 512, 4, 2, 1024, seq_length=128, micro_batch_size=4, repeats=4)
"""The shape at which the device is compared with the CPU."""
PRESETS = {
    "tiny": Shape(2, 64, 128, 4, 2, 512, seq_length=64, micro_batch_size=2, repeats=3),
    "tinyllama": Shape(22, 2048, 5632, 32, 4, 32000, seq_length=2048, micro_batch_size=8, repeats=6),
    "llama-7b": Shape(32, 4096, 11008, 32, 32, 32000, 2048, 4, repeats=4, checkpointing=True),
}
"""The shapes whose speed `check-device` measures."""
STEP_PRESETS = {
    "tiny": replace(PRESETS["tiny"], repeats=2),
    "cpu": Shape(6, 512, 1408, 8, 8, 8192, seq_length=512, micro_batch_size=4, repeats=9),
    "gpu-1b": replace(PRESETS["tinyllama"], repeats=9),
    "gpu-7b": replace(PRESETS["llama-7b"], micro_batch_size=2, repeats=5, checkpointing=False),
}
"""The shapes at which the kinds of backward are compared."""


def default_dtype(device: torch.device) -> torch.dtype:
    """Return the precision of a run on this device."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def make_model(shape: Shape, seed: int, backend: Backend, dtype: torch.dtype, device: torch.device) -> CausalLM:
    """Build a model with random weights that depend on the seed only."""
    config = shape.hf_config()
    lm = backend.construct(lambda: build_student(ModelSettings(config={"model_type": "llama"}), config, dtype, device))
    initialize_weights(lm, seed, backend.gathered)
    if shape.checkpointing:
        lm.gradient_checkpointing_enable({"use_reentrant": False})
    return CausalLM(lm)


def plain_engine(module: CausalLM, shape: Shape, dtype: torch.dtype, device: torch.device) -> TrainingEngine:
    """Build a plain PyTorch engine for one process."""
    training = TrainingSettings(global_batch_size=shape.micro_batch_size, train_tokens=1)
    settings = EngineSettings(shape.micro_batch_size, 1, 1.0, dtype)
    return PlainBackend(World(0, 1, 0, device)).training_engine(module, adamw(module, training, device), settings)


def make_batch(shape: Shape, device: torch.device, first: int = 0, samples: int | None = None) -> Batch:
    """Build a batch of random tokens, with as many samples as a micro-batch of the shape unless `samples` is given.

    The tokens of a sample depend only on its ordinal; `first` is that of the first sample.
    """
    samples = samples or shape.micro_batch_size
    rows = []
    for ordinal in range(first, first + samples):
        generator = torch.Generator().manual_seed(ordinal)
        rows.append(torch.randint(shape.vocabulary, (shape.seq_length + 1,), generator=generator))
    text_BS = torch.stack(rows)
    position_BT = torch.arange(shape.seq_length).repeat(samples, 1)
    return Batch(
        tokens_BT=text_BS[:, :-1],
        labels_BT=text_BS[:, 1:],
        valid_BT=torch.ones_like(position_BT, dtype=torch.bool),
        position_ids_BT=position_BT,
        sample_index_B=torch.arange(first, first + samples),
        source_B=torch.zeros(samples, dtype=torch.long),
        label_offset_BT=position_BT,
        continued_B=torch.zeros(samples, dtype=torch.long),
    ).to(device)


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_once(work: Callable[[], object], device: torch.device) -> float:
    """Return the seconds that the work takes on the device."""
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def time_repeats(work: Callable[[], object], repeats: int, device: torch.device) -> list[float]:
    """Return the seconds of each repeat, after one that is not measured."""
    return [time_once(work, device) for _ in range(repeats + 1)][1:]
