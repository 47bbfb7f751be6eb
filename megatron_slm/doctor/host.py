"""The facts of each rank and its host: versions, memory, limits, network interfaces; and their judgement."""

import hashlib
import os
import platform
import resource
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch

from megatron_slm.dist import World
from megatron_slm.doctor.findings import Finding, Level, in_bytes, listed
from megatron_slm.doctor.gather import gloo_address, host_name, interface_of

PACKAGES = ("megatron_slm", "torch", "deepspeed", "transformers", "megatron-core", "numpy")
UNLIMITED = -1

SHARED_MEMORY = 2**30
"""Smallest /dev/shm in bytes for several ranks on a host: docker's `--shm-size=1g` in NVIDIA's NCCL user guide,
"Troubleshooting", "Shared memory"."""

DESCRIPTORS_PER_RANK, DESCRIPTORS = 4, 256
"""File descriptors that a rank needs for each rank of the run, and beside these. A run over gloo holds 2 connections
per rank and 20 other files; a GPU's libraries open more."""

THREADS = 64
"""Threads that a rank may start beside one per core for the mathematics; a run over gloo starts 10."""

BUSY_DEVICE = 0.9
"""Smallest share of a GPU's memory that is free before a run, unless another process uses it."""


@dataclass(frozen=True)
class HostFacts:
    """The facts of one rank, its device and its host. Sizes are in bytes; a limit of -1 is unlimited.

    versions       of the programs that must be alike on all ranks, by name
    device         name of the device
    device_memory  total and free; zeros on a CPU
    memory         total and available on the host, or in its container
    shared_memory  size of /dev/shm
    descriptors, processes, locked  soft limits of this process: open files, processes of the user, locked memory
    interface, address  under which gloo makes this rank known
    infiniband     names of the InfiniBand and RoCE devices
    """

    rank: int
    host: str
    versions: dict[str, str]
    cores: int
    device: str
    device_memory: tuple[int, int]
    memory: tuple[int, int]
    shared_memory: int
    descriptors: int
    processes: int
    locked: int
    interface: str
    address: str
    infiniband: tuple[str, ...]


def collect_facts(world: World) -> HostFacts:
    """Return the facts of this rank."""
    on_gpu = world.device.type == "cuda"
    free, total = torch.cuda.mem_get_info(world.device) if on_gpu else (0, 0)
    address = gloo_address()
    return HostFacts(
        rank=world.rank,
        host=host_name(),
        versions=_versions(),
        cores=len(os.sched_getaffinity(0)),
        device=torch.cuda.get_device_name(world.device) if on_gpu else f"CPU ({platform.machine()})",
        device_memory=(total, free),
        memory=_memory(),
        shared_memory=shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else 0,
        descriptors=_limit(resource.RLIMIT_NOFILE),
        processes=_limit(resource.RLIMIT_NPROC),
        locked=_limit(resource.RLIMIT_MEMLOCK),
        interface=interface_of(address),
        address=address,
        infiniband=tuple(sorted(path.name for path in Path("/sys/class/infiniband").glob("*"))),
    )


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "missing"
    found["megatron_slm"] += f" (sources {_sources(Path(__file__).parents[1])})"
    if torch.version.cuda is not None:
        found["CUDA"] = torch.version.cuda
    if torch.cuda.is_available():
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
        found["driver"] = _driver()
    return found


def _sources(package: Path) -> str:
    """Return a fingerprint of the sources of a package: checkouts of one version may differ."""
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(str(path.relative_to(package)).encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:8]


def _driver() -> str:
    """Return the version of NVIDIA's kernel driver; `unknown` for other vendors."""
    try:
        line = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8").partition("\n")[0]
    except OSError:
        return "unknown"
    return next((word for word in line.split() if word[0].isdigit() and "." in word), "unknown")


def _memory() -> tuple[int, int]:
    """Return the total and the available memory of the host, or of the control group of this process if it has less."""
    machine = psutil.virtual_memory()
    total, available = machine.total, machine.available
    for limit_file, used_file in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            limit, used = (int(Path("/sys/fs/cgroup", name).read_text()) for name in (limit_file, used_file))
        except (OSError, ValueError):  # no such file, or `max`
            continue
        total, available = min(total, limit), min(available, max(0, limit - used))
    return total, available


def _limit(which: int) -> int:
    soft = resource.getrlimit(which)[0]
    return UNLIMITED if soft == resource.RLIM_INFINITY else soft


def judge_facts(facts: Sequence[HostFacts], descriptors_for_run: int = 0) -> list[Finding]:
    """Return the findings about versions, devices, memory and limits.

    Args:
        facts: of all ranks.
        descriptors_for_run: file descriptors that the corpora of the run need on each rank.
    """
    return [*_unlike(facts), *_limits(facts, descriptors_for_run), *_memories(facts)]


def _unlike(facts: Sequence[HostFacts]) -> list[Finding]:
    """Return a finding for each program, and for the devices, that are not alike on all ranks."""
    found = []
    for program in dict.fromkeys(name for one in facts for name in one.versions):
        # Python's last number and the driver change no result and no message between ranks.
        level: Level = "WARN" if program in ("python", "driver") else "FAIL"
        remedy = f"Install the same version of {program} there, or use one environment on a shared file system"
        found.append(_odd(facts, level, program, [one.versions.get(program, "missing") for one in facts], remedy))
    remedy = "A run is as fast as its slowest device: leave these hosts out, or use hosts of one kind"
    found.append(_odd(facts, "WARN", "the device", [one.device for one in facts], remedy))
    ranks = Counter(one.host for one in facts)
    remedy = "Start the same number on each host, one per device"
    found.append(_odd(facts, "WARN", "the number of ranks", [str(ranks[one.host]) for one in facts], remedy))
    return [finding for finding in found if finding is not None]


