"""The activity of a rank: its step and phase, and the time of its last progress."""

import threading
import time
from enum import StrEnum
from typing import NamedTuple

from torch import nn


class Phase(StrEnum):
    """A part of a run; the value is its name in messages."""

    START = "start"
    INDEX = "index building"
    MODEL = "model construction"
    RESTORE = "checkpoint loading"
    DATA = "data"
    REFERENCE_FORWARD = "reference forward"
    STUDENT_FORWARD = "student forward"
    SELECTION = "selection"
    BACKWARD = "backward"
    OPTIMIZER = "optimizer"
    CALLBACKS = "callbacks"
    EVALUATION = "evaluation"
    CHECKPOINT = "checkpoint"
    END = "end"


OBSERVED = frozenset({Phase.START, Phase.INDEX, Phase.MODEL, Phase.RESTORE, Phase.CALLBACKS, Phase.CHECKPOINT})
"""Phases with long calls into libraries, which report nothing: processor time and input or output are progress."""


class Moment(NamedTuple):
    """The activity of a rank at one time.

    step     the step that it works on; 0 before the first one of this start
    phase    the phase that it is in
    entered  phases entered since the step began. All ranks enter the same ones, so this orders ranks within a step.
    done     pieces of work since the start: phases, forwards, files
    at       `time.monotonic()` of the last progress
    """

    step: int
    phase: Phase
    entered: int
    done: int
    at: float


class Activity:
    """The activity of this rank, which the training loop reports and a heartbeat reads.

    A report takes no lock: it replaces one tuple, which the thread of the heartbeat reads whole. If no heartbeat reads
    it, nothing else happens.

    Attributes:
        moment: the newest report.
        thread: identifier of the thread that trains, which created this object.
    """

    def __init__(self) -> None:
        self.thread = threading.get_ident()
        self.moment = Moment(0, Phase.START, 0, 0, time.monotonic())

    def begin_step(self, step: int) -> None:
        """Report the beginning of a step, which reads its data."""
        self.moment = Moment(step, Phase.DATA, 0, self.moment.done + 1, time.monotonic())

    def enter(self, phase: Phase) -> None:
        """Report that this rank enters a phase; every rank calls it in the same order."""
        now = self.moment
        self.moment = Moment(now.step, phase, now.entered + 1, now.done + 1, time.monotonic())

    def advance(self) -> None:
        """Report progress within a phase; ranks may differ in how often they call it."""
        now = self.moment
        self.moment = now._replace(done=now.done + 1, at=time.monotonic())

    def follow(self, module: nn.Module) -> None:
        """Report progress after each forward of a model."""
        module.register_forward_hook(lambda *_: self.advance())
