"""The sentences about a run that stands still, from made-up heartbeats, and the thread of one process."""

import logging
import threading
import time
from collections.abc import Iterator

import pytest

from megatron_slm.liveness.activity import Activity, Phase
from megatron_slm.liveness.heartbeat import Heartbeat, ObservedWork
from megatron_slm.liveness.monitor import Monitor, second_monitor
from megatron_slm.liveness.stacks import place
from megatron_slm.liveness.verdict import Heard, hang_sentence, lost_sentence
from megatron_slm.liveness.wire import Beat

HOSTS = ["a", "a", "b", "b"]
SILENT = 20.0
ORDER = list(Phase)


def heard(rank: int, phase: Phase, step: int = 12, idle: float = 300.0, age: float = 1.0, **changes: object) -> Heard:
    beat = Beat(rank=rank, host=HOSTS[rank], step=step, phase=phase, entered=ORDER.index(phase), idle=idle, **changes)  # type: ignore[arg-type]
    return Heard(beat, age)


def waiting(rank: int, phase: Phase = Phase.OPTIMIZER, **changes: object) -> Heard:
    return heard(rank, phase, place="step.py:190 in _agree", waits=True, **changes)  # type: ignore[arg-type]


def blamed(sentence: str) -> str:
    """Return the first part of a sentence, which names the ranks at fault."""
    return sentence.partition(": ")[2].partition(";")[0]


def test_the_rank_behind_is_named_with_host_phase_time_and_place() -> None:
    ranks = [waiting(0), waiting(1), waiting(2), heard(3, Phase.DATA, idle=301.0, place="loader.py:118 in read")]
    sentence = hang_sentence(ranks, SILENT)
    assert sentence == (
        "no progress for 301 s: "
        "rank 3 on host b is behind: in phase data of step 12 for 302 s, at loader.py:118 in read; "
        "ranks 0-1 on host a wait in phase optimizer of step 12 at step.py:190 in _agree; "
        "rank 2 on host b waits in phase optimizer of step 12 at step.py:190 in _agree."
    )


def test_ranks_that_stand_in_an_earlier_step_are_behind() -> None:
    ranks = [waiting(0), waiting(1), heard(2, Phase.CHECKPOINT, step=11), heard(3, Phase.CHECKPOINT, step=11)]
    assert "ranks 2-3 on host b" in blamed(hang_sentence(ranks, SILENT))


def test_a_minority_ahead_of_ranks_that_wait_in_a_collective_left_one_out() -> None:
    ranks = [waiting(0), waiting(1), waiting(2), heard(3, Phase.DATA, step=13)]
    told = blamed(hang_sentence(ranks, SILENT))
    assert "rank 3 on host b" in told and "step 13" in told and "ahead" in told


@pytest.mark.parametrize(("waits", "culprit"), [(True, "rank 1 on host a"), (False, "rank 0 on host a")])
def test_of_two_ranks_the_one_outside_of_collectives_is_blamed(waits: bool, culprit: str) -> None:
    ranks = [heard(0, Phase.BACKWARD, waits=waits), heard(1, Phase.DATA, step=13)]
    assert blamed(hang_sentence(ranks, SILENT)).startswith(culprit)


def test_most_ranks_behind_in_a_data_read_are_behind() -> None:
    ranks = [heard(0, Phase.DATA), heard(1, Phase.DATA), heard(2, Phase.DATA), waiting(3)]
    assert "ranks 0-1 on host a and rank 2 on host b" in blamed(hang_sentence(ranks, SILENT))


def test_in_one_phase_the_rank_that_does_not_wait_as_the_others_is_named() -> None:
    ranks = [waiting(0), waiting(1), heard(2, Phase.OPTIMIZER, place="model.py:7 in forward"), waiting(3)]
    assert "rank 2 on host b" in blamed(hang_sentence(ranks, SILENT))
    assert "all ranks" in hang_sentence([waiting(rank) for rank in range(4)], SILENT)


def test_silent_ranks_are_named_with_their_last_phase_and_age() -> None:
    ranks = [waiting(0), waiting(1), waiting(2), heard(3, Phase.BACKWARD, age=41.0)]
    told = blamed(hang_sentence(ranks, SILENT))
    assert told == "rank 3 on host b has been silent for 41 s"
    assert "it was last heard in phase backward of step 12" in hang_sentence(ranks, SILENT)


def test_a_rank_that_ended_with_an_error_is_named_and_one_that_finished_is_not() -> None:
    ranks = [
        waiting(0),
        waiting(1),
        heard(2, Phase.DATA, ended="ValueError: bad"),
        heard(3, Phase.END, ended="finished"),
    ]
    told = hang_sentence(ranks, SILENT)
    assert "rank 2 on host b ended in phase data of step 12: ValueError: bad" in told
    assert "rank 3" not in told


def test_lost_ranks_are_those_that_do_not_answer_and_have_not_ended() -> None:
    ranks = [waiting(0, failing=True), waiting(1, ended="finished"), heard(2, Phase.BACKWARD), heard(3, Phase.BACKWARD)]
    told = lost_sentence(ranks, absent=[1, 2, 3], own_host="a")
    assert told.startswith("ranks 2-3 on host b have been silent") and "phase backward of step 12" in told
    assert "rank 1" not in told and "cut off" not in told


def test_a_host_that_reaches_no_other_says_so() -> None:
    ranks = [Heard(Beat(rank, host, 3, "backward"), 1.0) for rank, host in enumerate("abc")]
    assert "b reaches no other host" in lost_sentence(ranks, absent=[0, 2], own_host="b")


