"""A process beside this one, its output in a file, that ends with it, unless this one is killed outright."""

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import yaml

from megatron_slm.errors import UserError
from megatron_slm.io.files import write_durably
from megatron_slm.io.progress import StageMeter

POLL_SECONDS = 0.5
GRACE_SECONDS = 10.0


class StoppedError(Exception):
    """A signal asked this program to end; `status` is what a shell expects then."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.status = 128 + number


class StopRequest:
    """Remembers a signal instead of raising in the middle of something; also while a process is being started."""

    def __init__(self) -> None:
        self._number = 0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self._number = number

    def check(self) -> None:
        """Raises:
        StoppedError: a signal has come.
        """
        if self._number:
            raise StoppedError(self._number)


@contextlib.contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Ctrl-C, a request to terminate and a closed terminal are noted, and acted on at the next `check`."""
    request = StopRequest()
    before = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_process(
    command: list[str], log: Path, stop: StopRequest, poll: Callable[[], None], environment: Mapping[str, str]
) -> int:
    """Run a command to its end in a session of its own, and return its exit status.

    Args:
        command: the program and its arguments.
        log: file that its output is added to.
        stop: asked twice a second.
        poll: called as often.
        environment: variables beside this process's own.

    Raises:
        StoppedError: after the command and all that it started have ended.
    """
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | environment,
            start_new_session=True,
        )
        try:
            while (status := _wait(process)) is None:
                stop.check()
                poll()
            return status
        finally:
            _end(process)


def _wait(process: subprocess.Popen[bytes]) -> int | None:
    with contextlib.suppress(subprocess.TimeoutExpired):
        return process.wait(POLL_SECONDS)
    return None


def _end(process: subprocess.Popen[bytes]) -> None:
    """End what is left of it. Descendants are looked up: torchrun puts every rank in a session of its own."""
    tree: list[psutil.Process] = []
    with contextlib.suppress(psutil.NoSuchProcess):
        root = psutil.Process(process.pid)
        tree = [*root.children(recursive=True), root]
    for one in tree:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.terminate()
    _, alive = psutil.wait_procs(tree, timeout=GRACE_SECONDS)
    for one in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    psutil.wait_procs(alive, timeout=GRACE_SECONDS)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@dataclass(frozen=True)
class Stage:
    """One step of the chain.

    name     of its marker and its log
    title    what it does, for the person who waits
    command  arguments of this Python
    outputs  files and folders that it makes; removed before it starts anew
    recipe   all that decides what it makes, beside the stages before it; another recipe: it runs again
    seconds  that it takes on two quiet cores, for the time that is left
    files    that it reads, by path; written before it starts
    metrics  of a training run, which goes on where it stands: its records
    steps    of that run
    """

    name: str
    title: str
    command: tuple[str, ...]
    outputs: tuple[Path, ...]
    recipe: Any
    seconds: float
    files: Mapping[Path, str] = field(default_factory=dict)
    metrics: Path | None = None
    steps: int = 0

    def share(self, elapsed: float) -> float:
        """How much of it is done, from 0 to 1: counted in steps, or guessed from the time it has run."""
        if self.metrics is None:
            return min(elapsed / self.seconds, 0.95)
        return (last_record(self.metrics) or {"step": 0})["step"] / self.steps

    @property
    def is_whole(self) -> bool:
        """A run that a signal stopped at an earlier step ends well too."""
        return self.metrics is None or self.share(0.0) >= 1


