"""How far long work is: a bar on a terminal, a line now and then in a log."""

import logging
import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import TypeVar

from tqdm import tqdm

logger = logging.getLogger(__name__)

_LOG_SECONDS = 30.0
_FIRST_LOG_SECONDS = 5.0  # so that a wrong guess of how long it takes shows soon
T = TypeVar("T")


class Meter:
    """Shows how many of `total` units are done; a context.

    Args:
        total: 0: nobody knows.
        unit: of the count, in the plural.
        shown: by this process; one of several ranks speaks.
    """

    def __init__(self, total: int, unit: str, shown: bool = True) -> None:
        self._total = total
        self._unit = unit
        self._shown = shown
        self._bar = tqdm(total=total or None, unit=f" {unit}", unit_scale=True, disable=None if shown else True)
        self._start = time.monotonic()
        self._next_report = self._start + _FIRST_LOG_SECONDS

    def __enter__(self) -> "Meter":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._bar.close()

    def reach(self, done: int) -> None:
        """So many units are done since the beginning."""
        self._bar.update(done - self._bar.n)
        now = time.monotonic()
        if self._shown and self._bar.disable and now > self._next_report:
            self._next_report = now + _LOG_SECONDS
            seconds = (self._total - done) * (now - self._start) / max(done, 1)
            left = f" of {self._total:,}, {seconds:.0f} s left" if self._total else ""
            speed = done / (now - self._start)
            logger.info("%s: %s%s, %s a second", self._unit, f"{done:,}", left, f"{speed:,.0f}")


def reported(results: Iterable[tuple[T, int]], total: int, unit: str) -> Iterator[T]:
    """Pass results on; each comes with how many of ``total`` units are done with it (0: nobody knows the total)."""
    with Meter(total, unit) as meter:
        for result, done in results:
            meter.reach(done)
            yield result
