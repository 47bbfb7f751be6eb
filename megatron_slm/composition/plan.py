"""What the configuration leaves open, as values; the length of the run in steps."""

import dataclasses
import math

from megatron_slm.composition.corpora import Corpora
from megatron_slm.config import Config
from megatron_slm.data.samples import tokens_per_epoch
from megatron_slm.dist import World
from megatron_slm.errors import UserError
from megatron_slm.training.state import Plan


def resolve(config: Config, corpora: Corpora, world: World) -> tuple[Config, Plan]:
    """The configuration with its defaults as values, and the plan in steps.

    Raises:
        UserError: a precision that the backend cannot train in.
    """
    training, data = config.training, config.data
    # A pass reads every sample; of candidates, one in so many is trained on.
    epochs = (training.train_epochs or 0.0) / config.candidates
    tokens = training.train_tokens or math.ceil(epochs * tokens_per_epoch(data, corpora.train, corpora.kept))
    tokens_per_step = training.global_batch_size * data.seq_length
    steps = math.ceil(tokens / tokens_per_step)
    # Whole steps, so that a run of the planned length stays within one cycle of the order.
    data = dataclasses.replace(data, order_tokens=data.order_tokens or steps * tokens_per_step * config.candidates)
    plan = Plan(
        steps,
        training.global_batch_size,
        data.seq_length,
        training.log_interval,
        training.eval_interval,
        training.save_interval,
        config.candidates,
    )
    precision = training.precision or ("bf16" if world.device.type == "cuda" else "fp32")
    training = dataclasses.replace(training, precision=precision)
    config = dataclasses.replace(config, data=data, training=training)
    _refuse_bf16_alone(config)
    return config, plan


def _refuse_bf16_alone(config: Config) -> None:
    """bf16 trains with float32 weights and gradients beside it, which only a partitioned optimizer keeps."""
    if config.training.precision != "bf16":
        return
    if config.training.backend == "plain":
        raise UserError("training.precision is bf16, which training.backend plain has not: use deepspeed or fp32.")
    if config.deepspeed.get("zero_optimization", {}).get("stage", 3) == 0:
        raise UserError(
            "training.precision is bf16 and deepspeed.zero_optimization.stage 0, where DeepSpeed cannot accumulate "
            "gradients in float32: use stage 1 or more, or training.precision=fp32."
        )
