"""What the configuration leaves open, as values; the length of the run in steps."""

import dataclasses
import math

from megatron_slm.build.corpora import Corpora
from megatron_slm.build.stores import reads_document_store
from megatron_slm.config import Config
from megatron_slm.data.samples import tokens_per_epoch
from megatron_slm.dist import World
from megatron_slm.errors import UserError
from megatron_slm.training.optimizer import learning_rate
from megatron_slm.training.state import Plan

MIN_CONTEXT = 64
"""Largest default of `selection.min_context` with a store of kind `document`; docs/score.md has the measurement."""


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
    selection = config.selection
    if selection.min_context is None:
        least = min(MIN_CONTEXT, data.seq_length // 4) if reads_document_store(config) else 0
        selection = dataclasses.replace(selection, min_context=least)
    config = dataclasses.replace(config, data=data, training=training, selection=selection)
    _refuse_bf16_alone(config)
    return config, plan


def learning_rate_at(config: Config, plan: Plan, tokens: int) -> float:
    """Return the learning rate of the step that ends at `tokens`."""
    training = config.training
    return learning_rate(
        tokens,
        train_tokens=plan.total_steps * plan.tokens_per_step,
        warmup_tokens=training.warmup_tokens,
        lr=training.lr,
        min_lr=training.min_lr,
        schedule=training.schedule,
    )


def schedule_changes(before: tuple[Config, Plan], now: tuple[Config, Plan], step: int) -> list[str]:
    """Return a sentence for each schedule that another length of the run moves, at the step where the run resumes.

    Args:
        before: configuration and plan of the run so far.
        now: those to resume with.
        step: steps trained so far.
    """
    (_, old), (config, new) = before, now
    tokens, sentences = step * new.tokens_per_step, []
    if old.total_steps == new.total_steps or step == 0:
        return []
    last, following = learning_rate_at(*before, tokens), tokens + new.tokens_per_step
    planned, moved = (learning_rate_at(*run, following) for run in (before, now))
    if moved != planned:
        sentences.append(
            f"the learning rate of step {step + 1} is {moved:.3g}; by the {config.training.schedule} schedule of the "
            f"earlier length it is {planned:.3g}, and the last step had {last:.3g}"
        )
    if config.objective == "slm" and config.selection.start:
        first, moved_to = (config.selection.start * plan.total_steps * plan.tokens_per_step for plan in (old, new))
        sentences.append(f"selection.start is reached at token {moved_to:,.0f} instead of {first:,.0f}")
    return sentences


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
