"""The heartbeat of a rank: a thread that reports its activity, writes its stacks when it stalls, and hears the others.

Two ranks are monitors: rank 0, and the first rank of another host, which speaks if rank 0 is silent. A monitor reports
a run that makes no progress, and answers a rank whose collective operation failed with the ranks that are lost.
"""

import dataclasses
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from megatron_slm.dist import World, is_collective_failure
from megatron_slm.errors import LostRanksError, first_line
from megatron_slm.liveness.activity import OBSERVED, Activity, Phase
from megatron_slm.liveness.monitor import ROLL_CALL_SECONDS, Monitor, RollCall, second_monitor
from megatron_slm.liveness.stacks import all_stacks, place
from megatron_slm.liveness.verdict import FINISHED
from megatron_slm.liveness.wire import Beat, Message, Wire, open_wire

BEAT_SECONDS = 5.0
"""Seconds between heartbeats, at most."""
BEATS_PER_HANG = 5
"""Heartbeats within `hang_seconds`, at least."""
TICK_SECONDS = 0.5
"""Seconds after which the thread looks for new work, at most."""
ANSWER_SECONDS = 3.0 * ROLL_CALL_SECONDS
"""Seconds for which a rank whose collective operation failed waits for the answer of a monitor."""
BUSY_SHARE = 0.1
BUSY_BYTES = 1024**2
"""In the phases `OBSERVED`, progress is this share of a processor, or this input and output, between two heartbeats."""

logger = logging.getLogger(__name__)


class Heartbeat:
    """The thread of one rank, from `start` to `end`.

    Args:
        activity: of this rank.
        rank: of this process.
        hosts: the host of each rank.
        wire: to the other ranks; None for one process.
        hang_seconds: see `Monitor`.
    """

    def __init__(self, activity: Activity, rank: int, hosts: list[str], wire: Wire | None, hang_seconds: float) -> None:
        self._activity = activity
        self._rank = rank
        self._hosts = hosts
        self._wire = wire
        self._hang_seconds = hang_seconds
        self._beat_seconds = min(BEAT_SECONDS, hang_seconds / BEATS_PER_HANG or BEAT_SECONDS)
        self._monitors = sorted({0, second_monitor(hosts)})
        self._monitor = Monitor(rank, hosts, hang_seconds, self._beat_seconds, time.monotonic())
        self._work = ObservedWork(activity.thread)
        self._stalled_at: int | None = None
        self._failing = False
        self._ended = threading.Event()
        self._answer: str | None = None
        self._answered = threading.Event()
        self._roll_call = RollCall()

    def start(self) -> None:
        """Start the thread, which ends with the process at the latest."""
        threading.Thread(target=self._run, name="heartbeat", daemon=True).start()

    def end(self, reason: str) -> None:
        """Tell the monitors why this rank ends, and stop the thread."""
        ended = dataclasses.replace(self._beat(), ended=reason[:500] or "an error")
        for _ in range(2 if self._wire is not None else 0):  # a datagram may be lost
            for monitor in self._monitors:
                self._send(monitor, Message("beat", self._rank, beat=ended))
        self._ended.set()
        if self._monitor.hangs and self._activity.moment.phase == Phase.END:  # faster than the monitor's next look
            logger.error("The run makes progress again, and has finished.")

    def explain(self) -> str:
        """Return why a collective operation failed on this rank; "" if the monitors do not know.

        It waits for their answer.
        """
        if self._wire is None:
            return ""
        self._failing = True
        self._answered.wait(ANSWER_SECONDS)
        if self._answer is not None:
            return self._answer
        others = [f"rank {rank} on host {self._hosts[rank]}" for rank in self._monitors if rank != self._rank]
        return f"no answer came from {' and '.join(others)}" if others else ""

    def _run(self) -> None:
        beat_at = ask_at = time.monotonic()
        while not self._ended.is_set():
            now = time.monotonic()
            if now >= beat_at:
                beat_at = now + self._beat_seconds
                self._report(now)
            if self._failing and not self._answered.is_set() and now >= ask_at:
                ask_at = now + TICK_SECONDS
                self._ask()
            self._call_and_answer(now)
            wait = min(TICK_SECONDS, max(0.0, beat_at - now))
            message = self._wire.receive(wait) if self._wire is not None else None
            if self._wire is None:
                self._ended.wait(wait)
            elif message is not None:
                self._take(message, time.monotonic())
        if self._wire is not None:
            self._wire.close()

    def _report(self, now: float) -> None:
        """Send a heartbeat to the monitors, write the stacks of a stall, and report a hang."""
        if self._activity.moment.phase in OBSERVED:
            self._work.observe(self._activity)
        beat = self._beat()
        self._write_stacks(beat)
        for monitor in self._monitors:
            self._send(monitor, Message("beat", self._rank, beat=beat))
        if self._rank in self._monitors and (sentence := self._monitor.judge(now)):
            # As an error, because the terminal shows only errors of ranks other than 0.
            logger.error("%s", sentence[:1].upper() + sentence[1:])

    def _beat(self) -> Beat:
        now, clock = self._activity.moment, time.monotonic()
        idle = max(0.0, clock - now.at)
        stands, waits = place(self._activity.thread) if idle > self._beat_seconds else ("", False)
        return Beat(
            rank=self._rank,
            host=self._hosts[self._rank],
            step=now.step,
            phase=now.phase,
            entered=now.entered,
            done=now.done,
            idle=round(idle, 2),
            place=stands[:500],
            waits=waits,
            failing=self._failing,
        )

    def _write_stacks(self, beat: Beat) -> None:
        """Log the stacks of all threads, once per stall."""
        if not self._hang_seconds or beat.idle < self._hang_seconds or self._stalled_at == beat.done:
            return
        self._stalled_at = beat.done
        # For the rank's log file; before that is open, for the terminal.
        level = logging.DEBUG if logger.isEnabledFor(logging.DEBUG) else logging.WARNING
        text = "rank %d made no progress for %.0f s, in phase %s of step %d. The stacks of its threads:\n%s"
        logger.log(level, text, self._rank, beat.idle, beat.phase, beat.step, all_stacks())

    def _ask(self) -> None:
        failing = Message("beat", self._rank, beat=self._beat())
        for monitor in self._monitors:
            self._send(monitor, failing)
            self._send(monitor, Message("ask", self._rank))

    def _take(self, message: Message, now: float) -> None:
        if message.beat is not None and message.beat.rank == message.sender:
            self._monitor.hear(message.beat, now)
        if message.kind == "call":
            self._send(message.sender, Message("beat", self._rank, beat=self._beat()))
        elif message.kind == "ask":
            self._roll_call.begin(now)
        elif message.kind == "answer":
            self._answer = message.sentence
            self._answered.set()

    def _call_and_answer(self, now: float) -> None:
        """Carry on with the roll call of a monitor, if there is one."""
        if self._roll_call.is_call_due(now):
            for rank in self._monitor.absent(self._roll_call.began):
                self._send(rank, Message("call", self._rank))
        if self._roll_call.is_answer_due(now, bool(self._monitor.absent(self._roll_call.began))):
            sentence = self._monitor.explain(self._roll_call.began, now)
            # To all ranks: one that fails later may find that the monitors have ended because of the same loss.
            # To this rank last, because it may end as soon as it has the answer.
            for rank in sorted(range(len(self._hosts)), key=lambda rank: rank == self._rank):
                self._send(rank, Message("answer", self._rank, sentence=sentence[:4000]))
            self._roll_call.end()

    def _send(self, rank: int, message: Message) -> None:
        if rank == self._rank:
            self._take(message, time.monotonic())  # also if the link of this host is down
        elif self._wire is not None:
            self._wire.send(rank, message)