def _odd(facts: Sequence[HostFacts], level: Level, what: str, values: Sequence[str], remedy: str) -> Finding | None:
    """Return the finding about the hosts whose value is not that of most ranks; None if all values are equal.

    Args:
        facts: of all ranks.
        level, what, remedy: of the finding.
        values: of each rank.
    """
    hosts = {
        value: list(dict.fromkeys(one.host for one, v in zip(facts, values, strict=True) if v == value))
        for value in dict.fromkeys(values)
    }
    if len(hosts) == 1:
        return None
    usual = max(hosts, key=values.count)
    odd = [host for value, names in hosts.items() if value != usual for host in names]
    text = " and ".join(f"{value} on {listed(names)}" for value, names in hosts.items())
    return Finding(level, "versions", tuple(odd), f"{what} is {text}", remedy)


def _limits(facts: Sequence[HostFacts], descriptors_for_run: int) -> list[Finding]:
    """Return the findings about `ulimit` and /dev/shm."""
    ranks = Counter(one.host for one in facts)
    descriptors = DESCRIPTORS + DESCRIPTORS_PER_RANK * len(facts) + descriptors_for_run

    def threads(one: HostFacts) -> int:
        return ranks[one.host] * (THREADS + one.cores)

    checks: list[tuple[Level, Callable[[HostFacts], bool], Callable[[HostFacts], str], str]] = [
        (
            "FAIL",
            lambda one: _is_below(one.descriptors, descriptors),
            lambda one: f"a process may open {one.descriptors} files (ulimit -n), and a rank needs {descriptors}",
            "Raise the limit with `ulimit -n 65536` before the command, in limits.conf, or with LimitNOFILE in "
            "the unit of slurmd",
        ),
        (
            "WARN",
            lambda one: _is_below(one.processes, threads(one)),
            lambda one: f"a user may have {one.processes} threads (ulimit -u), and the ranks may need {threads(one)}",
            "Raise the limit with `ulimit -u unlimited`, or in limits.conf",
        ),
        (
            "WARN",
            lambda one: bool(one.infiniband) and one.locked != UNLIMITED,
            lambda one: f"a process may lock {in_bytes(one.locked)} (ulimit -l), and InfiniBand locks its buffers",
            "Raise the limit with `ulimit -l unlimited`; in a container, with `--ulimit memlock=-1`",
        ),
        (
            "WARN",
            lambda one: ranks[one.host] > 1 and one.shared_memory < SHARED_MEMORY,
            lambda one: f"/dev/shm has {in_bytes(one.shared_memory)}, and the ranks of a host exchange data through it",
            "Enlarge it to 1 GiB or more; in a container, with `--shm-size=1g` or an emptyDir of medium Memory",
        ),
    ]
    return [
        finding
        for level, fails, text, remedy in checks
        if (finding := _where(facts, "limits", level, fails, text, remedy)) is not None
    ]


def _memories(facts: Sequence[HostFacts]) -> list[Finding]:
    """Return the findings about memory that other processes use, and hosts with less memory than others."""
    found = [
        _where(
            facts,
            "memory",
            "WARN",
            lambda one: one.device_memory[1] < BUSY_DEVICE * one.device_memory[0],
            lambda one: f"{in_bytes(one.device_memory[1])} of {in_bytes(one.device_memory[0])} are free on a device",
            "See which process uses it with nvidia-smi, and end it",
        ),
    ]
    most = max(one.memory[0] for one in facts)
    found.append(
        _where(
            facts,
            "memory",
            "WARN",
            lambda one: one.memory[0] < 0.9 * most,
            lambda one: f"the host has {in_bytes(one.memory[0])} of memory, and others have {in_bytes(most)}",
            "Look for a failed memory module, or for a smaller limit of the job or container",
        )
    )
    return [finding for finding in found if finding is not None]


def _where(
    facts: Sequence[HostFacts],
    check: str,
    level: Level,
    fails: Callable[[HostFacts], bool],
    text: Callable[[HostFacts], str],
    remedy: str,
) -> Finding | None:
    """Return the finding about the ranks that fail a test, with the text of the first; None if all pass."""
    failed = [one for one in facts if fails(one)]
    if not failed:
        return None
    hosts = tuple(dict.fromkeys(one.host for one in failed))
    everywhere = len(hosts) == len(_hosts(facts))
    where = "on every host" if everywhere and len(hosts) > 1 else f"on {listed(hosts)}"
    # A warning about all hosts alike is no reason to prefer some of them.
    singled_out = () if everywhere and level == "WARN" else hosts
    return Finding(level, check, singled_out, f"{text(failed[0])}, {where}", remedy)


def _is_below(limit: int, needed: int) -> bool:
    return limit != UNLIMITED and limit < needed


def _hosts(facts: Sequence[HostFacts]) -> list[str]:
    return list(dict.fromkeys(one.host for one in facts))
