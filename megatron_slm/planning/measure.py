"""The peak memory and the duration of the phases of a process."""

import ctypes
import logging
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch

from megatron_slm.io.progress import LOG_SECONDS

logger = logging.getLogger(__name__)

_M_MMAP_THRESHOLD = -3  # of glibc's mallopt
_RETURNED_BYTES = 1 << 20
_RESET_PEAK = "5"  # proc(5), clear_refs: resets the peak of the resident set


@dataclass
class PhaseCost:
    """The seconds of a phase in all, and its peak memory in bytes."""

    seconds: float = 0.0
    peak: int = 0


class PhaseRecorder:
    """A context manager that measures the phases of this process; one ends when the next begins.

    The memory is that of the device on CUDA, and the resident set on a CPU.

    Args:
        device: the device whose memory counts.

    Attributes:
        name: of the current phase.
        phases: by name, in their order.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.name: str | None = None
        self._began = time.monotonic()
        self._ended = threading.Event()
        self.phases: dict[str, PhaseCost] = {}

    def __enter__(self) -> "PhaseRecorder":
        threading.Thread(target=self._log, daemon=True).start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._end_phase()
        self._ended.set()

    def begin(self, name: str) -> None:
        """End the current phase and begin another. A phase that begins again adds to its former duration."""
        if name == self.name:
            return
        self._end_phase()
        self._reset_peak()
        self.name, self._began = name, time.monotonic()

    def memory(self) -> int:
        """Return the memory in use now, in bytes."""
        if self._device.type == "cuda":
            return torch.accelerator.memory_allocated(self._device)
        return resident_memory()

    def _end_phase(self) -> None:
        if self.name is not None:
            phase = self.phases.setdefault(self.name, PhaseCost())
            phase.seconds += time.monotonic() - self._began
            phase.peak = max(phase.peak, self._peak())
        self.name = None

    def _peak(self) -> int:
        if self._device.type == "cuda":
            return torch.accelerator.max_memory_allocated(self._device)
        return _resident("VmHWM")

    def _reset_peak(self) -> None:
        if self._device.type == "cuda":
            torch.accelerator.reset_peak_memory_stats(self._device)
        else:
            Path("/proc/self/clear_refs").write_text(_RESET_PEAK, encoding="ascii")

    def _log(self) -> None:
        while not self._ended.wait(LOG_SECONDS):
            seconds, size = time.monotonic() - self._began, self.memory() / 2**30
            logger.info("%s: running for %.0f s, %.1f GiB in use", self.name, seconds, size)


def return_freed_memory() -> None:
    """Make glibc return each freed block of a megabyte or more to the system, so that the resident set is what is used.

    By default, glibc keeps freed blocks of up to 32 MiB for later.
    """
    ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _RETURNED_BYTES)


def resident_memory() -> int:
    """Return the resident set of this process, in bytes."""
    return _resident("VmRSS")


def _resident(key: str) -> int:
    """Return a line of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")
