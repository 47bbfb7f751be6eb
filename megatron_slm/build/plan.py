"""The length of a run in steps, its resolved defaults, and its schedules as functions of the tokens trained."""

import dataclasses
import math

from megatron_slm.build.corpora import Corpora
from megatron_slm.config import Config
from megatron_slm.data.samples import tokens_per_epoch
from megatron_slm.errors import UserError
from megatron_slm.run_directory import RunDirectory
from megatron_slm.training.checkpoints import saved_steps
from megatron_slm.training.optimizer import learning_rate
from megatron_slm.training.settings import TrainingSettings
from megatron_slm.training.state import Plan

MIN_CONTEXT = 64
"""Largest default of `selection.min_context` with a store of kind `document`; measured in docs/benchmarks.md."""


def settle(config: Config, corpora: Corpora | None, device: str, *, reads_document_store: bool) -> tuple[Config, Plan]:
    """Return the configuration with every default resolved, and the length of the run in steps.

    Args:
        config: of the run.
        corpora: whose tokens an epoch counts; None if they do not exist yet.
        device: type of the device, `cpu` or `cuda`, which decides the default precision.
        reads_document_store: whether a reference is a store of kind `document`.

    Raises:
        UserError: the backend cannot train in `training.precision`, or an epoch cannot be counted.
    """
    training, data, selection = config.training, config.data, config.selection
    tokens = training.train_tokens or _tokens_of_epochs(config, corpora)
    tokens_per_step = training.global_batch_size * data.seq_length
    steps = math.ceil(tokens / tokens_per_step)
    plan = Plan(
        steps,
        training.global_batch_size,
        data.seq_length,
        training.log_interval,
        training.eval_interval,
        training.save_interval,
        config.candidates,
    )
    # Whole steps, so that a run of the planned length stays within one cycle of the order.
    order_tokens = data.order_tokens or steps * tokens_per_step * config.candidates
    precision = training.precision or ("bf16" if device == "cuda" else "fp32")
    min_context = selection.min_context
    if min_context is None:
        min_context = min(MIN_CONTEXT, data.seq_length // 4) if reads_document_store else 0
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(data, order_tokens=order_tokens),
        training=dataclasses.replace(training, precision=precision),
        selection=dataclasses.replace(selection, min_context=min_context),
    )
    _refuse_bf16_without_master_weights(config)
    return config, plan


def _tokens_of_epochs(config: Config, corpora: Corpora | None) -> int:
    if corpora is None:
        reason = "the corpora of data.train, whose tokens an epoch counts, do not exist yet"
        raise UserError("training.train_epochs", config.training.train_epochs, reason, "Set training.train_tokens")
    # An epoch reads every sample; of several candidates, one is trained on.
    epochs = (config.training.train_epochs or 0.0) / config.candidates
    return math.ceil(epochs * tokens_per_epoch(config.data, corpora.train, corpora.kept))


def learning_rate_at(training: TrainingSettings, plan: Plan, tokens: int) -> float:
    """Return the learning rate of the step that ends at `tokens`."""
    return learning_rate(
        tokens,
        train_tokens=plan.total_tokens,
        warmup_tokens=training.warmup_tokens,
        lr=training.lr,
        min_lr=training.min_lr,
        schedule=training.schedule,
    )


def schedule_warning(
    config: Config, plan: Plan, corpora: Corpora, directory: RunDirectory, device: str, rollback: int | None
) -> str | None:
    """Return a warning if the run resumes with another length than it had, which changes its schedules.

    Args:
        config, plan: resolved.
        corpora: of the run.
        directory: its run directory.
        device: type of the device, `cpu` or `cuda`.
        rollback: step of the checkpoint to resume from; None for the newest.
    """
    stored, steps = directory.stored(), saved_steps(directory.checkpoints)
    if stored is None or not steps:
        return None
    # The defaults of a stored configuration are resolved, so the kind of its store has no effect.
    before = settle(stored, corpora, device, reads_document_store=False)
    return _changed_schedules(before, (config, plan), steps[-1] if rollback is None else rollback)


def _changed_schedules(before: tuple[Config, Plan], now: tuple[Config, Plan], step: int) -> str | None:
    """Return the warning for a run that resumes after `step` steps; None if its schedules stay as they were."""
    (old, old_plan), (config, plan) = before, now
    if old_plan.total_steps == plan.total_steps or step == 0:
        return None
    tokens, changes = step * plan.tokens_per_step, []
    last = learning_rate_at(old.training, old_plan, tokens)
    planned = learning_rate_at(old.training, old_plan, tokens + plan.tokens_per_step)
    moved = learning_rate_at(config.training, plan, tokens + plan.tokens_per_step)
    if moved != planned:
        changes.append(
            f"the learning rate of step {step + 1} is {moved:.3g}; it would be {planned:.3g} by the "
            f"{config.training.schedule} schedule of the earlier length, and it was {last:.3g} in the last step"
        )
    start = config.selection.start
    if config.objective == "slm" and start:
        old_start, new_start = (start * one.total_tokens for one in (old_plan, plan))
        changes.append(f"selection.start is reached at token {new_start:,.0f} instead of {old_start:,.0f}")
    if not changes:
        return None
    return (
        f"the run has {plan.total_steps} steps instead of {old_plan.total_steps}: {'; '.join(changes)}. To keep the "
        "earlier schedule, export the run and start another one from the export."
    )


def _refuse_bf16_without_master_weights(config: Config) -> None:
    """Raise an error for bf16 without float32 weights and gradients, which only a partitioned optimizer keeps."""
    if config.training.precision != "bf16":
        return
    if config.training.backend == "plain":
        remedy = "Set training.backend=deepspeed, or training.precision=fp32"
        raise UserError("training.precision", "bf16", "training.backend=plain trains in fp32 only", remedy)
    if config.deepspeed.get("zero_optimization", {}).get("stage", 3) == 0:
        reason = "DeepSpeed cannot accumulate gradients in float32 at deepspeed.zero_optimization.stage=0"
        raise UserError("training.precision", "bf16", reason, "Use stage 1 or more, or training.precision=fp32")