class Stages:
    """Args:
    folder: for markers, NAME.json, and logs, NAME.log.
    stages: in order; each depends on all before it.
    ranks: processes of a training run, which share the cores.
    """

    def __init__(self, folder: Path, stages: Iterable[Stage], ranks: int) -> None:
        self._folder = folder
        self._environment = _environment(ranks)
        self._stages = list(stages)
        self._keys = _keys(self._stages)

    def run(self, stop: StopRequest) -> None:
        """Run what is not finished.

        Raises:
            UserError: a stage failed; its log is named.
            StoppedError: as `run_process`.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        # What follows a stage that has to run again is older than its outputs.
        first = next((i for i in range(len(self._stages)) if not self.is_finished(i)), len(self._stages))
        progress = StageMeter([stage.seconds if i >= first else 0.0 for i, stage in enumerate(self._stages)])
        try:
            for number in range(first, len(self._stages)):
                progress.begin(number, self._stages[number].title)
                self._run(number, stop, progress)
        finally:
            progress.close()

    def is_finished(self, number: int) -> bool:
        """It ended well, on what it would be given now, and its outputs are still there."""
        outputs = self._stages[number].outputs
        return self._marker(number) == (self._keys[number], True) and all(path.exists() for path in outputs)

    def _run(self, number: int, stop: StopRequest, progress: StageMeter) -> None:
        stage, log = self._stages[number], self._folder / f"{self._stages[number].name}.log"
        stop.check()
        # A run's own state outlives a kill; anything else that is half made is of no use.
        if stage.metrics is None or self._marker(number) != (self._keys[number], False):
            _remove(*stage.outputs, log)
        self._mark(number, finished=False)
        for path, text in stage.files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        started = time.monotonic()
        poll = partial(_poll, stage, started, progress)
        status = run_process([sys.executable, *stage.command], log, stop, poll, self._environment)
        stop.check()  # it may have reached the command too
        if status != 0 or not stage.is_whole:
            raise UserError(
                f"Stage {number + 1}, {stage.title}, ended with status {status}: {_complaint(log)} "
                f"(log: {log}). Mend that, and start again with the same command: it goes on there."
            )
        self._mark(number, finished=True)

    def _marker(self, number: int) -> tuple[str, bool] | None:
        path = self._folder / f"{self._stages[number].name}.json"
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            return found["key"], found["finished"]
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _mark(self, number: int, finished: bool) -> None:
        path = self._folder / f"{self._stages[number].name}.json"
        write_durably(path, json.dumps({"key": self._keys[number], "finished": finished}) + "\n")


def training_stage(name: str, title: str, config: dict[str, Any], ranks: int, seconds: float, root: Path) -> Stage:
    """A run to its end under torchrun; its configuration, as `megatron-slm train` reads it, is written beside it.

    Args:
        config: with paths below `root`, which may be moved: it does not count as a change.
    """
    run_dir, text = Path(config["run_dir"]), yaml.safe_dump(config, sort_keys=False)
    file = run_dir.with_suffix(".yaml")
    step_tokens = config["training"]["global_batch_size"] * config["data"]["seq_length"]
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks))
    return Stage(
        name=name,
        title=title,
        command=(*launcher, "-m", "megatron_slm", "train", str(file)),
        outputs=(run_dir,),
        recipe=text.replace(str(root), ""),
        seconds=seconds,
        files={file: text},
        metrics=run_dir / "metrics.jsonl",
        steps=config["training"]["train_tokens"] // step_tokens,
    )


def export_stage(run_dir: Path, folder: Path, seconds: float = 8.0) -> Stage:
    """A run's model as a Hugging Face folder."""
    command = ("-m", "megatron_slm", "export", str(run_dir), str(folder))
    return Stage(f"export_{folder.name}", f"export the {folder.name}", command, (folder,), "", seconds)


def last_record(metrics: Path) -> dict[str, Any] | None:
    """The newest complete record of a run, if there is one."""
    if not metrics.exists():
        return None
    lines = metrics.read_text(encoding="utf-8").splitlines(keepends=True)
    complete = [line for line in lines[-2:] if line.endswith("\n")]
    return json.loads(complete[-1]) if complete else None


def _keys(stages: list[Stage]) -> list[str]:
    """Of each stage and all before it."""
    keys: list[str] = []
    for stage in stages:
        text = json.dumps([keys[-1:], stage.name, stage.recipe])
        keys.append(hashlib.sha256(text.encode()).hexdigest())
    return keys


def _poll(stage: Stage, started: float, progress: StageMeter) -> None:
    progress.update(stage.share(time.monotonic() - started))


def _environment(ranks: int) -> dict[str, str]:
    """On the CPU, where two ranks need not two accelerators; and nothing is fetched."""
    threads = max(1, len(os.sched_getaffinity(0)) // ranks)
    return {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads)}


def _complaint(log: Path) -> str:
    """The line of a log that says most: the last error, or the last line at all."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if "rror: " in line]
    return (errors or lines or ["it said nothing"])[-1]


def _remove(*paths: Path) -> None:
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
