"""Test a cluster: doctor, selection, training, resume, hang verdict, the cost of a save and speed; ends in go or no-go.

    python examples/acceptance/acceptance.py FOLDER --launcher "srun --kill-on-bad-exit=1" --ranks 16 [a.b=c ...]

The launcher is a command that starts one process per rank. Each test is one launch or a few; their output is in
FOLDER/logs, and the results in FOLDER/acceptance.json. The exit status is 0 for go, and 1 for no-go.
"""

import argparse
import json
import logging
import math
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_slm.demo.texts import GENERAL

HERE = Path(__file__).resolve().parent
PYTHON = [sys.executable, "-m", "megatron_slm"]
HANG_LIMIT = 60.0
"""Seconds after `training.hang_seconds` within which the verdict must be there."""
WARM_UP = 3
"""Steps that the speed leaves out."""


class NoGo(Exception):  # noqa: N818 - a result, not an error of this program
    """A test failed; the text says why."""


@dataclass
class Cluster:
    """The launcher, the folder of all files, and the settings of every run."""

    folder: Path
    launcher: list[str]
    ranks: int
    overrides: list[str]

    def start(self, name: str, command: Sequence[str]) -> subprocess.Popen[bytes]:
        """Start a command on all ranks; its output goes to FOLDER/logs/NAME.txt."""
        with self.log(name).open("ab") as output:
            return subprocess.Popen([*self.launcher, *command], stdout=output, stderr=output, env=environment())

    def run(self, name: str, command: Sequence[str], launcher: bool = True, seconds: float = 600.0) -> int:
        """Run a command, on all ranks or in one process, and return its exit status."""
        with self.log(name).open("ab") as output:
            prefix = self.launcher if launcher else []
            ended = subprocess.run(
                [*prefix, *command], stdout=output, stderr=output, env=environment(), timeout=seconds
            )
            return ended.returncode

    def train(self, name: str, *overrides: str, corpora: Sequence[str] = GENERAL) -> list[str]:
        """Return the command of a training run in FOLDER/runs/NAME on some of the corpora in FOLDER/data."""
        paths = [
            f"run_dir={self.folder}/runs/{name}",
            f"data.train={json.dumps([f'{self.folder}/data/{corpus}' for corpus in corpora])}",
            f"reference.path={self.folder}/models/reference",
        ]
        return [*PYTHON, "train", str(HERE / "run.yaml"), *paths, *self.overrides, *overrides]

    def log(self, name: str) -> Path:
        return self.folder / "logs" / f"{name.replace(' ', '-')}.txt"

    def records(self, name: str) -> list[dict[str, Any]]:
        lines = (self.folder / "runs" / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]

    def callback(self, kind: str, **arguments: Any) -> str:
        """Return the override that adds a callback of faults.py to a run."""
        return "callbacks=" + json.dumps([{"class": f"faults:{kind}", "args": arguments}])


