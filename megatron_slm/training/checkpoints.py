"""The checkpoints of a run. Each is staged, checksummed, renamed and named in `latest`, so that none is incomplete.

checkpoints/latest                    text: the name of the newest complete checkpoint
checkpoints/step_00000500/engine/     the backend's files, of all ranks
                          rng_rankNNNN.pt, progress.json, config.yaml
                          manifest.json   size and SHA-256 of every other file
"""

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from megatron_slm.backend import TrainingEngine
from megatron_slm.backend.deepspeed_internals import whole_shape
from megatron_slm.dist import World, agree, gather_objects, is_collective_failure
from megatron_slm.errors import AgreedError, UserError
from megatron_slm.io.files import publish, sync, write_durably
from megatron_slm.liveness.activity import Activity, Phase
from megatron_slm.training.state import RunState

FORMAT_VERSION = 1
MANIFEST = "manifest.json"

_CHECKPOINT = re.compile(r"step_(\d{8,})")
_UNFINISHED = re.compile(rf"\.writing-{_CHECKPOINT.pattern}")


class CheckpointStore:
    """The checkpoints of one run, in a folder that all ranks share.

    Args:
        folder: `RUN_DIR/checkpoints`.
        world: the place of this process among all ranks.
        keep: number of newest checkpoints to keep.
        config: the run's configuration as YAML, saved in each checkpoint.
        activity: receives the phase of this rank, and each file.
    """

    def __init__(
        self, folder: Path, world: World, keep: int = 1, config: str = "", activity: Activity | None = None
    ) -> None:
        self._activity = activity or Activity()
        self._config = config
        self._folder = folder
        self._world = world
        self._keep = keep

    def save(self, engine: TrainingEngine, progress: dict[str, Any]) -> None:
        """Save the state of all ranks; every rank calls it. A kill at any moment leaves the previous checkpoint.

        Raises:
            AgreedError: a rank cannot write. The unfinished files are removed; the previous checkpoint is untouched.
        """
        self._activity.enter(Phase.CHECKPOINT)
        name = checkpoint_name(progress["step"])
        aside = self._folder / f".writing-{name}"
        try:
            agree(lambda: self._make_room(aside, engine) if self._world.is_main else None)
            agree(lambda: engine.save(aside))
            agree(lambda: self._write_state(aside, progress))
            files = self._sums(aside, flush=True)
            manifest = {"format_version": FORMAT_VERSION, "world_size": self._world.size, "files": files}
            agree(lambda: self._publish(aside, name, manifest) if self._world.is_main else None)
        except (OSError, RuntimeError, UserError) as error:
            if is_collective_failure(error):
                raise
            agree(self._clear if self._world.is_main else lambda: None)
            reason = str(error)
            if isinstance(error, UserError):
                reason = f"{error.setting} is {error.value}, and {error.reason}"
            raise AgreedError(
                "checkpoint",
                f"due at step {progress['step']}",
                f"it cannot be written to {self._folder} ({reason}). The previous checkpoint is untouched",
                "Make room there",
            ) from error
        if self._world.is_main:
            self._prune()

    def restore(self, engine: TrainingEngine) -> dict[str, Any] | None:
        """Load the newest complete checkpoint into the engine; every rank calls it.

        Returns:
            The progress that was saved with it; None if there is no checkpoint.

        Raises:
            UserError: no checkpoint is complete, or it was written on another number of ranks.
        """
        self._activity.enter(Phase.RESTORE)
        found = self.newest()
        if found is None:
            return None
        engine.load(found)
        state = found / f"rng_rank{self._world.rank:04d}.pt"
        if state.exists():  # with more ranks than before, the new ones start from the seed
            _set_random_state(torch.load(state, weights_only=True))
        progress: dict[str, Any] = json.loads((found / "progress.json").read_text())
        return progress

    def newest(self, step: int | None = None) -> Path | None:
        """Return the newest checkpoint, up to `latest`, whose checksums are correct; every rank calls it.

        Args:
            step: consider the checkpoint of this step only.

        Returns:
            Its folder; None if there is no checkpoint.

        Raises:
            AgreedError: there are checkpoints, but none is complete.
        """
        # All ranks use the list of rank 0, because a shared file system may show different states to different hosts.
        names = gather_objects([path.name for path in list_checkpoints(self._folder)])[0]
        if step is not None:
            names = [name for name in names if name == checkpoint_name(step)]
        for name in reversed(names):
            damaged = self._damaged(self._folder / name)
            if damaged is None:
                return self._folder / name
            logging.getLogger(__name__).warning("checkpoint %s is damaged (%s)", name, damaged)
        if names and step is not None:
            raise AgreedError(
                "--rollback", step, f"its checkpoint in {self._folder} is damaged", "Restore it, or use another step"
            )
        if names:
            raise AgreedError(
                "run_dir",
                str(self._folder.parent),
                "none of its checkpoints is complete",
                "Restore one, or use another run_dir",
            )
        return None

    def _damaged(self, checkpoint: Path) -> str | None:
        """Return the first file that is missing or has another checksum; None if there is none.

        Each rank reads a share of the files.
        """
        expected = gather_objects(_read_manifest(checkpoint))[0]
        if expected is None:
            return MANIFEST
        found = self._sums(checkpoint, only=expected.keys())
        return next((name for name in expected if found.get(name) != expected[name]), None)

    def _sums(self, folder: Path, only: Iterable[str] | None = None, flush: bool = False) -> dict[str, list[Any]]:
        """Return the size and SHA-256 of every file; each rank reads a share of them."""
        everything = only or (str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
        names = gather_objects(sorted(everything))[0]
        mine = [name for name in names[self._world.rank :: self._world.size] if (folder / name).exists()]

        def sum_all() -> dict[str, list[Any]]:
            sums = {}
            for name in mine:
                sums[name] = _sum(folder / name, flush)
                self._activity.advance()
            return sums

        sums = agree(sum_all)
        return {name: value for part in gather_objects(sums) for name, value in part.items()}

    def _make_room(self, aside: Path, engine: TrainingEngine) -> None:
        """Make an empty folder to write to, if the disk has room for a checkpoint as large as the newest one."""
        self._clear()
        aside.mkdir(parents=True)
        newest = list_checkpoints(self._folder)[-1:]
        files = _read_manifest(newest[0]) if newest else None
        need = sum(size for size, _ in files.values()) if files else _estimate(engine)
        free = shutil.disk_usage(self._folder).free
        if free < need:
            raise UserError(
                "free space", f"{free / 1e6:,.1f} MB", f"a checkpoint takes {need / 1e6:,.1f} MB", "Make room"
            )

    def _clear(self) -> None:
        for left in self._folder.iterdir() if self._folder.exists() else ():
            if _UNFINISHED.fullmatch(left.name):
                shutil.rmtree(left)

    def _write_state(self, aside: Path, progress: dict[str, Any]) -> None:
        torch.save(_random_state(), aside / f"rng_rank{self._world.rank:04d}.pt")
        if self._world.is_main:
            write_durably(aside / "progress.json", json.dumps(progress))
            write_durably(aside / "config.yaml", self._config)

    def _publish(self, aside: Path, name: str, manifest: dict[str, Any]) -> None:
        write_durably(aside / MANIFEST, json.dumps(manifest, indent=1))
        for folder in (aside, *(path for path in aside.rglob("*") if path.is_dir())):
            sync(folder)
        # Replace a damaged checkpoint, if this run resumed from an earlier one. Every rank has flushed its files.
        publish(aside, self._folder / name, replace=True, flush=False)
        write_durably(self._folder / "latest", name)

    def _prune(self) -> None:
        for old in list_checkpoints(self._folder)[: -self._keep]:
            try:
                shutil.rmtree(old)
            except OSError as error:
                logging.getLogger(__name__).warning("checkpoint %s cannot be removed: %s", old.name, error)


def save_checkpoint(store: CheckpointStore, engine: TrainingEngine, state: RunState) -> None:
    """Save a checkpoint; every rank calls it. Warn and count a failure, because a later checkpoint may succeed.

    Raises:
        AgreedError: the last checkpoint of the run cannot be written.
    """
    try:
        store.save(engine, state.progress())
    except AgreedError as error:
        if state.is_over:
            raise
        state.failed_saves += 1
        logging.getLogger(__name__).warning("%s Training continues, and the next checkpoint is due as planned.", error)


def _read_manifest(checkpoint: Path) -> dict[str, list[Any]] | None:
    """Return the size and SHA-256 of every file of a checkpoint; None if its manifest cannot be read."""
    try:
        files: dict[str, list[Any]] = json.loads((checkpoint / MANIFEST).read_text())["files"]
        return files
    except (OSError, ValueError, KeyError, TypeError):
        return None


def saved_ranks(checkpoint: Path) -> int | None:
    """Return the number of ranks that wrote a checkpoint; None if its manifest cannot be read."""
    try:
        return int(json.loads((checkpoint / MANIFEST).read_text())["world_size"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _estimate(engine: TrainingEngine) -> int:
    """Return the bytes of a first checkpoint: weights in the run's precision and in float32, and Adam's moments."""
    return sum(whole_shape(p).numel() * (p.element_size() + 12) for p in engine.module.parameters())


def checkpoint_name(step: int) -> str:
    """Return the name of the checkpoint's folder."""
    return f"step_{step:08d}"


def step_of(checkpoint: Path) -> int | None:
    """Return the step of a checkpoint's folder; None if `checkpoint_name` does not make its name."""
    found = _CHECKPOINT.fullmatch(checkpoint.name)
    step = int(found[1]) if found else None
    return step if step is not None and checkpoint.name == checkpoint_name(step) else None


def all_checkpoints(folder: Path) -> list[Path]:
    """Return all checkpoints in the order of their steps, including those after `latest`.

    Only exact names count: a copy such as `step_00000500.good` belongs to the user, and is never read or removed.
    """
    found = [path for path in folder.glob("step_*") if path.is_dir() and step_of(path) is not None]
    return sorted(found, key=lambda path: step_of(path) or 0)


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints up to `latest` in the order of their steps, or all if `latest` names none of them."""
    published = all_checkpoints(folder)
    latest = folder / "latest"
    name = latest.read_text().strip() if latest.exists() else ""
    names = [path.name for path in published]
    return published[: names.index(name) + 1] if name in names else published


def saved_steps(folder: Path) -> list[int]:
    """Return the steps of the published checkpoints."""
    return [step for path in list_checkpoints(folder) if (step := step_of(path)) is not None]


def _sum(path: Path, flush: bool) -> list[Any]:
    if flush:
        sync(path)
    with path.open("rb") as file:
        return [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]


def _random_state() -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def split_records(path: Path, step: int) -> tuple[str, str]:
    """Return the records up to a step, and the rest of the file, which may end in an incomplete line.

    Raises:
        UserError: the file holds a line that is not a record.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        kept = 0
        while kept < len(lines) and lines[kept].endswith("\n") and int(json.loads(lines[kept])["step"]) <= step:
            kept += 1
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            "run_dir",
            str(path.parent),
            f"{path.name} in it has a line that is not a record",
            "Restore the file, or move it away",
        ) from error
    return "".join(lines[:kept]), "".join(lines[kept:])


def cut_back(path: Path, step: int) -> None:
    """Remove the records that a killed run wrote after its checkpoint at `step`.

    Raises:
        UserError: the file holds a line that is not a record.
    """
    if path.exists():
        write_durably(path, split_records(path, step)[0])


def refuse_missing_checkpoint(checkpoints: Path, step: int) -> None:
    """Raise a UserError, which lists the steps of all checkpoints, if there is none of the step to roll back to."""
    steps = saved_steps(checkpoints)
    if step not in steps:
        remedy = f"Use one of {', '.join(map(str, steps))}" if steps else "Leave it out: there is no checkpoint"
        raise UserError("--rollback", step, f"{checkpoints} has no checkpoint of this step", remedy)


def roll_back(run_dir: Path, store: CheckpointStore, step: int, world: World) -> None:
    """Make the checkpoint of `step` the newest; every rank calls it.

    A kill at any moment loses nothing, and a repeated call finishes the work: the later records are copied first, and
    then later checkpoints are moved, from the newest on, so that the rest is always the beginning of a run.

    Raises:
        AgreedError: the checkpoint is damaged, a line is not a record, or a file cannot be written or moved.
    """
    if store.newest(step) is None:
        raise AgreedError("--rollback", step, "its checkpoint has been removed", "Use another step")
    agree(lambda: _move_aside(run_dir, step) if world.is_main else None)


def _move_aside(run_dir: Path, step: int) -> None:
    later = [path for path in all_checkpoints(run_dir / "checkpoints") if (step_of(path) or 0) > step]
    records = {name: split_records(run_dir / name, step)[1] for name in ("metrics.jsonl", "spikes.jsonl")}
    if not later and not any(records.values()):
        return
    try:
        aside = _next_folder(run_dir / "rolled-back")
        for name, text in records.items():
            if text:
                write_durably(aside / name, text)
        for checkpoint in reversed(later):
            shutil.move(checkpoint, aside / checkpoint.name)
            sync(aside)
        write_durably(run_dir / "checkpoints" / "latest", checkpoint_name(step))
    except OSError as error:
        raise UserError(
            "--rollback",
            step,
            f"{run_dir} cannot be changed ({error})",
            "Make it writable, and run the same command again",
        ) from error
    logging.getLogger(__name__).info("rolled back to step %d: later checkpoints and records are in %s", step, aside)


def _next_folder(parent: Path) -> Path:
    used = [int(path.name) for path in parent.glob("[0-9]*") if path.name.isdigit()]
    folder = parent / f"{max(used, default=0) + 1:04d}"
    folder.mkdir(parents=True)
    sync(parent)
    return folder
