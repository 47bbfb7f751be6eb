"""Preparation by several processes: each encodes one shard of the inputs, and a merge joins the shards.

A shard gets consecutive inputs, so the merge equals the preparation of all inputs at once, byte for byte.
"""

import logging
import shutil
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from megatron_slm.data.corpus import Corpus, open_corpus
from megatron_slm.data.tokenizer import load_tokenizer, tokenizer_probe
from megatron_slm.errors import UserError
from megatron_slm.io.shards import OPTION, FinishedShard, ShardPlan, Shards, WorkShard
from megatron_slm.io.staging import Staging
from megatron_slm.prepare.contamination import MARKS, REPORT_SUFFIX, ContaminationReport
from megatron_slm.prepare.inputs import Input
from megatron_slm.prepare.merge import Mergeable, open_mergeable, stage_merged
from megatron_slm.prepare.prepare import Options, deciding_settings, make_corpora
from megatron_slm.prepare.staged import MAX_GROUPS, make_at_once, refuse_existing, safe_name

logger = logging.getLogger(__name__)

_DOING = "preparing"


def prepare_shard(inputs: list[Input], output: str, options: Options, shard: WorkShard) -> None:
    """Encode one shard of the inputs into a folder beside `output`; see `prepare_corpora`.

    A finished shard is left as it is; an unfinished one is resumed.

    Args:
        inputs: all inputs, the same for every shard.
        output: PREFIX of the merged corpus.
        options: with a tokenizer that exists, because all shards must use the same.
        shard: the shard to encode.

    Raises:
        UserError: as `prepare_corpora`; or there are more shards than inputs, or shards of another command.
    """
    if options.tokenizer is None:
        reason = "each shard would train another tokenizer on its own inputs"
        remedy = f"Train one on a sample, without {OPTION}, and give its PREFIX.tokenizer with --tokenizer"
        raise UserError("--train-tokenizer", options.train_size, reason, remedy)
    if shard.count > len(inputs):
        remedy = f"Use {len(inputs)} shards or fewer, or split the inputs"
        raise UserError(OPTION, str(shard), f"there are only {len(inputs)} inputs to divide", remedy)
    if options.fields.by is None:
        refuse_existing(Path(output))
    shards = Shards(Path(output), "--output", _DOING)
    entries = [[source.name, *source.stamp()[:1]] for source in inputs]
    plan = shards.begin(shard, _settings(options, entries), {"evaluation": list(options.evaluation)})
    staging = shards.staging(shard)
    with staging.open():
        if shards.is_finished(shard):
            return
        mine = deal(entries, shard.count)[shard.index]
        progress = make_corpora([inputs[number] for number in mine], staging, options, may_be_empty=True)
        if options.evaluation:
            shutil.copyfile(staging.folder / MARKS, staging.ready / MARKS)
        names = [[value, state["name"]] for value, state in progress.corpora.items()]
        shards.finish(staging, plan, {"corpora": names, "skipped": progress.skipped})


def merge_shards(output: str) -> list[Corpus]:
    """Merge the shards of a preparation into the corpus `output`, or into one per value of --by.

    Raises:
        UserError: shards are missing, unfinished or damaged, or something exists at `output`.
    """
    prefix = Path(output)
    plan, finished = Shards(prefix, "--output", _DOING).collect(_describe)
    groups = _groups(prefix, plan, finished)
    skipped = sum(shard.report["skipped"] for shard in finished)
    report = _merged_report(plan, finished)
    suffixes = () if report is None else (REPORT_SUFFIX,)

    def refuse() -> None:
        for name in groups:
            refuse_existing(prefix.with_name(name))
        refuse_existing(prefix, suffixes)

    def make(ready: Path) -> None:
        for name, parts in groups.items():
            stage_merged(parts, ready, name, skipped)
        if report is not None:
            report.write(ready / f"{prefix.name}{REPORT_SUFFIX}")

    identity = {"--merge": [parts.identity() for parts in groups.values()], "--shard": plan.digest()}
    make_at_once(Staging(prefix, "--output", _DOING), identity, refuse, make)
    merged = [open_corpus(str(prefix.with_name(name))) for name in groups]
    for corpus in merged:
        logger.info("%s: %d shards, %d documents, %d tokens", corpus.prefix, plan.count, *_size(corpus))
    logger.info("the shards in %s are no longer needed", Shards(prefix, "--output", _DOING).folder)
    return merged


