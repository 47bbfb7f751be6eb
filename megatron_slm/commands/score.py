"""Score every token of a run, or of a corpus, with the reference once, so that training reads the losses.

By default, the samples of the run that CONFIG.yaml describes are scored as a live reference would see them. With
score.kind=document, the corpora are scored document by document, for any order of samples: data.train, reference.path
and score.output are enough for that. Works alone as one process, and under torchrun, the deepspeed launcher, mpirun and
srun. After a kill, the same command resumes. docs/score.md compares the two kinds.
"""

import argparse
import logging
import os
import sys
from pathlib import Path
from typing import Any

from megatron_slm.commands._partial import parse_partial
from megatron_slm.config import Config
from megatron_slm.config_file import read_tree
from megatron_slm.data.corpus import open_corpus
from megatron_slm.data.settings import blend
from megatron_slm.errors import AgreedError, UserError, agreed
from megatron_slm.launcher import is_main_process
from megatron_slm.reference.settings import ScoreSettings

_EPILOG = """examples:
  megatron-slm score run.yaml score.output=scores/run
  megatron-slm train run.yaml reference.store=scores/run
  torchrun --nproc-per-node 8 -m megatron_slm score run.yaml score.output=scores/run reference.micro_batch_size=64
  megatron-slm score run.yaml score.output=scores/web score.kind=document
  megatron-slm score run.yaml score.output=scores/web score.kind=document --import logprobs.npy
  megatron-slm score run.yaml score.output=scores/run --verify

--import: one .npy (a log-probability, in nats, for every token of PREFIX.bin) or .jsonl ({"logprobs": [...]}, a line a
document, its end-of-document token included) for each corpus of data.train, in their order.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the verb."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EPILOG
    parser.add_argument("config", metavar="CONFIG.yaml", help="a run's configuration, or the part that is needed")
    parser.add_argument("overrides", metavar="a.b=c", nargs="*", help="settings that replace those in the file")
    parser.add_argument(
        "--import",
        dest="imports",
        metavar="FILE",
        type=Path,
        action="append",
        default=[],
        help="take log-probabilities that were computed elsewhere; once for each corpus",
    )
    parser.add_argument("--verify", action="store_true", help="read an existing store, and compare its checksums")


def run(arguments: argparse.Namespace) -> None:
    """Score, import or verify."""
    config, settings = agreed(lambda: _read(arguments))
    if arguments.verify:
        _verify(settings.output)
    else:
        _score(config, settings, arguments.imports)


def _read(arguments: argparse.Namespace) -> tuple[Config, ScoreSettings]:
    tree = read_tree(arguments.config, arguments.overrides)
    score = tree.get("score")
    packed = isinstance(score, dict) and not arguments.verify and score.get("kind", "packed") == "packed"
    if packed and "training" not in tree:
        raise UserError(
            "score.kind is packed, which scores the samples of one run, but there is no training group. Add the run's "
            "training group, or set score.kind=document to score the corpora for any order of samples."
        )
    config = parse_partial(tree, whole_training=packed)
    if config.score is None:
        raise UserError("score.output is not set: name the folder to make, as in score.output=scores/web.")
    if arguments.imports and (packed or config.score.entropy):
        raise UserError(
            "--import takes one loss per token of each corpus. Set score.kind=document and no score.entropy."
        )
    if arguments.imports and arguments.verify:
        raise UserError("--verify reads what is there: leave --import out.")
    for prefix in blend(config.data.train)[0]:
        open_corpus(prefix)
    return config, config.score


def _verify(path: str) -> None:
    from megatron_slm.io.progress import Meter
    from megatron_slm.reference.store import open_store

    store = open_store(path, "score.output")
    with Meter(sum(entry.rows for entry in store.manifest.files), "tokens") as meter:
        before = 0
        for entry in store.manifest.files:
            for done in store.file_of(entry.name).check_all():
                meter.reach(before + done)
            before += entry.rows
    logging.getLogger(__name__).info("%s is intact: %d tokens", path, before)


def _score(config: Config, settings: ScoreSettings, imports: list[Path]) -> Any:
    if is_main_process(os.environ):
        logging.getLogger(__name__).info("loading the libraries, the corpora and the model")
    from transformers.utils.logging import disable_progress_bar

    from megatron_slm.build.scoring import score_corpora
    from megatron_slm.dist import connect, disconnect

    world = connect(config.training.timeout_minutes)
    if not (world.is_main and sys.stderr.isatty()):
        disable_progress_bar()
    try:
        if imports and world.size > 1:
            raise AgreedError(f"--import was started on {world.size} ranks: start one process.")
        score_corpora(config, settings, world, imports)
    finally:
        disconnect()
