"""Run the whole method on this machine in minutes, on real text.

The stages prepare the text, train a base and a reference, train CLM, SLM, and CLM with the curated text mixed in from
this base, and draw their loss curves. The text is already on this disk: the mathematics comes from docstrings of sympy
and mpmath, and the general text from sources and licences of Python and the installed packages.
All output goes to one folder. A demo that was stopped resumes when it is started again.
"""

import argparse
import shutil
import sys
from pathlib import Path

EXAMPLES = """example:
  megatron-slm demo --output demo
  megatron-slm demo --output demo-quick --quick
"""

_CLOSING = """
Look at   {folder}/demo.png       held-out losses over training tokens
          {folder}/selected.html  held-out text with its selected tokens marked
          {folder}/report.html    report on the three runs: verdict, curves, token losses, selections
          {bin}tensorboard --logdir {folder}/runs --host 127.0.0.1
Continue  {bin}megatron-slm export {folder}/runs/slm {folder}/models/slm
          exports the selectively trained model for transformers
          {folder}/runs/slm.yaml  is its configuration: change it and its run_dir, and train with `megatron-slm train`
          README.md, "Your own text, from laptop to cluster"
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the verb."""
    parser.add_argument(
        "--output", metavar="DIR", type=Path, default=Path("demo"), help="folder to create (default: %(default)s)"
    )
    parser.add_argument("--ranks", metavar="N", type=int, default=2, help="processes per run (default: %(default)s)")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="run every stage, but only for a few steps on a little text; the losses are meaningless",
    )


def run(arguments: argparse.Namespace) -> None:
    """Check the machine and the options, run the stages, and print the results and their paths.

    Raises:
        UserError: the machine or the options do not allow a demo, or a stage failed.
    """
    from megatron_slm.demo.chain import FULL, QUICK, SAMPLES_PER_STEP, Folders, demo_stages
    from megatron_slm.demo.machine import check_folder, check_machine, check_ranks, hold_folder
    from megatron_slm.demo.processes import StoppedError, stop_on_signals
    from megatron_slm.demo.stages import Stages

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
        sys.stderr.write(f"megatron-slm demo: {stopped}. No process is left running. Run the same command to resume.\n")
        sys.exit(stopped.status)
    summary = folders.summary.read_text(encoding="utf-8")
    sys.stdout.write(f"\n{summary}{_CLOSING.format(folder=arguments.output, bin=_command_folder())}")


def _command_folder() -> str:
    """Return the folder of this environment's commands with a slash, or an empty text if the shell finds them."""
    if shutil.which("megatron-slm"):
        return ""
    folder = Path(sys.executable).parent
    return f"{folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder}/"
