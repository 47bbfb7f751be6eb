"""Plan a run on a cluster: memory, time, money and disk; and rehearse one rank of it on this machine.

The plan is made from the configuration. Corpora and weights that do not exist yet are replaced by what the settings
say, and the plan names each. With --rehearse, this process also builds the models as one rank of N would, from their
configurations alone, and runs two optimizer steps with faked collectives: it finds errors, and measures the true peak
memory. Nothing is written. docs/plan.md explains the tables.
"""

import argparse
import json
import sys
from contextlib import redirect_stdout
from dataclasses import asdict
from typing import TYPE_CHECKING

from megatron_slm.config import Config, load_config
from megatron_slm.devices import CPU, DEVICES, find_device
from megatron_slm.errors import UserError

if TYPE_CHECKING:
    from megatron_slm.build.outline import Outline
    from megatron_slm.build.rehearsal import Rehearsal

EXAMPLES = """examples:
  megatron-slm plan run.yaml --ranks 64 --device h100-80gb
  megatron-slm plan run.yaml --ranks 256 --device h100-80gb --price 2.50 --mtbf 48
  megatron-slm plan run.yaml --ranks 256 --device h100-80gb --rehearse training.global_batch_size=512
  megatron-slm plan run.yaml --ranks 8 --device cpu --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the verb."""
    parser.add_argument("config", metavar="CONFIG.yaml", help="the run's configuration")
    parser.add_argument("overrides", metavar="a.b=c", nargs="*", help="settings that override those in the file")
    parser.add_argument("--ranks", metavar="N", type=int, required=True, help="number of ranks, one per device")
    parser.add_argument(
        "--device", metavar="NAME", required=True, help=f"{', '.join(DEVICES)} (cpu measures this machine)"
    )
    parser.add_argument("--gpus-per-node", metavar="N", type=int, default=8, help="devices per node (default: 8)")
    parser.add_argument("--price", metavar="MONEY", type=float, help="price of one device for one hour")
    parser.add_argument(
        "--mtbf",
        metavar="HOURS",
        type=float,
        help="mean time between failures of the whole run (default: the rate of Llama 3's training, per device)",
    )
    parser.add_argument(
        "--mfu",
        metavar="SHARE",
        type=float,
        default=0.4,
        help="MFU of a plain step, that is, without a reference (default: 0.4)",
    )
    parser.add_argument(
        "--network", metavar="GBPS", type=float, help="network of each device, in Gb/s (default: that of the vendor)"
    )
    parser.add_argument(
        "--storage",
        metavar="GB/S",
        type=float,
        default=1.0,
        help="speed at which each node writes checkpoints, in GB/s (default: 1)",
    )
    parser.add_argument("--rehearse", action="store_true", help="run two steps of one rank here, collectives faked")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")


def run(arguments: argparse.Namespace) -> None:
    """Print the plan, and the rehearsal.

    Raises:
        UserError: an option or a setting is wrong, or the models do not support the run.
    """
    _check_options(arguments)
    config = load_config(arguments.config, arguments.overrides)
    from megatron_slm.build.plan_report import PlanOptions, plan_run
    from megatron_slm.build.plan_text import plan_text, rehearsal_text

    options = PlanOptions(
        arguments.ranks,
        find_device(arguments.device).name,
        arguments.gpus_per_node,
        arguments.mfu,
        arguments.network,
        arguments.storage,
        arguments.price,
        arguments.mtbf,
    )
    outline, report = plan_run(config, options)
    values = report.values()
    if not arguments.json:
        sys.stdout.write(plan_text(report))
        sys.stdout.flush()
    if arguments.rehearse:
        with redirect_stdout(sys.stderr):  # libraries print while they build, and the output may be JSON
            rehearsal, expected = _rehearse(outline, config, options.ranks, report.device.name)
        values["rehearsal"] = asdict(rehearsal) | {"expected": expected}
        if not arguments.json:
            sys.stdout.write("\n" + rehearsal_text(rehearsal, expected))
    if arguments.json:
        sys.stdout.write(json.dumps(values, indent=1) + "\n")


def _rehearse(run: "Outline", config: Config, ranks: int, device: str) -> "tuple[Rehearsal, int]":
    """Return the rehearsal on this machine, and the peak memory in bytes that was expected."""
    from megatron_slm.build.outline import outline
    from megatron_slm.build.plan_report import expected_memory
    from megatron_slm.build.rehearsal import refuse_too_little_memory, rehearse
    from megatron_slm.dist import connect_fake, disconnect

    world = connect_fake("plan", ranks)
    try:
        if (world.device.type == CPU) != (device == CPU):
            # The default precision depends on the kind of device, and that of this machine is another.
            run = outline(config, world)
        expected = expected_memory(run, world).peak
        refuse_too_little_memory(expected, world)
        return rehearse(run, world), expected
    finally:
        disconnect()


def _check_options(arguments: argparse.Namespace) -> None:
    """Raise a UserError for a bad option, before any heavy import."""
    find_device(arguments.device)
    for name in ("ranks", "gpus_per_node"):
        if getattr(arguments, name) < 1:
            raise UserError(_option(name), getattr(arguments, name), "it must be 1 or more", "Use a larger number")
    for name in ("price", "mtbf", "network", "storage"):
        value = getattr(arguments, name)
        if value is not None and not 0 < value < float("inf"):
            raise UserError(_option(name), value, "it must be a finite number above 0", "Use such a number")
    if not 0 < arguments.mfu <= 1:
        reason = "it is a share of the device's peak, above 0 and at most 1"
        raise UserError("--mfu", arguments.mfu, reason, "Use a share such as 0.4")


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
