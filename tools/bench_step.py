"""Time and memory of a selective step with each kind of backward, against a plain step of the same shape.

    python tools/bench_step.py --preset cpu
    python tools/bench_step.py --preset gpu-1b --json > step.json
    python tools/bench_step.py --preset cpu --profile rows@0.6

Steps alternate in one process; `megatron_slm/device_check/step_costs.py` explains what is measured.
"""

import argparse
import json
import os
import platform
import sys
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import torch
from torch.profiler import profile

from megatron_slm.device_check.correctness import BACKWARDS
from megatron_slm.device_check.shapes import STEP_PRESETS, Shape
from megatron_slm.device_check.step_costs import PLAIN, RATIOS, StepBench, measure_steps, selective_kinds, steps_table


def main() -> None:
    options = parse_arguments()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape = STEP_PRESETS[options.preset]
    shape = replace(shape, repeats=options.rounds or shape.repeats)
    if options.profile:
        sys.stdout.write(profile_step(shape, device, options.profile) + "\n")
        return
    found = measure_steps(shape, device, options.modes, options.ratios) | {"environment": environment(device)}
    sys.stdout.write((json.dumps(found) if options.json else steps_table(found)) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=STEP_PRESETS, default="cpu", help="shape of model and batch; default: cpu")
    parser.add_argument("--rounds", type=int, help="rounds of all steps; default: the preset's")
    parser.add_argument("--ratios", type=float, nargs="*", default=list(RATIOS), help="default: all")
    parser.add_argument("--modes", nargs="*", choices=BACKWARDS, default=list(BACKWARDS), help="default: all")
    parser.add_argument("--profile", metavar="MODE@RATIO", help="profile this step instead")
    parser.add_argument("--json", action="store_true", help="one line of JSON instead of the table")
    return parser.parse_args()


def profile_step(shape: Shape, device: torch.device, name: str) -> str:
    """Return a table with the time of one step by operator."""
    bench = StepBench(shape, device)
    kind = next(kind for kind in [*PLAIN, *selective_kinds()] if kind.name == name)
    bench.prepare(kind)
    bench.step(kind)
    bench.prepare(kind)
    with profile() as found:
        bench.step(kind)
    order = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    return str(found.key_averages().table(sort_by=order, row_limit=20, max_name_column_width=50))


def environment(device: torch.device) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    versions = {package: version(package) for package in ("torch", "transformers")}
    load = os.getloadavg()[0]
    return {"device": name, "threads": torch.get_num_threads(), "load": load, "versions": versions}


if __name__ == "__main__":
    main()
