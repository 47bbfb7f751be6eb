"""Record and analyse the losses of the same tokens over the checkpoints of a run.

tokens      score the observed tokens at every kept checkpoint that is not recorded yet, and write all losses to
            RUN_DIR/observed/tokens.parquet; works as one process or under torchrun, and resumes after a kill
dynamics    the four classes of Rho-1, section 2.1: which losses fall, rise, stay high or stay low
selections  what is selected: by source, kind of token and position, and how it changes over training

By default, 320,000 tokens of the run's evaluation sets are observed. docs/analysis.md explains all figures.
"""

import argparse
import logging
import os
import sys
from pathlib import Path

from megatron_slm.commands._ranks import connected_ranks
from megatron_slm.config import load_run_config
from megatron_slm.errors import UserError, agreed
from megatron_slm.launcher import refuse_several_ranks
from megatron_slm.settings import parse_quantity

EXAMPLES = """examples:
  megatron-slm analyze tokens runs/slm
  torchrun --nproc-per-node 8 -m megatron_slm analyze tokens runs/slm
  megatron-slm analyze tokens runs/clm --reference models/reference --corpus math=data/math --tokens 1M
  megatron-slm analyze dynamics runs/slm
  megatron-slm analyze selections runs/slm --csv selections

Checkpoints of DeepSpeed are pickles, so analyze only runs that you trust.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the verb."""
    parser.add_argument("what", choices=("tokens", "dynamics", "selections"), help="what to analyze")
    parser.add_argument("run_dir", metavar="RUN_DIR", help="run directory")
    parser.add_argument(
        "--folder", type=Path, metavar="DIR", help="folder of the recorded losses; default: RUN_DIR/observed"
    )
    tokens = parser.add_argument_group("tokens")
    tokens.add_argument(
        "--corpus",
        metavar="NAME=PREFIX",
        action="append",
        default=[],
        help="a corpus to observe; may be repeated; default: the evaluation sets of the run",
    )
    tokens.add_argument("--tokens", metavar="N", help="number of tokens to observe, such as 320k (the default)")
    tokens.add_argument("--reference", metavar="PATH", help="reference to record; default: that of the run")
    figures = parser.add_argument_group("dynamics, selections")
    figures.add_argument("--first", type=int, default=0, metavar="STEP", help="leave out earlier steps")
    figures.add_argument(
        "--change", type=float, default=0.2, metavar="NATS", help="fitted change that counts (default: 0.2, the paper)"
    )
    figures.add_argument("--csv", type=Path, metavar="DIR", help="also write the tables as CSV files to this folder")


def run(arguments: argparse.Namespace) -> None:
    """Record the losses of the observed tokens, or print tables of them."""
    folder = arguments.folder or Path(arguments.run_dir) / "observed"
    if arguments.what == "tokens":
        _record(arguments, folder)
        return
    refuse_several_ranks(f"analyze {arguments.what}", os.environ)
    load_run_config(arguments.run_dir)
    from megatron_slm.analysis.tables import dynamics_tables, selection_tables, write_csv
    from megatron_slm.analysis.texts import observed_texts
    from megatron_slm.data.observed import ObservedFolder

    if not ObservedFolder(folder).exists:
        remedy = f"Run megatron-slm analyze tokens {arguments.run_dir} first"
        raise UserError("RUN_DIR", arguments.run_dir, "no losses of observed tokens are recorded", remedy)
    observed = ObservedFolder(folder).read()
    texts = observed_texts(observed, arguments.run_dir)
    if arguments.what == "dynamics":
        tables = dynamics_tables(observed, texts, arguments.first, arguments.change)
    else:
        tables = selection_tables(observed, texts, arguments.first)
    sys.stdout.write("\n\n".join(f"{table.title}\n\n{table.text()}" for table in tables) + "\n")
    if arguments.csv is not None:
        write_csv(tables, arguments.csv)


def _record(arguments: argparse.Namespace, folder: Path) -> None:
    config = agreed(lambda: load_run_config(arguments.run_dir))
    corpora, num_tokens = agreed(lambda: (_corpora(arguments.corpus), _num_tokens(arguments.tokens)))
    with connected_ranks(config.training) as (world, activity, _):
        from megatron_slm.analysis.table import write_table
        from megatron_slm.analysis.texts import observed_texts
        from megatron_slm.build.observed import TokenAnalysis, analyze_tokens
        from megatron_slm.data.observed import ObservedFolder

        analysis = TokenAnalysis(arguments.run_dir, folder, corpora, num_tokens, arguments.reference)
        steps = analyze_tokens(config, analysis, world, activity)
        if world.is_main:
            observed = ObservedFolder(folder).read()
            write_table(observed, observed_texts(observed, arguments.run_dir), folder / "tokens.parquet")
            log = logging.getLogger(__name__).info
            log("%s: %s tokens at %d steps", folder / "tokens.parquet", f"{len(observed):,}", len(steps))


def _corpora(named: list[str]) -> dict[str, str]:
    corpora = {}
    for text in named:
        name, separator, prefix = text.partition("=")
        if not (name and separator and prefix):
            raise UserError("--corpus", text, "it is not NAME=PREFIX", "Write one such as math=data/math")
        corpora[name] = prefix
    return corpora


def _num_tokens(text: str | None) -> int | None:
    number = parse_quantity(text) if text is not None else None
    if number is not None and (not isinstance(number, int) or number < 1):
        raise UserError("--tokens", text, "it must be a whole number above 0", "Write one such as 320k")
    return number
