"""How far a chain of stages is: a bar on a terminal, a line now and then elsewhere."""

import logging
import time

from tqdm import tqdm

logger = logging.getLogger(__name__)

LOG_SECONDS = 30.0
PRIOR_SECONDS = 30.0
"""How long the expected times are believed more than the pace so far."""


class Progress:
    """Args:
    expected: seconds that each stage, in order, takes on two quiet cores; 0 for those that are finished already.
    """

    def __init__(self, expected: list[float]) -> None:
        self._expected = expected
        self._number = 0
        self._title = ""
        self._started = self._logged = time.monotonic()
        self._bar = tqdm(
            total=sum(expected), disable=None, bar_format="{desc}: {percentage:.0f} %|{bar}| {elapsed}{postfix}"
        )

    def begin(self, number: int, title: str) -> None:
        """Stage `number`, counted from 0, starts."""
        self._number, self._title = number, title
        self._bar.set_description_str(f"stage {number + 1} of {len(self._expected)}, {title}")
        self.update(0.0)
        self._log(0.0)

    def update(self, share: float) -> None:
        """`share` of the stage that runs is done, from 0 to 1."""
        self._bar.n = self._done(share)
        self._bar.set_postfix_str(f"about {self._left(share)} left")
        if time.monotonic() - self._logged > LOG_SECONDS:
            self._log(share)

    def close(self) -> None:
        """Leave the terminal as it was found."""
        self._bar.close()

    def _done(self, share: float) -> float:
        return sum(self._expected[: self._number]) + min(share, 1.0) * self._expected[self._number]

    def _left(self, share: float) -> str:
        done, passed = self._done(share), time.monotonic() - self._started
        seconds = (sum(self._expected) - done) * (passed + PRIOR_SECONDS) / (done + PRIOR_SECONDS)
        return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"

    def _log(self, share: float) -> None:
        """A terminal has its bar."""
        self._logged = time.monotonic()
        if self._bar.disable:
            place = f"stage {self._number + 1} of {len(self._expected)}"
            logger.info("%s, %s: %.0f %%, about %s left", place, self._title, 100 * share, self._left(share))
