"""The needs of a run, held against what the hosts have."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_slm.doctor.findings import Finding, in_bytes, listed

if TYPE_CHECKING:
    from megatron_slm.doctor.files import DirectoryFacts
    from megatron_slm.doctor.host import HostFacts

ROOM = 4 / 3
"""Memory to have for each byte that is estimated: the estimate leaves out libraries and fragmentation."""


DESCRIPTORS_PER_CORPUS = 5
"""File descriptors that a rank holds for a corpus: its .bin twice, its .idx, its .mask, and its scores in a store."""


@dataclass(frozen=True)
class InputFiles:
    """An input of the run: the setting that names it, its path as set, and its files and folders."""

    setting: str
    path: str
    files: tuple[str, ...]


@dataclass(frozen=True)
class RunNeeds:
    """The needs of a run, from its configuration. Sizes are in bytes; 0 if unknown.

    run_dir        the run directory
    device_memory  of one rank on its GPU; 0 on CPUs
    host_memory    of one rank on its host
    checkpoint     of one checkpoint
    checkpoints    to be written beside those that exist, while the disk holds the most of them
    descriptors    file descriptors for the corpora, per rank
    errors         the errors of the configuration
    """

    run_dir: str
    device_memory: int = 0
    host_memory: int = 0
    checkpoint: int = 0
    checkpoints: int = 0
    descriptors: int = 0
    errors: tuple[str, ...] = ()


def judge_needs(
    needs: RunNeeds, facts: "Sequence[HostFacts]", directories: "Mapping[str, Mapping[str, DirectoryFacts]]"
) -> list[Finding]:
    """Return the findings about a run on these hosts: its errors, its memory and its disk space."""
    found = [
        Finding("FAIL", "run", (), error.rstrip("."), "See `train --dry-run`, which reports the same")
        for error in needs.errors
    ]
    ranks = [one.host for one in facts]
    on_host = {one.host: (one.memory[1], needs.host_memory * ranks.count(one.host)) for one in facts}
    on_device: dict[str, tuple[int, int]] = {}
    for one in facts:
        free, needed = on_device.get(one.host, (one.device_memory[1], needs.device_memory))
        on_device[one.host] = (min(free, one.device_memory[1]), needed)
    found += _too_small("memory of the host", on_host, "more hosts, or no offload")
    found += _too_small("memory of a device", on_device, "more ranks, smaller micro-batches, or offload")
    disk = [one.free for one in directories.get(needs.run_dir, {}).values() if one.free]
    if disk and min(disk) < needs.checkpoint * needs.checkpoints:
        text = f"{needs.run_dir} has {in_bytes(min(disk))} free, and the checkpoints need up to "
        text += in_bytes(needs.checkpoint * needs.checkpoints)
        remedy = "Lower training.keep_checkpoints, free disk space, or use another run_dir"
        found.append(Finding("FAIL", "run", (), text, remedy))
    return found


def _too_small(what: str, sizes: Mapping[str, tuple[int, int]], means: str) -> list[Finding]:
    """Return the findings about hosts whose memory does not suffice.

    Args:
        what: the memory.
        sizes: the free and the needed bytes, by host.
        means: what reduces the need.
    """
    short = tuple(host for host, (free, needed) in sizes.items() if needed > free)
    tight = tuple(host for host, (free, needed) in sizes.items() if free >= needed > free / ROOM)
    found = []
    for level, hosts, room in (("FAIL", short, ""), ("WARN", tight, ", with little room for the libraries")):
        if hosts:
            free, needed = min((sizes[host] for host in hosts), key=lambda one: one[0])
            text = f"{in_bytes(free)} of the {what} are free on {listed(hosts)}, and the run needs about "
            text += f"{in_bytes(needed)}{room}"
            # All hosts lack it if the run is too large for them: none is worse than the others.
            singled_out = hosts if len(hosts) < len(sizes) or level == "FAIL" else ()
            remedy = f"Use {means}"
            found.append(Finding("FAIL" if level == "FAIL" else "WARN", "run", singled_out, text, remedy))
    return found