def deal(entries: Sequence[Sequence[Any]], count: int) -> list[range]:
    """Divide inputs among shards: consecutive ones, at least one for each, of about equal size.

    Args:
        entries: name, and size in bytes if it is known, of each input.
        count: number of shards, at most the number of inputs.
    """
    sizes = [entry[1] if len(entry) > 1 else 0 for entry in entries]
    # An input of unknown or no size still costs something; without sizes, each shard gets as many inputs.
    weight_N = np.array(sizes, dtype=np.float64) + max(1.0, sum(sizes) / len(sizes) / 1000)
    middle_N = np.cumsum(weight_N) - weight_N / 2
    cuts = np.searchsorted(middle_N, weight_N.sum() * np.arange(1, count) / count).tolist()
    bounds = [0, *cuts, len(entries)]
    for place in range(1, count):  # every shard gets one at least, and leaves one for each after it
        bounds[place] = min(max(bounds[place], bounds[place - 1] + 1), len(entries) - count + place)
    return [range(first, last) for first, last in pairwise(bounds)]


def _settings(options: Options, entries: list[list[Any]]) -> dict[str, Any]:
    tokenizer = load_tokenizer(str(options.tokenizer), options.end_token)
    report = ContaminationReport(list(options.evaluation)) if options.evaluation else None
    # Sizes decide how inputs are dealt, so no input may change until all shards are finished.
    return deciding_settings(options, entries, tokenizer, report) | {
        "--input": entries,
        "the ids of --tokenizer": tokenizer_probe(tokenizer),
    }


def _describe(plan: ShardPlan, shard: WorkShard, progress: dict[str, Any]) -> str:
    return f"{len(progress['finished'])} of {len(deal(plan.settings['--input'], plan.count)[shard.index])} inputs"


def _groups(prefix: Path, plan: ShardPlan, finished: list[FinishedShard]) -> dict[str, Mergeable]:
    """Return the corpora to merge by the name of the merged corpus, in the order of their first documents."""
    by_value: dict[str, list[str]] = {}
    for shard in finished:
        for value, name in shard.report["corpora"]:
            by_value.setdefault(value, []).append(str(shard.folder / name))
    if not by_value:
        raise UserError("--merge", prefix, "its shards hold no text", "Give files with text")
    by = plan.settings.get("--by")
    if len(by_value) > MAX_GROUPS:
        raise UserError("--by", by, f"it has more than {MAX_GROUPS:,} values", "Choose a field with fewer values")
    groups: dict[str, Mergeable] = {}
    for value, prefixes in by_value.items():
        name = prefix.name if by is None else safe_name(prefix.name, value, list(groups))
        groups[name] = open_mergeable(prefixes)
    return groups


def _merged_report(plan: ShardPlan, finished: list[FinishedShard]) -> ContaminationReport | None:
    """Return the report of all shards.

    Raises:
        UserError: an evaluation file cannot be read, or has changed since the shards were made.
    """
    names = plan.facts["evaluation"]
    if not names:
        return None
    report = ContaminationReport(names)
    if report.fingerprint() != plan.settings["--contamination"]:
        reason = "the files have changed since the shards were made"
        raise UserError("--contamination", " ".join(names), reason, "Restore them")
    for shard in finished:
        report.add_marks(shard.folder / MARKS)
    return report


def _size(corpus: Corpus) -> tuple[int, int]:
    return corpus.num_documents, corpus.num_tokens
