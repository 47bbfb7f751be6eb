"""A store that several commands write: each scores one part of the shards, and a merge joins the parts.

The merge copies the bytes of all parts, and adds their sums in the order in which one command adds them, so the merged
store equals the store of one command.
"""

import logging
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_slm.errors import UserError
from megatron_slm.io.files import refuse_taken
from megatron_slm.io.progress import Meter
from megatron_slm.io.shards import OPTION, FinishedShard, ShardPlan, Shards, WorkShard
from megatron_slm.io.staging import Staging
from megatron_slm.reference.scoring import SourcePart
from megatron_slm.reference.store import BlockChecksums, FileEntry, Manifest
from megatron_slm.reference.store_writer import FileProgress, NewFile, StoreWriter, publish_store
from megatron_slm.signals import ENCODINGS

logger = logging.getLogger(__name__)

_SETTING = "score.output"
_AGAIN = "Copy it again, or remove that folder and score again"


def open_parts(output: str) -> Shards:
    """Return the parts of the store `output`."""
    return Shards(Path(output), _SETTING, "scoring")


def plan_facts(manifest: Manifest, entries: Sequence[FileEntry], shards_of: Sequence[int]) -> dict[str, Any]:
    """Return what the merge needs to know of the whole store.

    Args:
        manifest: the description of the store, without its files.
        entries: name, rows and corpus of each file.
        shards_of: number of shards of each file.
    """
    files = [asdict(entry) for entry in entries]
    return {"manifest": asdict(manifest), "files": files, "shards": list(shards_of)}


def refuse_small_parts(total: int, shard: WorkShard) -> None:
    """Raise a UserError if a store of `total` shards cannot be divided into so many parts.

    Raises:
        UserError: a part would be empty.
    """
    if total < shard.count:
        reason = f"the tokens are scored in only {total} pieces of score.shard_tokens"
        raise UserError(OPTION, str(shard), reason, f"Use {total} shards or fewer, or lower score.shard_tokens")


def part_of(files: list[NewFile], shard: WorkShard) -> list[NewFile]:
    """Return the files of one part, each with its share of the shards of the whole file."""
    before, parts = 0, []
    mine = shard.of(sum(file.source.num_shards for file in files))
    for file in files:
        count = file.source.num_shards
        first, last = (min(max(bound - before, 0), count) for bound in (mine.start, mine.stop))
        if first < last:
            parts.append(replace(file, source=SourcePart(file.source, first, last)))
        before += count
    return parts


def finish_part(writer: StoreWriter, shards: Shards, staging: Staging, plan: ShardPlan) -> None:
    """Publish one part, whose files are complete."""
    shards.finish(staging, plan, {"files": writer.progress()})


def merge_store(output: str) -> None:
    """Merge the parts of a store.

    Raises:
        UserError: parts are missing, unfinished, changed or of another command, or something exists at `output`.
    """
    path = Path(output)
    refuse_taken(_SETTING, path)
    plan, parts = open_parts(output).collect(_describe)
    manifest = Manifest(**plan.facts["manifest"])
    entries = [FileEntry(**entry) for entry in plan.facts["files"]]
    staging = Staging(path, _SETTING, "merging")
    with staging.open(), Meter(sum(entry.rows for entry in entries), "tokens") as meter:
        staging.clear()
        merged, done = [], 0
        for entry in entries:
            with staging.writing():
                merged.append(_merge_file(entry, parts, manifest, staging.ready, meter, done))
            done += entry.rows
        refuse_taken(_SETTING, path)
        publish_store(replace(manifest, files=merged), staging)
    logger.info("the shards in %s are no longer needed", open_parts(output).folder)


def _merge_file(
    entry: FileEntry, parts: list[FinishedShard], manifest: Manifest, ready: Path, meter: Meter, done: int
) -> FileEntry:
    row_bytes = np.dtype(ENCODINGS[manifest.encoding].dtype).itemsize * len(manifest.columns)
    whole, blocks = FileProgress(), BlockChecksums(row_bytes)
    with (ready / f"{entry.name}.scores").open("wb") as stream:
        for part in parts:
            if entry.name not in part.report["files"]:
                continue
            progress = FileProgress(**part.report["files"][entry.name])
            whole.clipped += progress.clipped
            for data, (rows, checksum), totals in _read_part(part, entry.name, progress, row_bytes):
                stream.write(data)
                blocks.feed(data)
                whole.add(rows, checksum, totals, clipped=0)
                meter.reach(done + whole.rows)
        table = blocks.table()
        stream.write(table)
    assert whole.rows == entry.rows, f"{entry.name} has {whole.rows} rows instead of {entry.rows}"
    return whole.complete(entry, manifest.columns, zlib.crc32(table))


def _read_part(
    part: FinishedShard, name: str, progress: FileProgress, row_bytes: int
) -> Iterator[tuple[bytes, tuple[int, int], list[float]]]:
    """Yield the bytes of each shard of a part, with its rows and checksum, and its sums.

    Raises:
        UserError: the file is missing or has changed.
    """
    path = part.folder / f"{name}.scores"
    try:
        with path.open("rb") as stream:
            for (rows, checksum), totals in zip(progress.shards, progress.totals, strict=True):
                data = stream.read(rows * row_bytes)
                if len(data) != rows * row_bytes or zlib.crc32(data) != checksum:
                    reason = f"{path} has changed since it was written"
                    raise UserError(
                        "--merge", part.folder, reason, "Copy it again, or remove that folder and score again"
                    )
                yield data, (rows, checksum), totals
    except OSError as error:
        reason = f"{path} cannot be read ({error})"
        raise UserError(
            "--merge", part.folder, reason, "Copy it again, or remove that folder and score again"
        ) from error


def _describe(plan: ShardPlan, shard: WorkShard, progress: dict[str, Any]) -> str:
    done = sum(len(file["shards"]) for file in progress["files"].values())
    return f"{done} of {len(shard.of(sum(plan.facts['shards'])))} pieces of score.shard_tokens"
