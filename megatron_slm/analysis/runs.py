"""What a run directory holds about its run, read without its corpora and models."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_slm.config import Config, load_run_config
from megatron_slm.data.observed import Observations, ObservedFolder
from megatron_slm.data.tokenizer import TokenizerIdentity, load_tokenizer, tokenizer_identity
from megatron_slm.errors import UserError
from megatron_slm.reporting.records import Records, read_records

AXES = {
    "tokens": ("trained_tokens", "trained tokens"),
    "selected": ("consumed_selected_tokens", "tokens in the loss"),
    "flops": ("flops", "FLOPs of all models"),
    "seconds": ("seconds", "seconds of training"),
}
"""The horizontal axes that runs are drawn against: the key in a record, and the title."""


@dataclass(frozen=True)
class RunFiles:
    """A run, as its directory describes it.

    name         short name, unique among the runs that are read together
    path         run directory
    config       its resolved configuration
    records      lines of `metrics.jsonl`, each with the cumulative `seconds` of its steps
    spikes       lines of `spikes.jsonl`
    environment  content of `environment.json`
    observed     losses of its observed tokens; None if there are none
    tokenizer    identity of its tokenizer; None for a run of a version that did not keep it
    vocabulary   number of entries of its tokenizer; None as above
    """

    name: str
    path: Path
    config: Config
    records: Records
    spikes: Records
    environment: dict[str, Any]
    observed: Observations | None
    tokenizer: TokenizerIdentity | None
    vocabulary: int | None

    @property
    def last(self) -> dict[str, Any]:
        """The newest record."""
        return self.records[-1]

    @property
    def evaluation_sets(self) -> list[str]:
        """The names of the sets that were evaluated at least once, in the order of the configuration."""
        found = {key.split("/")[1] for record in self.records for key in record if key.startswith("eval/")}
        return [name for name in self.config.data.valid if name in found] + sorted(
            found - self.config.data.valid.keys()
        )

    @property
    def is_finished(self) -> bool:
        """True if the run has reached the length in its configuration, as far as that is known in tokens."""
        planned = self.config.training.train_tokens
        return planned is None or self.last["trained_tokens"] >= planned

    def curve(self, key: str, axis: str) -> list[tuple[float, float]]:
        """Return the points of a metric along an axis of `AXES`; undefined values are left out."""
        along = AXES[axis][0]
        points = ((record.get(along), record.get(key)) for record in self.records)
        return [(float(x), float(y)) for x, y in points if x is not None and y is not None]


def read_run(path: Path, name: str) -> RunFiles:
    """Read a run directory, also while the run trains.

    Raises:
        UserError: it is no run directory, it has no record yet, or a file cannot be read.
    """
    config = load_run_config(str(path))
    records = read_records(path / "metrics.jsonl")
    if not records:
        raise UserError("RUN_DIR", path, "its run has not logged a step yet", "Wait for the first record")
    if "trained_tokens" not in records[-1] or "loss/all" not in records[-1]:
        reason = "its records lack trained_tokens or loss/all, because an earlier version wrote them"
        raise UserError("RUN_DIR", path, reason, "Resume it for a step with this version, or leave it out")
    folder = ObservedFolder(path / "observed")
    tokenizer = load_tokenizer(str(path / "tokenizer")) if (path / "tokenizer").is_dir() else None
    return RunFiles(
        name,
        path,
        config,
        _with_seconds(records),
        read_records(path / "spikes.jsonl"),
        _environment(path / "environment.json"),
        folder.read() if folder.exists and folder.steps() else None,
        tokenizer_identity(tokenizer) if tokenizer else None,
        len(tokenizer) if tokenizer else None,
    )


def read_runs(paths: list[str]) -> list[RunFiles]:
    """Read several run directories; runs with the same basename get longer names.

    Raises:
        UserError: as `read_run`, or a directory is given twice.
    """
    folders = [Path(path) for path in paths]
    for index, folder in enumerate(folders):
        if folder.resolve() in [other.resolve() for other in folders[:index]]:
            raise UserError("RUN_DIR", folder, "it is given twice", "Give each run once")
    parts = 1
    while len({_name(folder, parts) for folder in folders}) < len(folders):
        parts += 1
    return [read_run(folder, _name(folder, parts)) for folder in folders]


def _name(folder: Path, parts: int) -> str:
    return "/".join(folder.resolve().parts[-parts:])


def _with_seconds(records: Records) -> Records:
    """Return the records with `seconds`, the time of all steps so far; a record's own time is a mean of its steps."""
    seconds, before, timed = 0.0, 0, []
    for record in records:
        seconds += (record.get("step_seconds") or 0.0) * (record["step"] - before)
        before = record["step"]
        timed.append({"seconds": seconds, "consumed_selected_tokens": record["trained_tokens"], **record})
    return timed


def _environment(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found
    except FileNotFoundError:
        return {"starts": []}
    except ValueError as error:
        raise UserError("RUN_DIR", path.parent, f"{path.name} cannot be read ({error})", "Restore the file") from error
