"""The cost of heartbeats: the same training step with and without them, alternating in one process.

    python tools/bench_heartbeat.py --rounds 8

This process is both ranks of two, whose heartbeats it sends and hears, as a monitor does. `fast` sends them a hundred
times as often as a run: a monitor of two hundred ranks hears as many.
"""

import argparse
import socket
import statistics
import sys
import time
import timeit

import torch

from megatron_slm.device_check.shapes import STEP_PRESETS
from megatron_slm.device_check.step_costs import PLAIN, StepBench
from megatron_slm.liveness.activity import Activity, Phase
from megatron_slm.liveness.heartbeat import BEAT_SECONDS, Heartbeat
from megatron_slm.liveness.wire import Wire

PHASES = (Phase.REFERENCE_FORWARD, Phase.STUDENT_FORWARD, Phase.SELECTION, Phase.BACKWARD, Phase.OPTIMIZER)
WAYS = {"without": None, "heartbeats": BEAT_SECONDS, "fast": BEAT_SECONDS / 100}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8, help="steps of each kind to measure, after a first one")
    parser.add_argument("--preset", choices=STEP_PRESETS, default="cpu", help="shape of model and batch")
    options = parser.parse_args()
    bench = StepBench(STEP_PRESETS[options.preset], torch.device("cpu"))
    activity = Activity()
    activity.follow(bench.module)
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for turn in range(options.rounds + 1):
        for way, beat_seconds in WAYS.items():
            beats = [] if beat_seconds is None else start(activity, beat_seconds)
            taken = step_seconds(bench, activity, turn)
            for beat in beats:
                beat.end("finished")
            if turn:  # the first round warms up
                seconds[way].append(taken)
    for way, taken_of in seconds.items():
        ratio = statistics.median(one / base for one, base in zip(taken_of, seconds["without"], strict=True))
        sys.stdout.write(f"{way:12} {statistics.median(taken_of):.3f} s per step, {ratio:.4f} of without\n")
    report = min(timeit.repeat(lambda: activity.enter(Phase.DATA), number=100_000, repeat=5)) / 100_000
    sys.stdout.write(f"one report of a phase takes {1e9 * report:.0f} ns\n")


def start(activity: Activity, beat_seconds: float) -> list[Heartbeat]:
    """Start the heartbeats of two ranks in this process."""
    sockets = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(2)]
    for opened in sockets:
        opened.bind(("127.0.0.1", 0))
    addresses = [("127.0.0.1", opened.getsockname()[1]) for opened in sockets]
    beats = [Heartbeat(activity, rank, ["a", "b"], Wire(sockets[rank], "bench", addresses), 300.0) for rank in range(2)]
    for beat in beats:
        beat._beat_seconds = beat_seconds
        beat.start()
    return beats


def step_seconds(bench: StepBench, activity: Activity, step: int) -> float:
    """Return the duration of one plain step with its reports."""
    bench.prepare(PLAIN[0])
    begin = time.perf_counter()
    activity.begin_step(step)
    for phase in PHASES:
        activity.enter(phase)
    bench.step(PLAIN[0])
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
