"""The speed of each device: one matrix product, repeated."""

import statistics
import time
from collections.abc import Sequence

import torch

from megatron_slm.doctor.findings import Finding, far_below

SLOW_GPU, SLOW_CPU = 0.85, 0.5
"""Share of the median speed below which a device is slow. Other processes share a CPU, so its speed varies more."""

_SECONDS = 1.0


def measure_device(device: torch.device) -> float:
    """Return the speed of matrix products in FLOP/s, the median over a second.

    A second of full load shows a GPU that its power or temperature limits. The products are those of training: bfloat16
    of 8192 on a GPU, float32 of 512 on a CPU.
    """
    on_gpu = device.type == "cuda"
    size, dtype = (8192, torch.bfloat16) if on_gpu else (512, torch.float32)
    left = torch.randn(size, size, device=device).to(dtype)
    right = torch.randn(size, size, device=device).to(dtype)
    seconds: list[float] = []
    end = time.perf_counter() + _SECONDS
    while time.perf_counter() < end or len(seconds) < 3:
        start = time.perf_counter()
        torch.mm(left, right)
        if on_gpu:
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(seconds[1:])


def judge_devices(speeds: Sequence[float], hosts: Sequence[str], devices: Sequence[str]) -> list[Finding]:
    """Return a finding for each rank whose device is slower than those of the same kind.

    Args:
        speeds: FLOP/s of each rank.
        hosts, devices: the host, and the name of the device, of each rank.
    """
    found = []
    for kind in dict.fromkeys(devices):
        ranks = {str(rank): speed for rank, speed in enumerate(speeds) if devices[rank] == kind}
        share = SLOW_CPU if kind.startswith("CPU") else SLOW_GPU
        usual = statistics.median(ranks.values())
        for rank in far_below(ranks, share):
            host = hosts[int(rank)]
            text = (
                f"the device of rank {rank} on {host} does {tflops(ranks[rank])}; the median of all is {tflops(usual)}"
            )
            remedy = (
                "Check its clocks, temperature and power limit (`nvidia-smi -q -d PERFORMANCE`), and that no other "
            )
            remedy += "process uses it, or leave the host out"
            found.append(Finding("WARN", "device", (host,), text, remedy))
    return found


def tflops(speed: float) -> str:
    """Return a speed in FLOP/s as text."""
    return f"{speed / 1e12:.3g} TFLOP/s"
