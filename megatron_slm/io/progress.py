"""Progress of long work: a bar on a terminal, or periodic lines in a log."""

import logging
import time
from collections.abc import Callable, Sequence
from types import TracebackType

from tqdm import tqdm

logger = logging.getLogger(__name__)

LOG_SECONDS = 30.0
_FIRST_LOG_SECONDS = 5.0  # early, so that the user soon sees an unexpected duration
_PRIOR_SECONDS = 30.0  # after this time, the measured pace weighs as much as the expected durations


class Meter:
    """A context manager that shows how many of `total` units are done.

    Args:
        total: number of units; 0 if unknown.
        unit: name of the units, in the plural.
        shown: False on ranks that show nothing.
    """

    def __init__(self, total: int, unit: str, shown: bool = True) -> None:
        self._total = total
        self._unit = unit
        self._shown = shown
        self._bar = tqdm(total=total or None, unit=f" {unit}", unit_scale=True, disable=None if shown else True)
        self._start = time.monotonic()
        self._next_log = self._start + _FIRST_LOG_SECONDS

    def __enter__(self) -> "Meter":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._bar.close()

    def after(self, before: int) -> Callable[[int], None]:
        """Return a function like `reach` for a part of the work that begins after `before` units."""
        return lambda done: self.reach(before + done)

    def reach(self, done: int) -> None:
        """Show that `done` units are done since the beginning."""
        self._bar.update(done - self._bar.n)
        now = time.monotonic()
        if self._shown and self._bar.disable and now > self._next_log:
            self._next_log = now + LOG_SECONDS
            seconds = (self._total - done) * (now - self._start) / max(done, 1)
            left = f" of {self._total:,}, {seconds:.0f} s left" if self._total else ""
            speed = done / (now - self._start)
            logger.info("%s: %s%s, %s per second", self._unit, f"{done:,}", left, f"{speed:,.0f}")


class StageMeter:
    """The progress of a chain of stages, each with an expected duration.

    Args:
        expected: seconds that each stage, in order, takes on two idle cores; 0 for stages that are already finished.
    """

    def __init__(self, expected: Sequence[float]) -> None:
        self._expected = expected
        self._number = 0
        self._title = ""
        self._started = self._logged = time.monotonic()
        self._bar = tqdm(
            total=sum(expected), disable=None, bar_format="{desc}: {percentage:.0f} %|{bar}| {elapsed}{postfix}"
        )

    def begin(self, number: int, title: str) -> None:
        """Show that stage `number`, counted from 0, has started."""
        self._number, self._title = number, title
        self._bar.set_description_str(f"stage {number + 1} of {len(self._expected)}, {title}")
        self.update(0.0)
        self._log(0.0)

    def update(self, share: float) -> None:
        """Show that `share` of the current stage is done, from 0 to 1."""
        self._bar.n = self._done(share)
        self._bar.set_postfix_str(f"about {self._left(share)} left")
        if time.monotonic() - self._logged > LOG_SECONDS:
            self._log(share)

    def close(self) -> None:
        """Restore the terminal."""
        self._bar.close()

    def _done(self, share: float) -> float:
        """Return the expected duration of the finished work, in seconds."""
        return sum(self._expected[: self._number]) + min(share, 1.0) * self._expected[self._number]

    def _left(self, share: float) -> str:
        done, passed = self._done(share), time.monotonic() - self._started
        seconds = (sum(self._expected) - done) * (passed + _PRIOR_SECONDS) / (done + _PRIOR_SECONDS)
        return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"

    def _log(self, share: float) -> None:
        self._logged = time.monotonic()
        if self._bar.disable:  # no terminal
            place = f"stage {self._number + 1} of {len(self._expected)}"
            logger.info("%s, %s: %.0f %%, about %s left", place, self._title, 100 * share, self._left(share))
