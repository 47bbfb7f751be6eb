"""Monitors: ranks that hear the heartbeats of all, report a hang, and find out which ranks are lost."""

from megatron_slm.liveness.verdict import Heard, hang_sentence, lost_sentence, still_seconds
from megatron_slm.liveness.wire import Beat

SILENT_BEATS = 4
"""A rank is silent when this number of its heartbeats is missing."""
ROLL_CALL_SECONDS = 2.0
"""Seconds within which a rank must answer a monitor's call; it calls twice, because a datagram may be lost."""


def second_monitor(hosts: list[str]) -> int:
    """Return the rank of the second monitor: the first of another host than that of rank 0; rank 1 if there is none."""
    return next((rank for rank, host in enumerate(hosts) if host != hosts[0]), min(1, len(hosts) - 1))


class Monitor:
    """The heartbeats of all ranks, and what they tell.

    Args:
        rank: the rank of this monitor.
        hosts: the host of each rank.
        hang_seconds: seconds without progress after which a run hangs; 0 to report none.
        beat_seconds: seconds between heartbeats.
        now: time on a clock that never goes back, in seconds, as in all methods.

    Attributes:
        hangs: True after a report of a hang, until the run makes progress again.
    """

    def __init__(self, rank: int, hosts: list[str], hang_seconds: float, beat_seconds: float, now: float) -> None:
        self._rank = rank
        self._host = hosts[rank]
        self._hang_seconds = hang_seconds
        self._silent_seconds = SILENT_BEATS * beat_seconds
        self._last = {other: (Beat(other, host), now) for other, host in enumerate(hosts)}
        self.hangs = False
        self._looked = now

    def hear(self, beat: Beat, now: float) -> None:
        """Take the heartbeat of a rank."""
        if beat.rank in self._last and not self._last[beat.rank][0].ended:
            self._last[beat.rank] = beat, now

    def judge(self, now: float) -> str | None:
        """Return a sentence if the run began to hang, or makes progress again, since the last call."""
        late, self._looked = now - self._looked > self._silent_seconds, now
        if late:
            # This process was stopped itself: the heartbeats that it missed are not missing.
            self._last = {rank: (beat, now) for rank, (beat, _) in self._last.items()}
        heard = self._heard(now)
        if not any(one.is_running for one in heard):
            return None
        still = still_seconds(heard)
        if self.hangs and still < self._hang_seconds:
            self.hangs = False
            return f"the run makes progress again, in step {max(one.beat.step for one in heard)}."
        if self.hangs or late or not self._hang_seconds or still < self._hang_seconds:
            return None
        if self._rank != 0 and heard[0].is_running and heard[0].age <= self._silent_seconds:
            return None  # rank 0 reports it
        self.hangs = True
        return hang_sentence(heard, self._silent_seconds)

    def absent(self, since: float) -> list[int]:
        """Return the running ranks that sent no heartbeat since a time."""
        return [rank for rank, (beat, at) in self._last.items() if at < since and not beat.ended]

    def explain(self, since: float, now: float) -> str:
        """Return which ranks are lost or absent from a collective operation, after a call at the time `since`."""
        return lost_sentence(self._heard(now), self.absent(since), self._host)

    def _heard(self, now: float) -> list[Heard]:
        return [Heard(beat, now - at) for _, (beat, at) in sorted(self._last.items())]


class RollCall:
    """The calls of a monitor to all ranks, after ranks asked which of them are lost.

    Attributes:
        began: the time of the first call.
    """

    def __init__(self) -> None:
        self.began = 0.0
        self._is_open = False
        self._calls = 0

    def begin(self, now: float) -> None:
        """Begin a roll call, unless one is under way."""
        if not self._is_open:
            self._is_open, self.began, self._calls = True, now, 0

    def is_call_due(self, now: float) -> bool:
        """Return whether to call the ranks now: at the beginning, and once again."""
        due = self._is_open and self._calls < 2 and now >= self.began + self._calls * ROLL_CALL_SECONDS / 2
        self._calls += due
        return due

    def is_answer_due(self, now: float, is_incomplete: bool) -> bool:
        """Return whether to answer: when all ranks have answered, or their time is over."""
        # A rank that ends because of an error needs a moment to report it.
        seconds = ROLL_CALL_SECONDS if is_incomplete else ROLL_CALL_SECONDS / 2
        return self._is_open and now >= self.began + seconds

    def end(self) -> None:
        """End the roll call; the next question begins another."""
        self._is_open = False
