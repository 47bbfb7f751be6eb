"""Checkpoints that are whole or not there: written aside, summed, renamed, then published by `latest`.

checkpoints/latest                    text: the name of the newest whole checkpoint
checkpoints/step_00000500/engine/     the backend's files, of all ranks
                          rng_rankNNNN.pt, progress.json, config.yaml
                          manifest.json   size and SHA-256 of every other file
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_slm.backend import TrainingEngine
from megatron_slm.dist import World, gather_objects
from megatron_slm.errors import UserError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"


class CheckpointStore:
    """The checkpoints of one run, in a folder that all ranks see.

    Args:
        folder: `RUN_DIR/checkpoints`.
        world: this process among all.
        keep: newest checkpoints to keep.
        config: the run's configuration as YAML, kept beside each checkpoint.
    """

    def __init__(self, folder: Path, world: World, keep: int = 1, config: str = "") -> None:
        self._config = config
        self._folder = folder
        self._world = world
        self._keep = keep

    def save(self, engine: TrainingEngine, progress: dict[str, Any]) -> None:
        """Save all ranks' state; every rank calls it. A kill at any instant leaves the one before."""
        name = checkpoint_name(progress["step"])
        aside = self._folder / f".writing-{name}"
        self._on_main(lambda: self._clear(aside))
        engine.save(aside)
        self._on_main(lambda: aside.mkdir(exist_ok=True))
        torch.save(_random_state(), aside / f"rng_rank{self._world.rank:04d}.pt")
        self._on_main(lambda: _write(aside / "progress.json", json.dumps(progress)))
        self._on_main(lambda: _write(aside / "config.yaml", self._config))
        files = self._sums(aside, flush=True)
        manifest = {"format_version": FORMAT_VERSION, "world_size": self._world.size, "files": files}
        self._on_main(lambda: _write(aside / MANIFEST, json.dumps(manifest, indent=1)))
        self._on_main(lambda: self._publish(aside, name))

    def restore(self, engine: TrainingEngine) -> dict[str, Any] | None:
        """Load the newest whole checkpoint into the engine; None if nothing was ever saved.

        Returns:
            The progress that was saved with it.

        Raises:
            UserError: there are checkpoints, but none is whole.
        """
        found = self.newest()
        if found is None:
            return None
        engine.load(found)
        state = found / f"rng_rank{self._world.rank:04d}.pt"
        if state.exists():  # A run at more ranks than before starts its new ranks from the seed.
            _set_random_state(torch.load(state, weights_only=True))
        return json.loads((found / "progress.json").read_text())

    def newest(self, step: int | None = None) -> Path | None:
        """The newest checkpoint, up to `latest`, whose files are as they were written; every rank calls it.

        Args:
            step: that of this step alone.
        """
        candidates = list_checkpoints(self._folder)
        if step is not None:
            candidates = [path for path in candidates if path.name == checkpoint_name(step)]
        for candidate in reversed(candidates):
            damaged = self._damaged(candidate)
            if damaged is None:
                return candidate
            logging.getLogger(__name__).warning(
                "checkpoint %s is damaged (%s): trying the one before", candidate, damaged
            )
        if candidates:
            raise UserError(f"No checkpoint in {self._folder} is whole: restore one, or start in another run_dir.")
        return None

    def _damaged(self, checkpoint: Path) -> str | None:
        """The first file that is missing or not as it was written, on any rank's share of the reading."""
        manifest = checkpoint / MANIFEST
        if not manifest.exists():
            return MANIFEST
        expected = json.loads(manifest.read_text())["files"]
        found = self._sums(checkpoint, only=expected.keys())
        return next((name for name in expected if found.get(name) != expected[name]), None)

    def _sums(self, folder: Path, only: Any = None, flush: bool = False) -> dict[str, list[Any]]:
        """Size and SHA-256 of every file, each rank reading its share."""
        gather_objects(None)  # All ranks have written before one lists.
        names = sorted(only or (str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()))
        mine = [name for name in names[self._world.rank :: self._world.size] if (folder / name).exists()]
        sums = {name: _sum(folder / name, flush) for name in mine}
        return {name: value for part in gather_objects(sums) for name, value in part.items()}

    def _publish(self, aside: Path, name: str) -> None:
        final = self._folder / name
        if final.exists():  # A damaged one that this run went back behind.
            shutil.rmtree(final)
        aside.rename(final)
        _flush(self._folder)
        _write(self._folder / "latest.new", name)
        (self._folder / "latest.new").replace(self._folder / "latest")
        _flush(self._folder)
        for old in list_checkpoints(self._folder)[: -self._keep]:
            shutil.rmtree(old)

    def _clear(self, aside: Path) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        for left in self._folder.glob(".writing-*"):
            shutil.rmtree(left)

    def _on_main(self, work: Callable[[], object]) -> None:
        """Rank 0 does it, all ranks wait, and all fail if it failed."""
        message = None
        if self._world.is_main:
            try:
                work()
            except OSError as error:
                message = str(error)
        if (found := gather_objects(message)[0]) is not None:
            raise UserError(
                f"The checkpoint cannot be written: {found}. The one before is untouched: make room, resume."
            )


def checkpoint_name(step: int) -> str:
    """Name of a checkpoint's folder; names sort as steps do."""
    return f"step_{step:08d}"


def list_checkpoints(folder: Path) -> list[Path]:
    """Published checkpoints in the order of their steps: those up to `latest`."""
    latest = folder / "latest"
    if not latest.exists():
        return []
    name = latest.read_text().strip()
    return sorted(path for path in folder.glob("step_*") if path.name <= name)


def _sum(path: Path, flush: bool) -> list[Any]:
    with path.open("rb") as file:
        if flush:
            os.fsync(file.fileno())
        return [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]


def _write(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _flush(folder: Path) -> None:
    """A rename is durable once its folder is."""
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def _random_state() -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
