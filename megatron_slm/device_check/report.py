"""The report of `check-device`: its sections in order, and their text."""

import platform
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import version
from typing import Any, NamedTuple

import torch

from megatron_slm.device_check.correctness import check_against_cpu, check_selected_backward, check_training_and_resume
from megatron_slm.device_check.shapes import PRESETS, STEP_PRESETS
from megatron_slm.device_check.speed import measure_scoring, measure_step, measure_threshold
from megatron_slm.device_check.step_costs import measure_steps, steps_table
from megatron_slm.dist import World

_STEPS = "selected_steps"
_STEP_PRESET = {"tiny": "tiny", "tinyllama": "gpu-1b", "llama-7b": "gpu-7b"}
"""The shape at which the kinds of backward are compared, for each preset of `check-device`."""


class Section(NamedTuple):
    """A finished section; the values of a check include `ok`."""

    name: str
    seconds: float
    values: dict[str, Any]

    @property
    def failed(self) -> bool:
        return not self.values.get("ok", True)

    def __str__(self) -> str:
        verdict = {True: ": ok", False: ": FAILED", None: ""}[self.values.get("ok")]
        if self.name == _STEPS:
            lines = steps_table(self.values).splitlines()
        else:
            lines = [f"{name:44} {value}" for name, value in _flat(self.values) if name != "ok"]
        return "\n  ".join([f"{self.name}{verdict} ({self.seconds:.0f} s)", *lines])


def run_sections(preset: str, micro_batch_size: int | None, world: World) -> Iterator[Section]:
    """Run the checks of correctness, then the measurements of speed, and yield each section when it is finished.

    Args:
        preset: the shape whose speed is measured.
        micro_batch_size: sequences of a micro-batch; None for the preset's.
        world: this process and its device; one rank.
    """
    shape, device = PRESETS[preset], world.device
    if micro_batch_size is not None:
        shape = replace(shape, micro_batch_size=micro_batch_size)
    sections: dict[str, Callable[[], dict[str, Any]]] = {
        "environment": lambda: environment(device) | {"preset": preset, "micro_batch_size": shape.micro_batch_size},
        "against_cpu": lambda: check_against_cpu(device),
        "selected_backward": lambda: check_selected_backward(device),
        "training_and_resume": lambda: check_training_and_resume(world),
        "clm": lambda: measure_step(shape, False, world),
        "slm": lambda: measure_step(shape, True, world),
        "scoring": lambda: measure_scoring(shape, world),
        "threshold": lambda: measure_threshold(shape, world),
        _STEPS: lambda: measure_steps(STEP_PRESETS[_STEP_PRESET[preset]], device),
    }
    for name, section in sections.items():
        start = time.perf_counter()
        values = section()
        yield Section(name, time.perf_counter() - start, values)


def environment(device: torch.device) -> dict[str, Any]:
    """Return the device, the versions of the libraries, and the command."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU"
    packages = ("torch", "deepspeed", "transformers", "megatron-core")
    versions = {package: version(package) for package in packages}
    return {"device": name, "python": platform.python_version(), "versions": versions, "command": sys.argv}


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield the path and the text of every value."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", _text(value)


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, list):
        return " ".join(map(_text, value))
    if isinstance(value, float) and abs(value) < 1000:
        return f"{value:.4g}"
    return f"{value:,.0f}" if isinstance(value, int | float) and not isinstance(value, bool) else str(value)
