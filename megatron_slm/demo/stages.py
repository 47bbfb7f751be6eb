"""A chain of stages, each a command in a process of its own; finished stages are not run again."""

import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megatron_slm.demo.processes import StopRequest, run_process
from megatron_slm.errors import UserError
from megatron_slm.io.files import write_durably
from megatron_slm.io.progress import StageMeter
from megatron_slm.reporting.records import last_record


@dataclass(frozen=True)
class Stage:
    """One command of a chain.

    name     of its marker and its log
    title    what it does, for the progress bar
    command  arguments of this Python
    outputs  files and folders that it creates; removed before it starts anew
    recipe   everything that determines its outputs, except earlier stages; if it changes, the stage runs again
    seconds  expected duration on two idle cores
    files    texts by path that are written before it starts
    metrics  records of a training run, which resumes from its run directory; None for other commands
    steps    optimizer steps of the training run
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

    def share_done(self, elapsed: float) -> float:
        """Return the share that is done, from 0 to 1, by the run's steps or else by the seconds that have elapsed."""
        if self.metrics is None:
            return min(elapsed / self.seconds, 0.95)
        return float((last_record(self.metrics) or {"step": 0})["step"] / self.steps)

    @property
    def is_complete(self) -> bool:
        """False for a training run that a signal stopped early, although its exit status is 0."""
        return self.metrics is None or self.share_done(0.0) >= 1


class Stages:
    """A chain of stages that resumes where it was stopped.

    Args:
        folder: holds a marker, NAME.json, and a log, NAME.log, for each stage.
        stages: in order; each may depend on all earlier ones.
        ranks: processes of a training run, which share the cores.
    """

    def __init__(self, folder: Path, stages: Iterable[Stage], ranks: int) -> None:
        self._folder = folder
        self._environment = _environment(ranks)
        self._stages = list(stages)
        self._keys = _keys(self._stages)

    def run(self, stop: StopRequest) -> None:
        """Run the stages that are not finished.

        Raises:
            UserError: a stage failed.
            StoppedError: a signal has arrived; no process is left running.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        # Later stages depend on the outputs of a stage that runs again, so they run again, too.
        first = next((i for i in range(len(self._stages)) if not self.is_finished(i)), len(self._stages))
        progress = StageMeter([stage.seconds if i >= first else 0.0 for i, stage in enumerate(self._stages)])
        try:
            for number in range(first, len(self._stages)):
                progress.begin(number, self._stages[number].title)
                self._run(number, stop, progress)
        finally:
            progress.close()

    def is_finished(self, number: int) -> bool:
        """Return whether a stage has succeeded with its present recipe, and its outputs still exist."""
        outputs = self._stages[number].outputs
        return self._read_marker(number) == (self._keys[number], True) and all(path.exists() for path in outputs)

    def _run(self, number: int, stop: StopRequest, progress: StageMeter) -> None:
        stage, log = self._stages[number], self._folder / f"{self._stages[number].name}.log"
        stop.check()
        # A training run of the same recipe resumes. Incomplete outputs of any other command are removed.
        if stage.metrics is None or self._read_marker(number) != (self._keys[number], False):
            _remove(*stage.outputs, log)
        self._write_marker(number, finished=False)
        for path, text in stage.files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        started = time.monotonic()

        def poll() -> None:
            progress.update(stage.share_done(time.monotonic() - started))

        status = run_process([sys.executable, *stage.command], log, stop, poll, self._environment)
        stop.check()  # the signal may have reached the command, too
        if status != 0 or not stage.is_complete:
            reason = f"it ended with status {status}: {_last_error(log)} (log: {log})"
            raise UserError("stage", stage.title, reason, "Correct that, and run the same command to resume")
        self._write_marker(number, finished=True)

    def _read_marker(self, number: int) -> tuple[str, bool] | None:
        path = self._folder / f"{self._stages[number].name}.json"
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            return found["key"], found["finished"]
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _write_marker(self, number: int, finished: bool) -> None:
        path = self._folder / f"{self._stages[number].name}.json"
        write_durably(path, json.dumps({"key": self._keys[number], "finished": finished}) + "\n")


def training_stage(name: str, title: str, config: dict[str, Any], ranks: int, seconds: float, root: Path) -> Stage:
    """Return a stage that trains under torchrun, from a configuration file beside the run directory.

    `root` is the folder of all paths in `config`. It is not part of the recipe, so that the folder may be moved.
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
    """Return a stage that exports a run to a Hugging Face folder."""
    command = ("-m", "megatron_slm", "export", str(run_dir), str(folder))
    return Stage(f"export_{folder.name}", f"export the {folder.name}", command, (folder,), "", seconds)


def _keys(stages: list[Stage]) -> list[str]:
    """Return a hash for each stage: of its own recipe and those of all earlier stages."""
    keys: list[str] = []
    for stage in stages:
        text = json.dumps([keys[-1:], stage.name, stage.recipe])
        keys.append(hashlib.sha256(text.encode()).hexdigest())
    return keys


def _environment(ranks: int) -> dict[str, str]:
    """Return variables that keep the ranks on the CPU and offline, and divide the cores among them."""
    threads = max(1, len(os.sched_getaffinity(0)) // ranks)
    return {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads)}


def _last_error(log: Path) -> str:
    """Return the last line of a log that reports an error, or else the last line."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if "rror: " in line]
    return (errors or lines or ["the log is empty"])[-1]


def _remove(*paths: Path) -> None:
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