def test_after_a_time_out_the_rank_that_did_not_come_is_named() -> None:
    ranks = [waiting(0, failing=True), waiting(1, failing=True), heard(2, Phase.DATA), waiting(3, failing=True)]
    assert lost_sentence(ranks, absent=[], own_host="a").startswith("rank 2 on host b is in phase data")
    assert lost_sentence([waiting(rank, failing=True) for rank in range(4)], absent=[], own_host="a") == ""


class Clock:
    """Heartbeats of four ranks at a monitor, every second."""

    def __init__(self, rank: int, hang_seconds: float = 10.0) -> None:
        self.monitor = Monitor(rank, HOSTS, hang_seconds, beat_seconds=1.0, now=0.0)
        self.now = 0.0

    def run(self, seconds: int, idle: float | None = None, silent: tuple[int, ...] = ()) -> list[str]:
        """Return what the monitor says; ranks are idle from now on, or `idle` seconds all the time."""
        said = []
        for second in range(1, seconds + 1):
            self.now += 1.0
            for rank in set(range(4)) - set(silent):
                still = float(second) if idle is None else idle
                self.monitor.hear(Beat(rank, HOSTS[rank], 7, "backward", idle=still), self.now)
            said += [sentence for sentence in [self.monitor.judge(self.now)] if sentence]
        return said


def test_a_hang_is_reported_once_and_its_end_as_well() -> None:
    clock = Clock(rank=0)
    assert clock.run(100, idle=2.0) == []
    assert len(clock.run(30)) == 1
    assert ["again" in sentence for sentence in clock.run(30, idle=0.0)] == [True]
    assert len(clock.run(30)) == 1


def test_one_rank_that_makes_progress_is_enough() -> None:
    clock = Clock(rank=0)
    for _ in range(40):
        clock.now += 1.0
        for rank in range(4):
            clock.monitor.hear(Beat(rank, HOSTS[rank], idle=0.5 if rank == 2 else clock.now), clock.now)
        assert clock.monitor.judge(clock.now) is None


def test_the_second_monitor_speaks_only_if_rank_0_is_silent() -> None:
    assert Clock(rank=2).run(30) == []
    (sentence,) = Clock(rank=2).run(30, silent=(0,))
    assert blamed(sentence).startswith("rank 0 on host a has been silent")


def test_no_seconds_report_no_hang() -> None:
    assert Clock(rank=0, hang_seconds=0.0).run(30) == []


def test_a_monitor_that_was_stopped_itself_blames_nobody_for_that_time() -> None:
    clock = Clock(rank=0)
    assert clock.run(5, idle=0.0) == []
    clock.now += 1000.0
    assert clock.monitor.judge(clock.now) is None
    assert clock.run(5, idle=0.0) == []


def test_the_heartbeats_of_a_rank_that_ended_do_not_return() -> None:
    clock = Clock(rank=0)
    clock.monitor.hear(Beat(3, "b", ended="ValueError: bad"), 0.5)
    assert "ValueError" in clock.run(30)[0]


@pytest.mark.parametrize(("hosts", "second"), [(["a"], 0), (["a", "a"], 1), (["a", "a", "b"], 2), (["a", "b", "c"], 1)])
def test_the_second_monitor_is_on_another_host_if_there_is_one(hosts: list[str], second: int) -> None:
    assert second_monitor(hosts) == second


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[list[str]]:
    """Return the messages of the heartbeat, as they come."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("megatron_slm.liveness.heartbeat")
    logger.addHandler(handler)
    with caplog.at_level(logging.DEBUG, "megatron_slm"):
        yield messages
    logger.removeHandler(handler)


def wait_for(messages: list[str], count: int) -> None:
    deadline = time.monotonic() + 30
    while len(messages) < count:
        assert time.monotonic() < deadline, messages
        time.sleep(0.02)


def test_one_process_reports_a_hang_with_its_stack_and_then_its_progress(said: list[str]) -> None:
    activity = Activity()
    heartbeat = Heartbeat(activity, 0, ["a"], None, hang_seconds=0.3)
    activity.begin_step(4)
    heartbeat.start()
    wait_for(said, 2)
    stacks, hang = said
    assert "test_one_process_reports_a_hang" in stacks and "thread heartbeat" in stacks
    assert "phase data of step 4" in hang and "test_liveness.py" in hang and "wait_for" in hang
    activity.enter(Phase.BACKWARD)
    wait_for(said, 3)
    assert "again" in said[2]
    heartbeat.end("finished")


def test_a_forward_of_a_model_is_progress() -> None:
    from torch import nn, zeros

    activity, model = Activity(), nn.Linear(2, 2)
    activity.follow(model)
    before = activity.moment
    model(zeros(1, 2))
    assert activity.moment.done == before.done + 1 and activity.moment.entered == before.entered


def test_processor_time_is_progress_and_sleep_is_not() -> None:
    activity = Activity()
    work = ObservedWork(activity.thread)
    time.sleep(0.2)
    work.observe(activity)
    assert activity.moment.done == 0
    end = time.thread_time() + 0.2
    while time.thread_time() < end:
        pass
    work.observe(activity)
    assert activity.moment.done == 1


def test_the_place_of_a_thread_is_its_innermost_frame() -> None:
    asleep = threading.Event()
    thread = threading.Thread(target=asleep.wait, daemon=True)
    thread.start()
    assert thread.ident is not None
    where, waits = place(thread.ident)
    assert where.startswith("threading.py:") and where.endswith(" in wait") and not waits
    asleep.set()
