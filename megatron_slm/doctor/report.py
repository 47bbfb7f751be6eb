"""The report of `doctor`: its checks in order, their judgement, and the report as a table and as JSON."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from megatron_slm.dist import World, gather_objects
from megatron_slm.doctor.device import judge_devices, measure_device, tflops
from megatron_slm.doctor.files import (
    DirectoryFacts,
    InputFacts,
    check_directory,
    check_input,
    judge_directory,
    judge_input,
)
from megatron_slm.doctor.findings import Finding, in_bytes, passing_hosts, verdict
from megatron_slm.doctor.host import UNLIMITED, HostFacts, collect_facts, judge_facts
from megatron_slm.doctor.network import (
    Pair,
    Speed,
    judge_pairs,
    judge_skew,
    measure_all_reduce,
    measure_pairs,
    measure_skew,
)
from megatron_slm.doctor.run_needs import InputFiles, RunNeeds, judge_needs

PATIENCE = timedelta(seconds=10)
"""How long an all-reduce between two hosts may take."""

_INPUTS_TO_TIME = 3  # each may take seconds


@dataclass
class Measurements:
    """The results of all checks, the same on every rank. Names of hosts are in the order of their first ranks.

    facts        of each rank
    devices      FLOP/s of the device of each rank
    pairs        the all-reduce between each pair of hosts; None if it failed
    together     the all-reduce among all ranks; None for one rank
    skew         seconds by which the clock of each host is ahead of rank 0's
    directories  by path, then host
    inputs       by setting and path, then host
    """

    facts: list[HostFacts]
    devices: list[float]
    pairs: dict[Pair, Speed | None] = field(default_factory=dict)
    together: Speed | None = None
    skew: dict[str, float] = field(default_factory=dict)
    directories: dict[str, dict[str, DirectoryFacts]] = field(default_factory=dict)
    inputs: dict[tuple[str, str], dict[str, InputFacts]] = field(default_factory=dict)

    @property
    def hosts(self) -> list[str]:
        return list(dict.fromkeys(one.host for one in self.facts))


def measure(
    world: World, directories: Sequence[str], inputs: Sequence[InputFiles], progress: Callable[[str], None]
) -> Measurements:
    """Run all checks; every rank calls it.

    Args:
        world: this rank.
        directories: to which all hosts write.
        inputs: that all hosts read.
        progress: called with the name of each check before it begins.
    """
    progress("facts of all hosts")
    facts = gather_objects(collect_facts(world))
    hosts = [one.host for one in facts]
    progress("devices")
    result = Measurements(facts, gather_objects(measure_device(world.device)))
    if world.size > 1:
        progress("network")
        result.pairs = measure_pairs(world, hosts, PATIENCE)
        result.together = gather_objects(measure_all_reduce(world, None, world.size))[0]
    result.skew = measure_skew(world, hosts)
    progress("files")
    for directory in directories:
        result.directories[directory] = check_directory(world, hosts, Path(directory))
    for number, one in enumerate(inputs):
        paths = [Path(file) for file in one.files]
        result.inputs[one.setting, one.path] = check_input(world, hosts, paths, number < _INPUTS_TO_TIME)
    return result


def judge(found: Measurements, needs: RunNeeds | None = None) -> list[Finding]:
    """Return all findings, failures first."""
    hosts = [one.host for one in found.facts]
    findings = judge_facts(found.facts, needs.descriptors if needs else 0)
    findings += judge_devices(found.devices, hosts, [one.device for one in found.facts])
    findings += judge_pairs(found.pairs) + judge_skew(found.skew)
    for path, by_host in found.directories.items():
        findings += judge_directory(Path(path), by_host)
    for (setting, path), seen in found.inputs.items():
        findings += judge_input(setting, path, seen)
    findings += judge_needs(needs, found.facts, found.directories) if needs else []
    return sorted(findings, key=lambda finding: finding.level)


def as_text(found: Measurements, findings: Sequence[Finding]) -> str:
    """Return the report for a terminal: the versions, a row per host, the findings, the verdict."""
    versions = ", ".join(f"{name} {value}" for name, value in found.facts[0].versions.items())
    lines = [f"{len(found.facts)} ranks on {len(found.hosts)} hosts. Rank 0: {versions}", ""]
    lines += aligned([_TITLES, *(_row(found, host) for host in found.hosts)])
    lines += [*([""] if found.pairs else []), *_pair_lines(found.pairs)]
    if found.together is not None:
        lines.append(f"all ranks together: {_speed(found.together)}")
    lines += [*([""] if findings else []), *map(str, findings), ""]
    passing = passing_hosts(found.hosts, findings)
    lines.append(f"hosts without a finding of their own: {', '.join(passing) or 'none'}")
    lines.append(f"verdict: {verdict(findings)}")
    return "\n".join(lines) + "\n"


_TITLES = ("host", "ranks", "device", "product", "memory free", "/dev/shm", "files", "network", "clock", "reads")


def _row(found: Measurements, host: str) -> tuple[str, ...]:
    ranks = [one for one in found.facts if one.host == host]
    first = ranks[0]
    reads = [seen[host].speed for seen in found.inputs.values()]
    reads += [seen[host].speed for seen in found.directories.values() if host in seen]
    slowest = min((speed for speed in reads if speed), default=0.0)
    return (
        host,
        str(len(ranks)),
        first.device,
        tflops(min(found.devices[one.rank] for one in ranks)),
        in_bytes(first.memory[1]),
        in_bytes(first.shared_memory),
        "unlimited" if first.descriptors == UNLIMITED else str(first.descriptors),
        f"{first.interface} {first.address}",
        f"{1e3 * found.skew.get(host, 0.0):+.1f} ms",
        f"{in_bytes(slowest)}/s" if slowest else "-",
    )


def _pair_lines(pairs: Mapping[Pair, Speed | None]) -> list[str]:
    """Return a table of the pairs of hosts; if there are many, the slowest ones."""
    by_speed = sorted(pairs.items(), key=lambda pair: pair[1].bandwidth if pair[1] else 0.0)
    rows = [(f"{one} and {other}:", _speed(speed) if speed else "failed") for (one, other), speed in by_speed[:12]]
    more = [f"and {len(pairs) - len(rows)} faster pairs"] if len(pairs) > len(rows) else []
    return [*aligned(rows), *more]


def _speed(speed: Speed) -> str:
    return f"all-reduce of 4 bytes in {1e3 * speed.latency:.2f} ms, {in_bytes(speed.bandwidth)}/s"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the rows of a table as lines, with columns of equal width."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def as_json(found: Measurements, findings: Sequence[Finding]) -> dict[str, Any]:
    """Return the report as plain values."""
    return {
        "verdict": verdict(findings),
        "findings": [finding._asdict() for finding in findings],
        "passing_hosts": passing_hosts(found.hosts, findings),
        "ranks": [
            asdict(one) | {"flops_per_second": speed} for one, speed in zip(found.facts, found.devices, strict=True)
        ],
        "pairs": [{"hosts": pair, **_plain(speed)} for pair, speed in found.pairs.items()],
        "all_ranks": _plain(found.together),
        "clock_skew_seconds": found.skew,
        "directories": {
            path: {host: asdict(one) for host, one in by_host.items()} for path, by_host in found.directories.items()
        },
        "inputs": [
            {"setting": setting, "path": path, "hosts": {host: asdict(one) for host, one in seen.items()}}
            for (setting, path), seen in found.inputs.items()
        ],
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _plain(speed: Speed | None) -> dict[str, float | None]:
    if speed is None:
        return {"latency_seconds": None, "bytes_per_second": None}
    return {"latency_seconds": speed.latency, "bytes_per_second": speed.bandwidth}


def host_list(found: Measurements, hosts: Sequence[str]) -> str:
    """Return hosts as a hostfile, with as many slots as each had ranks."""
    ranks = [one.host for one in found.facts]
    return "".join(f"{host} slots={ranks.count(host)}\n" for host in hosts)
