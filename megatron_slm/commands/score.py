"""Score every token of a run, or of a corpus, with the reference once, so that training can read the losses.

By default, the samples of the run that CONFIG.yaml describes are scored in the context that a live reference would see.
With score.kind=document, the corpora are scored document by document, for any order of samples; data.train,
reference.path and score.output are enough for that. Start it as one process, or with torchrun, the deepspeed launcher,
mpirun or srun. After a kill, the same command resumes. docs/score.md compares the two kinds.
"""

import argparse
import logging
import os
from pathlib import Path

from megatron_slm.commands._partial import parse_partial
from megatron_slm.commands._ranks import connected_ranks
from megatron_slm.config import Config
from megatron_slm.config_file import read_tree
from megatron_slm.data.corpus import open_corpus
from megatron_slm.data.settings import blend
from megatron_slm.errors import AgreedError, UserError, agreed
from megatron_slm.io.shards import HELP, WorkShard, parse_shard
from megatron_slm.launcher import refuse_several_ranks
from megatron_slm.reference.settings import ScoreSettings

EXAMPLES = """examples:
  megatron-slm score run.yaml score.output=scores/run
  megatron-slm train run.yaml reference.store=scores/run
  torchrun --nproc-per-node 8 -m megatron_slm score run.yaml score.output=scores/run reference.micro_batch_size=64
  megatron-slm score run.yaml score.output=scores/web score.kind=document
  megatron-slm score run.yaml score.output=scores/web score.kind=document --import logprobs.npy
  megatron-slm score run.yaml score.output=scores/run --verify
  on many nodes: each task of a Slurm array writes one part, and the last command merges them:
    torchrun --nproc-per-node 8 -m megatron_slm score run.yaml score.output=scores/run --shard 0/8
    megatron-slm score run.yaml score.output=scores/run --merge

--import: for each corpus of data.train, in the same order, one .npy (a log-probability in nats for every token of
PREFIX.bin) or .jsonl (a line {"logprobs": [...]} per document, its end-of-document token included).
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the verb."""
    parser.add_argument("config", metavar="CONFIG.yaml", help="configuration of a run; score reads a part of it")
    parser.add_argument("overrides", metavar="a.b=c", nargs="*", help="settings that replace those in the file")
    parser.add_argument(
        "--import",
        dest="imports",
        metavar="FILE",
        type=Path,
        action="append",
        default=[],
        help="store log-probabilities that were computed elsewhere; give it once for each corpus",
    )
    parser.add_argument("--shard", metavar="I/N", help=HELP)
    parser.add_argument("--merge", action="store_true", help="merge the shards that --shard has made")
    parser.add_argument("--verify", action="store_true", help="check all checksums of an existing store")


def run(arguments: argparse.Namespace) -> None:
    """Write a store from a model or from imported files, or verify an existing one."""
    shard = agreed(lambda: parse_shard(arguments.shard, os.environ))
    config, settings = agreed(lambda: _read(arguments))
    if arguments.verify:
        _verify(settings.output)
    elif arguments.merge:
        from megatron_slm.reference.store_parts import merge_store

        merge_store(settings.output)
    else:
        _score(config, settings, arguments.imports, shard)


def _read(arguments: argparse.Namespace) -> tuple[Config, ScoreSettings]:
    _check_modes(arguments)
    tree = read_tree(arguments.config, arguments.overrides)
    score = tree.get("score")
    reads_only = arguments.verify or arguments.merge
    packed = isinstance(score, dict) and not reads_only and score.get("kind", "packed") == "packed"
    if packed and "training" not in tree:
        reason = "it scores the samples of one run, and the configuration has no group training"
        remedy = "Add the group training of the run, or set score.kind=document, which serves any order of samples"
        raise UserError("score.kind", "packed", reason, remedy)
    config = parse_partial(tree, whole_training=packed)
    if config.score is None:
        raise UserError("score.output", None, "the store needs a folder", "Set it, as in score.output=scores/web")
    _check_imports(arguments, config.score)
    for prefix in blend(config.data.train)[0]:
        open_corpus(prefix, "data.train")
    return config, config.score


def _check_modes(arguments: argparse.Namespace) -> None:
    """Raise a UserError if options contradict each other."""
    if arguments.merge:
        refuse_several_ranks("score --merge", os.environ)
    given = [
        ("--shard", arguments.shard),
        ("--merge", arguments.merge or None),
        ("--verify", arguments.verify or None),
        ("--import", ", ".join(map(str, arguments.imports)) or None),
    ]
    present = [(option, value) for option, value in given if value is not None]
    if len(present) > 1:
        (other, _), (option, value) = present[:2]
        raise UserError(option, value, f"{other} is also given", "Give one of the two options")


def _check_imports(arguments: argparse.Namespace, settings: ScoreSettings) -> None:
    paths = ", ".join(map(str, arguments.imports))
    if not paths:
        return
    if settings.kind != "document":
        reason = f"score.kind is {settings.kind}, and imports hold one loss per token of each corpus"
        raise UserError("--import", paths, reason, "Set score.kind=document")
    if settings.entropy:
        reason = "score.entropy is true, and imports hold only losses"
        raise UserError("--import", paths, reason, "Set score.entropy=false")


def _verify(path: str) -> None:
    from megatron_slm.io.progress import Meter
    from megatron_slm.reference.store import open_store

    store = open_store(path, "score.output")
    tokens = sum(entry.rows for entry in store.manifest.files)
    with Meter(tokens, "tokens") as meter:
        for checked in store.check_all():
            meter.reach(checked)
    logging.getLogger(__name__).info("%s is intact: %d tokens", path, tokens)


def _score(config: Config, settings: ScoreSettings, imports: list[Path], shard: WorkShard | None) -> None:
    with connected_ranks(config.training) as (world, activity, _):
        from megatron_slm.build.scoring import score_corpora

        if imports and world.size > 1:
            paths = ", ".join(map(str, imports))
            reason = f"{world.size} ranks were started, and an import runs in one process"
            raise AgreedError("--import", paths, reason, "Start one process")
        score_corpora(config, settings, world, imports, shard, activity)
