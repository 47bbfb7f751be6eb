"""Train a student on a prepared corpus, or resume a run from its run directory.

Works as one process, and under torchrun, the deepspeed launcher, srun and mpirun. docs/configuration.md lists every
setting.
"""

import argparse
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from megatron_slm.commands._ranks import connected_ranks
from megatron_slm.config import Config, load_config, parse_config
from megatron_slm.data.corpus import open_corpus
from megatron_slm.errors import UserError, agreed
from megatron_slm.launcher import is_main_process, ranks_started

if TYPE_CHECKING:
    from megatron_slm.training.state import RunState
    from megatron_slm.training.trainer import Callback

EXAMPLES = """examples:
  megatron-slm train run.yaml
  megatron-slm train run.yaml --tensorboard
  megatron-slm train run.yaml --dry-run --ranks 64
  torchrun --nproc-per-node 8 -m megatron_slm train run.yaml training.lr=2.0e-4
  deepspeed --num_gpus 8 --module megatron_slm train run.yaml
  srun python -m megatron_slm train run.yaml
  megatron-slm train run.yaml --rollback 1500 'data.skip_samples=[[6160, 6168]]'

signals: SIGUSR1 saves a checkpoint at the end of the step; SIGUSR2 and SIGTERM save one and stop with exit status 0.
Sending the signal to one rank is enough. torchrun passes SIGTERM on, and kills after 30 s: docs/long-runs.md.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the verb."""
    parser.add_argument("config", metavar="CONFIG.yaml", help="the run's configuration (README.md shows one)")
    parser.add_argument("overrides", metavar="a.b=c", nargs="*", help="settings that override those in the file")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check everything that can be checked without training, estimate cost, memory and disk, and write nothing",
    )
    parser.add_argument(
        "--rollback",
        metavar="N",
        type=int,
        help="resume from the checkpoint of step N; later checkpoints and records are moved to RUN_DIR/rolled-back",
    )
    parser.add_argument(
        "--ranks", metavar="N", type=int, help="number of ranks to check for, with --dry-run (default: as launched)"
    )

    parser.add_argument(
        "--tensorboard",
        metavar="PORT",
        nargs="?",
        const="0",
        help="serve the curves at http://127.0.0.1:PORT on the host of rank 0 until the run ends (default: a free "
        "port, 6006 if possible); write it after CONFIG.yaml and the overrides",
    )


def run(arguments: argparse.Namespace) -> None:
    """Train, or report what a run would do."""
    # Read before any heavy import, so that a typo is reported at once.
    config = agreed(lambda: _read(arguments))
    if arguments.dry_run:
        agreed(lambda: _dry_run(config, arguments.ranks, arguments.rollback))
    else:
        _train(config, (), _rollback(arguments.rollback), _port(arguments.tensorboard))


def train(config: Config | Mapping[str, Any] | str, callbacks: "Sequence[Callback]" = ()) -> "RunState":
    """Train as `megatron-slm train` does; every process of the launcher calls it.

    Args:
        config: the path of a YAML file, its content as nested dicts, or a `Config`.
        callbacks: called at every step on every rank, before the record is written.

    Returns:
        The final state of the run; its `record` is the last one.

    Raises:
        UserError: for anything that the user can correct.
        LostRanksError: other ranks are lost; the run resumes when it is started again, in new processes.
    """
    if isinstance(config, str):
        config = load_config(config, [])
    elif not isinstance(config, Config):
        config = parse_config(dict(config))
    _refuse_missing_data(config)
    return _train(config, callbacks)


def _rollback(step: int | None) -> int | None:
    """Return the step to roll back to; None if a launcher restarted the ranks, with the same command line."""
    restarts = (os.environ.get(name, "0") for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))
    return None if any(count != "0" for count in restarts) else step


def _port(given: str | None) -> int | None:
    """Return the port of `--tensorboard`, 0 for any; None if TensorBoard is not to be served."""
    if given is None:
        return None
    if not (given.isascii() and given.isdecimal() and int(given) < 65536):
        remedy = "Write it after CONFIG.yaml and the overrides, or as --tensorboard=6006"
        raise UserError("--tensorboard", given, "a port is a number from 1 to 65535", remedy)
    return int(given)


def _train(
    config: Config, callbacks: "Sequence[Callback]", rollback: int | None = None, port: int | None = None
) -> "RunState":
    with connected_ranks(config.training) as (world, activity, closing):
        from megatron_slm.build.run import build_run
        from megatron_slm.commands._tensorboard import choose_port, serving
        from megatron_slm.dist import agree

        serves = port is not None and world.is_main
        port = agree(lambda: choose_port(port or 0) if serves else None)
        try:
            run = build_run(config, world, callbacks, rollback, activity)
            closing.callback(run.close)
            agree(lambda: closing.enter_context(serving(run.directory.path, port)) if port is not None else None)
            run.trainer.fit(run.state)
        except BaseException:
            logging.getLogger(__name__).debug("the run stopped", exc_info=True)
            raise
    return run.state


def _read(arguments: argparse.Namespace) -> Config:
    if arguments.ranks is not None and (arguments.ranks < 1 or not arguments.dry_run):
        remedy = "Add --dry-run, or start as many ranks with a launcher such as torchrun"
        raise UserError("--ranks", arguments.ranks, "it applies to --dry-run only, and must be 1 or more", remedy)
    config = load_config(arguments.config, arguments.overrides)
    if _port(arguments.tensorboard) is not None and "tensorboard" not in config.training.loggers:
        remedy = "Add tensorboard to training.loggers, or leave --tensorboard out"
        raise UserError("training.loggers", config.training.loggers, "--tensorboard shows TensorBoard's files", remedy)
    _refuse_missing_data(config)
    return config


def _refuse_missing_data(config: Config) -> None:
    """Raise an error for a wrong path to a corpus, the most common error, before any heavy import."""
    for setting, prefix in config.data.corpora():
        open_corpus(prefix, setting)


def _dry_run(config: Config, ranks: int | None, rollback: int | None) -> None:
    from megatron_slm.build.report import dry_run

    report = dry_run(config, ranks or int(ranks_started(os.environ)), rollback)
    if is_main_process(os.environ):
        sys.stdout.write(report)
