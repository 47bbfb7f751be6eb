"""What callbacks see of a run."""

from dataclasses import dataclass, field

from megatron_slm.errors import UserError


@dataclass(frozen=True)
class Plan:
    """The fixed figures of a run: its length and its intervals, in optimizer steps."""

    total_steps: int
    global_batch_size: int
    seq_length: int
    log_interval: int
    eval_interval: int
    save_interval: int

    @property
    def tokens_per_step(self) -> int:
        return self.global_batch_size * self.seq_length


@dataclass
class RunState:
    """Where the run stands. All of it, but the record, is in every checkpoint.

    step                      updates so far, the first is 1
    consumed_selected_tokens  tokens that counted, over all ranks
    skipped_updates           updates that were not applied; in_a_row: the latest ones
    order_fingerprint         of the order of samples; a checkpoint of another order is not resumed
    record                    this step's metrics, filled by the callbacks in their order; None if it is not logged
    """

    plan: Plan
    order_fingerprint: str = ""
    step: int = 0
    consumed_samples: int = 0
    consumed_selected_tokens: int = 0
    skipped_updates: int = 0
    skipped_in_a_row: int = 0
    record: dict[str, float | int | None] | None = field(default=None, repr=False)

    @property
    def consumed_tokens(self) -> int:
        return self.consumed_samples * self.plan.seq_length

    @property
    def is_last(self) -> bool:
        return self.step >= self.plan.total_steps

    def is_due(self, interval: int) -> bool:
        """What happens every `interval` steps, and after the last one, happens now."""
        return self.is_last or self.step % interval == 0

    @property
    def is_evaluated(self) -> bool:
        return self.is_due(self.plan.eval_interval)

    @property
    def is_logged(self) -> bool:
        return self.is_evaluated or self.is_due(self.plan.log_interval)

    @property
    def is_saved(self) -> bool:
        return self.is_due(self.plan.save_interval)

    def advance(self, selected_tokens: int, applied: bool) -> None:
        """Count one optimizer step."""
        self.step += 1
        self.consumed_samples += self.plan.global_batch_size
        self.consumed_selected_tokens += selected_tokens
        self.skipped_updates += not applied
        self.skipped_in_a_row = 0 if applied else self.skipped_in_a_row + 1

    def progress(self) -> dict[str, int | str]:
        """What a checkpoint keeps."""
        return {name: getattr(self, name) for name in PROGRESS}

    def restore(self, progress: dict[str, int | str]) -> None:
        """Go on from a checkpoint's progress.

        Raises:
            UserError: it was trained on another order of samples.
        """
        if progress["order_fingerprint"] != self.order_fingerprint:
            raise UserError(
                "The checkpoint was trained on another order of samples than data.train and seed give now: "
                "put them back, or use another run_dir."
            )
        for name in PROGRESS:
            setattr(self, name, progress[name])


PROGRESS = (
    "order_fingerprint",
    "step",
    "consumed_samples",
    "consumed_selected_tokens",
    "skipped_updates",
    "skipped_in_a_row",
)
