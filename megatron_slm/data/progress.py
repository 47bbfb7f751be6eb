"""How far long work is: a bar on a terminal, a line now and then in a log."""

import logging
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

logger = logging.getLogger(__name__)

_LOG_SECONDS = 30.0
T = TypeVar("T")


def reported(results: Iterable[tuple[T, int]], total: int, unit: str) -> Iterator[T]:
    """Pass results on; each comes with how many of ``total`` units are done with it (0: nobody knows the total)."""
    start = reported_at = time.monotonic()
    before = 0
    with tqdm(total=total or None, unit=f" {unit}", unit_scale=True, disable=None) as bar:
        for result, done in results:
            bar.update(done - before)
            before = done
            if bar.disable and time.monotonic() - reported_at > _LOG_SECONDS:
                reported_at = time.monotonic()
                seconds = (total - done) * (reported_at - start) / max(done, 1)
                left = f" of {total / 1e6:.0f}, {seconds:.0f} s left" if total else ""
                logger.info("%s: %.0f million%s", unit, done / 1e6, left)
            yield result
