"""The state of a run, as callbacks see it, and the requests to save or stop that arrive as signals."""

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from megatron_slm.errors import UserError


@dataclass(frozen=True)
class Plan:
    """The length, batch size and intervals of a run. Intervals are in optimizer steps."""

    total_steps: int
    global_batch_size: int
    seq_length: int
    log_interval: int
    eval_interval: int
    save_interval: int
    candidates: int = 1

    @property
    def tokens_per_step(self) -> int:
        """Tokens that a step trains on, over all ranks."""
        return self.global_batch_size * self.seq_length

    @property
    def samples_per_step(self) -> int:
        """Samples that a step reads, over all ranks: candidates, of which some are trained on."""
        return self.global_batch_size * self.candidates

    @property
    def total_tokens(self) -> int:
        """Tokens that the run trains on, over all ranks."""
        return self.total_steps * self.tokens_per_step

    @property
    def total_samples(self) -> int:
        """Samples that the run reads, over all ranks."""
        return self.total_steps * self.samples_per_step


@dataclass(frozen=True)
class Requested:
    """Requests from outside the run: to save, or to save and stop, at the end of the step."""

    save: bool = False
    stop: bool = False


NO_REQUEST = Requested()


@dataclass
class RunState:
    """The progress of a run. Checkpoints hold the fields in `PROGRESS`; all others but the plan are of this step alone.

    step                      number of updates so far; the first step is 1
    consumed_samples          samples read over all ranks, including candidates
    next_sample               position in the order of samples, including skipped samples
    consumed_selected_tokens  selected tokens, over all ranks
    skipped_updates           updates that were not applied; skipped_in_a_row: since the last one that was
    failed_saves              checkpoints that could not be written
    order_fingerprint         fingerprint of the order of samples; a checkpoint of another order cannot be resumed
    carried                   what callbacks need to resume, by their names, in types that JSON can hold
    first_sample              position in the order of samples at which this step began
    step_seconds              duration of this step without its callbacks
    requested                 requests made during this step; the same on all ranks
    record                    metrics of this step, filled by the callbacks in any order; None if it is not logged
    """

    plan: Plan
    order_fingerprint: str = ""
    step: int = 0
    consumed_samples: int = 0
    next_sample: int = 0
    consumed_selected_tokens: int = 0
    skipped_updates: int = 0
    skipped_in_a_row: int = 0
    failed_saves: int = 0
    carried: dict[str, Any] = field(default_factory=dict)
    first_sample: int = field(default=0, compare=False)
    step_seconds: float = field(default=0.0, compare=False)
    requested: Requested = field(default=NO_REQUEST, compare=False)
    record: dict[str, float | int | None] | None = field(default=None, repr=False)

    @property
    def consumed_tokens(self) -> int:
        return self.consumed_samples * self.plan.seq_length

    @property
    def trained_tokens(self) -> int:
        """Tokens in batches with a backward, over all ranks. Schedules and the length of the run depend on it."""
        return self.step * self.plan.tokens_per_step

    @property
    def is_last(self) -> bool:
        return self.step >= self.plan.total_steps

    def is_due(self, interval: int) -> bool:
        """Return whether an action is due that runs every `interval` steps and after the last step."""
        return self.is_last or self.step % interval == 0

    @property
    def is_over(self) -> bool:
        """True after the last step of the plan, or after a request to stop."""
        return self.is_last or self.requested.stop

    @property
    def is_evaluated(self) -> bool:
        return self.is_due(self.plan.eval_interval)

    @property
    def is_logged(self) -> bool:
        return self.is_evaluated or self.is_due(self.plan.log_interval)

    @property
    def is_saved(self) -> bool:
        return self.requested.stop or self.requested.save or self.is_due(self.plan.save_interval)

    def advance(self, next_sample: int, selected_tokens: int, applied: bool, requested: Requested = NO_REQUEST) -> None:
        """Count one optimizer step, which read the order of samples up to `next_sample`."""
        self.step += 1
        self.consumed_samples += self.plan.samples_per_step
        self.first_sample, self.next_sample = self.next_sample, next_sample
        self.consumed_selected_tokens += selected_tokens
        self.skipped_updates += not applied
        self.skipped_in_a_row = 0 if applied else self.skipped_in_a_row + 1
        self.requested = requested

    def progress(self) -> dict[str, Any]:
        """Return the fields that a checkpoint holds."""
        return {name: getattr(self, name) for name in PROGRESS}

    def restore(self, progress: dict[str, Any]) -> None:
        """Resume from the progress in a checkpoint.

        Raises:
            UserError: the checkpoint was trained with another order of samples.
        """
        if progress["order_fingerprint"] != self.order_fingerprint:
            raise UserError(
                "checkpoint",
                "of another order of samples",
                "data.train, seed and the other settings of the order must not change during a run",
                "Restore them, or use another run_dir",
            )
        # Checkpoints of earlier versions lack these entries; their runs skipped nothing.
        progress = {"next_sample": progress["consumed_samples"], "failed_saves": 0, "carried": {}} | progress
        for name in PROGRESS:
            setattr(self, name, progress[name])


PROGRESS = (
    "order_fingerprint",
    "step",
    "consumed_samples",
    "next_sample",
    "consumed_selected_tokens",
    "skipped_updates",
    "skipped_in_a_row",
    "failed_saves",
    "carried",
)


SAVE = signal.SIGUSR1
STOP = (signal.SIGUSR2, signal.SIGTERM)
ECHO_SECONDS = 5.0
"""Seconds within which two SIGTERM are one request: the scheduler sends one, and the launcher may forward another."""


class Requests:
    """The signals that this rank received. The handler only records them; the step makes them known to all ranks."""

    def __init__(self) -> None:
        self._save = False
        self._stop = False
        self._terminated_at: float | None = None

    def collect(self) -> Requested:
        """Return the requests of this rank: to save, since the last call, and to stop, since the start."""
        requested = Requested(self._save, self._stop)
        # Not unconditionally: a signal may arrive between these two lines, and its request must not be lost.
        if requested.save:
            self._save = False
        return requested

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the signals inside the context, and restore the former handlers afterwards."""
        if threading.current_thread() is not threading.main_thread():
            yield  # Python delivers signals only to the main thread
            return
        former = {number: signal.signal(number, self._note) for number in (SAVE, *STOP)}
        logging.getLogger(__name__).info(
            "process %d on %s: SIGUSR1 saves, SIGUSR2 or SIGTERM saves and stops", os.getpid(), socket.gethostname()
        )
        try:
            yield
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == SAVE:
            self._save = True
            return
        self._stop = True
        if number == signal.SIGTERM:
            now = time.monotonic()
            if self._terminated_at is not None and now - self._terminated_at > ECHO_SECONDS:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                os.kill(os.getpid(), signal.SIGTERM)
            self._terminated_at = self._terminated_at or now
