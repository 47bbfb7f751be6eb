"""Check the GPU against the CPU, and measure its speed.

First correctness at a small shape: losses, masks and gradients against float32 on the CPU, the backward of
selected rows and replay, and training under ZeRO-3 that resumes bitwise. Then speed at a preset shape: tokens per
second, MFU and peak memory of CLM and of SLM with a live reference of the same size, scoring a corpus, the
threshold, and steps with each kind of backward. Weights and tokens are random. The command runs as one process, on one
device; without a GPU, on the CPU. The exit status is 1 if a check of correctness fails.
"""

import argparse
import json
import logging
import sys
from pathlib import Path

from megatron_slm.errors import UserError
from megatron_slm.io.files import refuse_taken

logger = logging.getLogger(__name__)

_PRESETS = ("tiny", "tinyllama", "llama-7b")
EXAMPLES = """example:
  megatron-slm check-device
  megatron-slm check-device --preset tinyllama --output device.json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the verb."""
    parser.add_argument(
        "--preset", choices=_PRESETS, help="shape whose speed is measured (default: tinyllama; without a GPU, tiny)"
    )
    parser.add_argument("--micro-batch-size", metavar="N", type=int, help="micro-batch size (default: the preset's)")
    parser.add_argument("--output", metavar="FILE", type=Path, help="also write the report there, as JSON")


def run(arguments: argparse.Namespace) -> None:
    """Run all sections, print each when it is finished, and exit with status 1 if a check failed.

    Raises:
        UserError: an option is invalid, or a launcher started several ranks.
    """
    _check_options(arguments)
    from megatron_slm.device_check.report import run_sections
    from megatron_slm.dist import connect_alone, disconnect

    world = connect_alone("check-device")
    preset = arguments.preset or ("tinyllama" if world.device.type == "cuda" else "tiny")
    if world.device.type != "cuda":
        logger.warning("This machine has no GPU that PyTorch can use: everything runs on the CPU.")
    report, failed = {}, []
    for section in run_sections(preset, arguments.micro_batch_size, world):
        sys.stdout.write(f"{section}\n\n")
        sys.stdout.flush()
        report[section.name] = section.values
        if section.failed:
            failed.append(section.name)
        if arguments.output:
            arguments.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    disconnect()
    sys.stdout.write(f"Failed: {', '.join(failed)}.\n" if failed else "All checks passed.\n")
    if failed:
        sys.exit(1)


def _check_options(arguments: argparse.Namespace) -> None:
    size, output = arguments.micro_batch_size, arguments.output
    if size is not None and size < 1:
        raise UserError("--micro-batch-size", size, "a micro-batch has at least one sequence", "Use 1 or more")
    if output is None:
        return
    refuse_taken("--output", output)
    if not output.absolute().parent.is_dir():
        raise UserError("--output", output, "its folder does not exist", "Create the folder, or name another file")
