"""Show the whole method here, in minutes: real text, a base, a reference, CLM against SLM, and a picture.

The text is on this disk already: docstrings of sympy and mpmath are the mathematics, sources and licences of
Python and the installed packages the rest. Everything is kept in one folder; a demo that was stopped goes on
there when it is started again.
"""

import argparse
import shutil
import sys
from pathlib import Path

_EPILOG = """example:
  megatron-slm demo --output demo
  megatron-slm demo --output demo-quick --quick
"""

_CLOSING = """
Look at   {folder}/demo.png       held-out losses over training tokens
          {folder}/selected.html  held-out text, token by token: what is selected
          {bin}tensorboard --logdir {folder}/runs --host 127.0.0.1
Go on     {bin}megatron-slm export {folder}/runs/slm {folder}/models/slm
          writes the selectively trained model for transformers
          {folder}/runs/slm.yaml  is its configuration: change it, and `megatron-slm train` it in a run_dir of its own
          README.md, "Your own text, from the laptop to the cluster"
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the verb."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EPILOG
    parser.add_argument(
        "--output", metavar="DIR", type=Path, default=Path("demo"), help="folder to make (default: %(default)s)"
    )
    parser.add_argument("--ranks", metavar="N", type=int, default=2, help="processes a run (default: %(default)s)")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a few steps on a little text: every stage runs, but the losses say nothing",
    )


def run(arguments: argparse.Namespace) -> None:
    """Check, run the stages, and say what came out and where it is.

    Raises:
        UserError: the machine or the options will not do, or a stage failed.
    """
    from megatron_slm.demo.chain import FULL, QUICK, SAMPLES_PER_STEP, Folders, demo_stages
    from megatron_slm.demo.machine import check_folder, check_machine, check_ranks, hold_folder
    from megatron_slm.demo.stages import Stages, StoppedError, stop_on_signals

    folder = arguments.output.absolute()
    options = {"ranks": arguments.ranks, "quick": arguments.quick}
    check_ranks(arguments.ranks, SAMPLES_PER_STEP)
    check_folder(folder, options)
    check_machine(folder)
    folders = Folders(folder)
    stages = demo_stages(folders, QUICK if arguments.quick else FULL, arguments.ranks)
    try:
        with hold_folder(folder, options), stop_on_signals() as stop:
            Stages(folders.stages, stages, arguments.ranks).run(stop)
    except StoppedError as stopped:
        sys.stderr.write(
            f"megatron-slm demo: {stopped}; nothing is left running. The same command goes on from here.\n"
        )
        sys.exit(stopped.status)
    summary = folders.summary.read_text(encoding="utf-8")
    sys.stdout.write(f"\n{summary}{_CLOSING.format(folder=arguments.output, bin=_place())}")


def _place() -> str:
    """What stands before a command that the shell does not find: nothing, or the folder of this environment."""
    if shutil.which("megatron-slm"):
        return ""
    folder = Path(sys.executable).parent
    return f"{folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder}/"
