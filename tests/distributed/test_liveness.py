"""A run that stands still, on ranks over gloo: what its heartbeats report."""

import logging
import os
import socket
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist
from torch import Tensor

from megatron_slm.dist import World, all_reduce_sum
from megatron_slm.errors import LostRanksError
from megatron_slm.liveness.activity import Activity, Phase
from megatron_slm.liveness.heartbeat import Heartbeat, watched
from megatron_slm.liveness.wire import Message, Wire, open_wire
from tests.gloo import run_ranks
from tests.runs import config_tree

HANG_SECONDS = 2.0
HANG_STEP = 3


class Words(logging.Handler):
    """The messages of the heartbeat of this rank; a file marks the first report of a hang."""

    def __init__(self, mark: Path) -> None:
        super().__init__()
        self.messages: list[str] = []
        self._mark = mark
        logging.getLogger("megatron_slm.liveness.heartbeat").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno == logging.ERROR:
            self.messages.append(record.getMessage())
            self._mark.touch()


def wait_for(mark: Path) -> None:
    deadline = time.monotonic() + 60
    while not mark.exists() and time.monotonic() < deadline:
        time.sleep(0.05)


def train_watched(world: World, tree: dict[str, Any], how: str) -> tuple[list[str], int]:
    """Train, with a rank 1 that holds up the run until a hang is reported; return what this rank reported."""
    from megatron_slm.build.run import build_run
    from megatron_slm.config import parse_config
    from megatron_slm.data.loader import StepLoader

    config = parse_config(tree)
    mark = Path(config.run_dir).with_suffix(".hang")
    words, late = Words(mark), []

    class Watched(Activity):
        """Waits where a rank that left out a collective operation is slow to come to its next one."""

        def enter(self, phase: Phase) -> None:
            super().enter(phase)
            if phase == Phase.CALLBACKS and late:
                wait_for(mark)
                dist.all_reduce(late.pop())

    activity = Watched()
    load, loaded = StepLoader.load, 0

    def blocked_read(loader: StepLoader, position: int) -> Any:
        nonlocal loaded
        loaded += 1
        if how == "block" and world.rank == 1 and loaded == HANG_STEP:
            wait_for(mark)
        return load(loader, position)

    def omitted_sum(value: Tensor, group: Any = None) -> Tensor:
        if how == "omit" and world.rank == 1 and activity.moment[:2] == (HANG_STEP, Phase.OPTIMIZER):
            late.append(value.clone())
            return value
        return all_reduce_sum(value, group)

    with (
        mock.patch.object(StepLoader, "load", blocked_read),
        mock.patch("megatron_slm.training.statistics.all_reduce_sum", omitted_sum),
        watched(activity, world, config.training.hang_seconds),
    ):
        run = build_run(config, world, activity=activity)
        run.trainer.fit(run.state)
        while world.rank == 0 and len(words.messages) < 2:
            activity.advance()
            time.sleep(0.05)
        dist.barrier()
    return words.messages, run.state.step


@pytest.mark.parametrize(("how", "phase"), [("block", "data"), ("omit", "callbacks")])
def test_the_rank_that_holds_up_the_others_is_named_and_all_ranks_write_their_stacks(
    corpora: Path, tmp_path: Path, how: str, phase: str
) -> None:
    tree = config_tree(corpora, tmp_path / "run", backend="plain", train_tokens=5 * 8 * 32, hang_seconds=HANG_SECONDS)
    (reported, steps), (silent, _) = run_ranks(train_watched, 2, tree, how)
    hang, again = reported
    assert silent == []
    assert f"rank 1 on host {socket.gethostname()} is" in hang and f"in phase {phase} of step {HANG_STEP} for" in hang
    assert "wait_for" in hang, "the place is missing"
    assert ("behind" in hang) == (how == "block") and ("ahead" in hang) == (how == "omit")
    assert f"rank 0 on host {socket.gethostname()} waits in phase" in hang
    assert "again" in again and steps == 5
    for rank, function in ((0, "all_reduce"), (1, "wait_for")):
        log = (tmp_path / "run" / f"log-rank{rank:04d}.txt").read_text()
        assert log.count("The stacks of its threads") == 1 and f"in {function}" in log