class ObservedWork:
    """The processor time of a thread, and the input and output of this process, which are progress in some phases.

    Args:
        thread: identifier of the thread.
    """

    def __init__(self, thread: int) -> None:
        self._thread = thread
        self._before = (time.monotonic(), self._processor_seconds(), storage_bytes())

    def observe(self, activity: Activity) -> None:
        """Report progress if there was work since the last call, and the thread does not wait for another rank."""
        before, self._before = self._before, (time.monotonic(), self._processor_seconds(), storage_bytes())
        elapsed, processor, storage = (new - old for new, old in zip(self._before, before, strict=True))
        # A thread that waits in a collective operation of a GPU uses a whole processor.
        if (processor > BUSY_SHARE * elapsed or storage >= BUSY_BYTES) and not place(self._thread)[1]:
            activity.advance()

    def _processor_seconds(self) -> float:
        clock: Callable[[int], int] | None = getattr(time, "pthread_getcpuclockid", None)
        with suppress(OSError):
            return time.clock_gettime(clock(self._thread)) if clock is not None else 0.0
        return 0.0


def storage_bytes() -> int:
    """Return the bytes that this process read from and wrote to storage; 0 if the system does not tell."""
    with suppress(OSError, ValueError, KeyError):
        lines = Path("/proc/self/io").read_text().splitlines()
        counts = {name: int(count) for name, _, count in (line.partition(": ") for line in lines)}
        return counts["read_bytes"] + counts["write_bytes"]
    return 0


@contextmanager
def watched(activity: Activity, world: World, hang_seconds: float) -> Iterator[None]:
    """Send heartbeats inside the context; every rank enters it.

    Args:
        activity: of this rank, created by the thread that trains.
        world: this rank.
        hang_seconds: seconds without progress after which the run is reported to hang; 0 to report none.

    Raises:
        LostRanksError: a collective operation failed because other ranks are lost, or did not come to it.
    """
    wire, hosts = open_wire(world)
    heartbeat = Heartbeat(activity, world.rank, hosts, wire, hang_seconds)
    heartbeat.start()
    reason = FINISHED
    try:
        yield
        activity.enter(Phase.END)
    except BaseException as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        if not is_collective_failure(error):
            raise
        with _ignoring_sigterm():
            sentence = heartbeat.explain()
        reason = FINISHED  # another rank is the cause
        if not sentence:
            raise
        logger.debug("a collective operation failed", exc_info=True)
        raise LostRanksError(sentence) from error
    finally:
        heartbeat.end(reason)


@contextmanager
def _ignoring_sigterm() -> Iterator[None]:
    """Ignore SIGTERM: launchers send it as soon as one rank has ended, before the others have found out which."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    former = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)
