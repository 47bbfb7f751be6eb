"""Train a student on a prepared corpus, resumed where its run folder stands.

Works alone as one process, and under torchrun, the deepspeed launcher and srun.
"""

import argparse
import logging
import os
import sys

from megatron_slm.config import Config, load_config
from megatron_slm.errors import AgreedError, UserError

_EPILOG = """examples:
  megatron-slm train run.yaml
  torchrun --nproc-per-node 8 -m megatron_slm train run.yaml training.lr=2.0e-4
  deepspeed --num_gpus 8 --module megatron_slm train run.yaml
  srun python -m megatron_slm train run.yaml
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the verb."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EPILOG
    parser.add_argument("config", metavar="CONFIG.yaml", help="the run's configuration (README.md shows one)")
    parser.add_argument("overrides", metavar="a.b=c", nargs="*", help="settings that replace those in the file")


def run(arguments: argparse.Namespace) -> None:
    """What all ranks agree on, rank 0 alone says; what one rank alone has met, that rank says."""
    is_main = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"
    try:
        # Read before anything heavy is imported: a typo answers at once.
        _train(_read_config(arguments))
    except AgreedError:
        if not is_main:
            sys.exit(2)
        raise


def _read_config(arguments: argparse.Namespace) -> Config:
    """Every rank reads the same file and finds the same error."""
    try:
        return load_config(arguments.config, arguments.overrides)
    except UserError as error:
        raise AgreedError(str(error)) from error


def _train(config: Config) -> None:
    from transformers.utils.logging import disable_progress_bar

    from megatron_slm.build import build_run
    from megatron_slm.dist import connect, disconnect, gather_objects

    world = connect(config.training.timeout_minutes)
    if not (world.is_main and sys.stderr.isatty()):
        disable_progress_bar()
    try:
        run = build_run(config, world)
        run.trainer.fit(run.state)
        # Rank 0 may host the store: it must not leave while another rank still talks to it.
        gather_objects(None)
    except BaseException:
        logging.getLogger(__name__).debug("the run stopped", exc_info=True)
        raise
    finally:
        disconnect()