def environment() -> dict[str, str]:
    """Return the environment of a launch, in which Python finds faults.py."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))}


def doctor(cluster: Cluster) -> str:
    """Check versions, devices, limits, network and files on all ranks."""
    require(cluster.run("doctor", [*PYTHON, "doctor"]) == 0, "the doctor found faults")
    return "no fault"


def threshold(cluster: Cluster) -> str:
    """Compare the selection over all ranks with one sort."""
    status = cluster.run("threshold", [sys.executable, str(HERE / "threshold.py")])
    require(status == 0, "the selection differs from a sort")
    return "equals a sort of all scores"


def reference(cluster: Cluster) -> str:
    """Prepare text that lies on every machine, train a reference on a part of it, and export it."""
    data = str(cluster.folder / "data")
    texts = [sys.executable, "-m", "megatron_slm.demo.texts", data, "4000000", "1000000", "40000"]
    require(cluster.run("corpora", texts, launcher=False) == 0, "the corpora could not be prepared")
    command = cluster.train("reference", "objective=clm", corpora=["curated"])
    require(cluster.run("reference", command) == 0, "the training of the reference failed")
    export = [*PYTHON, "export", str(cluster.folder / "runs" / "reference"), str(cluster.folder / "models/reference")]
    require(cluster.run("export", export, launcher=False) == 0, "the export of the reference failed")
    first, *_, last = cluster.records("reference")
    require(last["loss/all"] < first["loss/all"], "the loss of the reference did not fall")
    return f"loss {first['loss/all']:.2f} to {last['loss/all']:.2f} in {last['step']} steps"


def training(cluster: Cluster) -> str:
    """Train on selected tokens with a sharded student and a sharded reference."""
    times = cluster.callback("SaveTimes", output=str(cluster.folder / "saves.json"))
    require(cluster.run("slm", cluster.train("slm", times)) == 0, "the training failed")
    losses = [record["loss/selected"] for record in cluster.records("slm")]
    require(all(math.isfinite(loss) for loss in losses), "a loss is not finite")
    return f"{len(losses)} steps, loss of the selected tokens {losses[0]:.2f} to {losses[-1]:.2f}"


def resume(cluster: Cluster) -> str:
    """Kill a rank in the middle, start the run again, and compare its losses with the run that nothing interrupted."""
    mark = cluster.folder / "killed"
    kill = cluster.callback("Fault", mark=str(mark), step=6, signal="SIGKILL", rank=cluster.ranks - 1)
    first = cluster.run("kill", cluster.train("resumed", kill))
    require(first != 0 and mark.exists(), "the run did not notice that a rank was killed")
    require(cluster.run("resume", cluster.train("resumed")) == 0, "the run did not resume")
    pairs = list(zip(cluster.records("slm"), cluster.records("resumed"), strict=True))
    worst = max(abs(one["loss/all"] - other["loss/all"]) for one, other in pairs)
    # Attention kernels of GPUs may add in another order each time; on CPUs, the runs are equal bit for bit.
    require(worst < 0.02, f"the losses after the resume differ by up to {worst:.3g}")
    return "losses equal those of an uninterrupted run" + (f" within {worst:.2g}" if worst else ", to the last digit")


def hang(cluster: Cluster) -> str:
    """Stop a rank in the middle, and wait for the sentence that names it."""
    mark, victim = cluster.folder / "stopped", cluster.ranks - 1
    stop = cluster.callback("Fault", mark=str(mark), step=2, signal="SIGSTOP", rank=victim)
    run = cluster.start("hang", cluster.train("hang", stop))
    try:
        wait_for(lambda: mark.exists() or run.poll() is not None, 300, "the run did not reach its third step")
        require(run.poll() is None, "the run ended before its third step")
        start = float(mark.read_text())
        limit = start + hang_seconds(cluster) + HANG_LIMIT
        wait_for(lambda: f"rank {victim} " in verdicts(cluster), limit - time.time(), f"no verdict named rank {victim}")
        return f"named rank {victim} {time.time() - start:.0f} s after it stopped"
    finally:
        run.terminate()
        try:
            run.wait(60)
        except subprocess.TimeoutExpired:
            run.kill()


def saves(cluster: Cluster) -> str:
    """Compare the pauses after steps with and without a save."""
    pauses = {int(step): pause for step, pause in json.loads((cluster.folder / "saves.json").read_text()).items()}
    interval = setting(cluster, "training", "save_interval")
    saved = [pause for step, pause in pauses.items() if step % interval == 0]
    plain = [pause for step, pause in pauses.items() if step % interval]
    stall = statistics.median(saved) - statistics.median(plain)
    return f"a save holds up training for {stall:.1f} s"


def speed(cluster: Cluster) -> str:
    """Report the speed of the steps after the first ones."""
    records = cluster.records("slm")[WARM_UP:]
    seconds = sorted(record["step_seconds"] for record in records)
    tokens = statistics.median(record["tokens_per_second"] for record in records)
    mfu = records[-1]["mfu"]
    share = f", MFU {mfu:.1%}" if mfu else ""
    return (
        f"{tokens / cluster.ranks:,.0f} tokens/s per rank{share}; a step takes {statistics.median(seconds):.2f} s "
        f"({seconds[0]:.2f} to {seconds[-1]:.2f})"
    )


TESTS: list[Callable[[Cluster], str]] = [doctor, threshold, reference, training, resume, hang, saves, speed]
NEEDED = [reference, training]
"""Tests on whose files all later ones build."""


def require(condition: bool, reason: str) -> None:
    if not condition:
        raise NoGo(reason)


def wait_for(condition: Callable[[], bool], seconds: float, reason: str) -> None:
    deadline = time.time() + seconds
    while not condition():
        require(time.time() < deadline, reason)
        time.sleep(0.5)


def verdicts(cluster: Cluster) -> str:
    """Return the lines of the hanging run that say that nothing goes on."""
    lines = cluster.log("hang").read_text(errors="replace").splitlines()
    return "\n".join(line for line in lines if "no progress for" in line.lower())


def setting(cluster: Cluster, group: str, name: str) -> Any:
    """Return a setting of the runs, as the directory of the training run records it."""
    config = yaml.safe_load((cluster.folder / "runs" / "slm" / "config.yaml").read_text(encoding="utf-8"))
    return config[group][name]


def hang_seconds(cluster: Cluster) -> float:
    return float(setting(cluster, "training", "hang_seconds"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="new folder, which all ranks see")
    parser.add_argument("--launcher", required=True, help="command that starts one process per rank")
    parser.add_argument("--ranks", type=int, required=True, help="number of ranks that it starts")
    parser.add_argument("overrides", nargs="*", help="settings of every run, such as training.global_batch_size=64")
    arguments = parser.parse_intermixed_args()
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.INFO, stream=sys.stdout)
    folder = arguments.folder.resolve()
    (folder / "logs").mkdir(parents=True)
    cluster = Cluster(folder, shlex.split(arguments.launcher), arguments.ranks, arguments.overrides)
    results: dict[str, Any] = {}
    for number, test in enumerate(TESTS, 1):
        logging.info("%d/%d %s ...", number, len(TESTS), test.__name__)
        start = time.monotonic()
        try:
            finding, passed = test(cluster), True
        except (NoGo, OSError, subprocess.SubprocessError, LookupError, ValueError) as error:
            finding, passed = f"{error}; see {folder}/logs", False
        results[test.__name__] = {"passed": passed, "finding": finding, "seconds": time.monotonic() - start}
        logging.info("%d/%d %s: %s, %s", number, len(TESTS), test.__name__, "ok" if passed else "FAILED", finding)
        if not passed and test in NEEDED:
            break
    failed = [name for name, result in results.items() if not result["passed"]]
    report = {"go": not failed, "tests": results}
    (folder / "acceptance.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    logging.info("%s", f"NO-GO: {', '.join(failed)}" if failed else "GO")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