def slow_things(world: World, tree: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Train with evaluations, callbacks and checkpoints that each take longer than a hang; return what was reported."""
    from megatron_slm import Callback
    from megatron_slm.build.run import build_run
    from megatron_slm.config import parse_config
    from megatron_slm.data.loader import EvaluationStream
    from megatron_slm.training import checkpoints

    class Slow(Callback):
        def on_step_end(self, state: Any, result: Any) -> None:
            end = time.thread_time() + 2 * HANG_SECONDS
            while time.thread_time() < end:
                pass

    config = parse_config(tree)
    words, activity = Words(Path(config.run_dir).with_suffix(".hang")), Activity()
    batch, add, phases = EvaluationStream.batch, checkpoints._sum, set()

    def slow_batch(stream: EvaluationStream, windows: list[int]) -> Any:
        phases.add(str(activity.moment.phase))
        time.sleep(0.4 * HANG_SECONDS)
        return batch(stream, windows)

    def slow_sum(*arguments: Any) -> Any:
        phases.add(str(activity.moment.phase))
        time.sleep(0.4 * HANG_SECONDS)
        return add(*arguments)

    with (
        mock.patch.object(EvaluationStream, "batch", slow_batch),
        mock.patch.object(checkpoints, "_sum", slow_sum),
        watched(activity, world, config.training.hang_seconds),
    ):
        run = build_run(config, world, [Slow()], activity=activity)
        run.trainer.fit(run.state)
    return words.messages, sorted(phases)


def test_slow_evaluations_callbacks_and_checkpoints_are_no_hang(corpora: Path, tmp_path: Path) -> None:
    tree = config_tree(corpora, tmp_path / "run", backend="plain", train_tokens=8 * 32, hang_seconds=HANG_SECONDS)
    tree["objective"] = "clm"
    (reported, phases), _ = run_ranks(slow_things, 2, tree)
    assert phases == ["checkpoint", "evaluation"]
    assert reported == []


def leave(world: World, how: str) -> str:
    """Let rank 1 end during a step; return what the other ranks say about it."""
    activity = Activity()
    activity.begin_step(5)
    try:
        with watched(activity, world, 300.0):
            dist.barrier()
            activity.enter(Phase.BACKWARD)
            if world.rank == 1:
                raise ValueError("bad tokens")
            dist.barrier()
    except LostRanksError as error:
        return error.found
    except ValueError as error:
        dist.destroy_process_group()  # closes its connections
        return str(error)
    return "no error"


def test_ranks_that_lose_their_connection_to_another_say_why_it_ended() -> None:
    own, *others = (run_ranks(leave, 3, "raise")[rank] for rank in (1, 0, 2))
    assert own == "bad tokens"
    for found in others:
        assert f"rank 1 on host {socket.gethostname()} ended in phase backward of step 5" in found
        assert "ValueError: bad tokens" in found and "rank 0" not in found and "rank 2" not in found


def fail(world: World) -> str:
    """Fail in a collective operation although all ranks are there."""
    try:
        with watched(Activity(), world, 300.0):
            dist.all_reduce("not a tensor")  # type: ignore[arg-type]
    except Exception as error:
        return type(error).__name__
    return "no error"


def test_an_error_of_a_collective_that_is_no_lost_rank_is_raised_as_it_is() -> None:
    assert "LostRanksError" not in run_ranks(fail, 2)


def wires(count: int) -> list[Wire]:
    sockets = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(count)]
    for opened in sockets:
        opened.bind(("127.0.0.1", 0))
    addresses = [("127.0.0.1", opened.getsockname()[1]) for opened in sockets]
    return [Wire(opened, "word", addresses) for opened in sockets]


def test_a_rank_whose_process_is_gone_is_lost_whichever_monitor_remains() -> None:
    for gone in (0, 1, 2):
        activity = Activity()
        beats = [Heartbeat(activity, rank, ["a", "b", "b"], wire, 300.0) for rank, wire in enumerate(wires(3))]
        activity.begin_step(9)
        for rank, beat in enumerate(beats):
            beat.start()
            if rank == gone:
                time.sleep(0.5)
                beat._ended.set()  # without a word
                while beat._wire._socket.fileno() != -1:  # its thread would still answer
                    time.sleep(0.01)
        asker = 2 if gone != 2 else 1
        found = beats[asker].explain()
        assert f"rank {gone} on host {'abb'[gone]} has been silent" in found and "phase data of step 9" in found, found
        assert all(f"rank {rank}" not in found for rank in {0, 1, 2} - {gone})
        for beat in beats:
            beat.end("finished")


def test_messages_of_another_start_and_what_is_no_message_are_ignored() -> None:
    one, other = wires(2)
    stranger = Wire(socket.socket(socket.AF_INET, socket.SOCK_DGRAM), "other word", other._addresses)
    stranger.send(1, Message("ask", 0))
    stranger._socket.sendto(b"{}", other._addresses[1])
    stranger._socket.sendto(os.urandom(2000), other._addresses[1])
    assert [other.receive(0.5) for _ in range(3)] == [None] * 3
    one.send(1, Message("ask", 0))
    received = other.receive(5.0)
    assert received is not None and received.kind == "ask" and received.sender == 0


def hosts_of(world: World) -> tuple[bool, list[str]]:
    wire, hosts = open_wire(world)
    return wire is not None, hosts


def test_all_ranks_learn_each_others_hosts_and_one_process_opens_no_port() -> None:
    assert run_ranks(hosts_of, 1) == [(False, [socket.gethostname()])]
    assert run_ranks(hosts_of, 2) == [(True, [socket.gethostname()] * 2)] * 2
