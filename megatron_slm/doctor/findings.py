"""Findings: what is wrong with which hosts, how bad it is, and what to do."""

import statistics
from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

Level = Literal["WARN", "FAIL"]


class Finding(NamedTuple):
    """One thing that is wrong.

    level    FAIL if a run would stop or be wrong; WARN if it would be slow, or may fail later
    check    the check that found it, such as `network`
    hosts    the hosts that the finding singles out; empty if it concerns the cluster as a whole
    text     what was found, as a clause without its period
    remedy   what to do, as a sentence without its period
    """

    level: Level
    check: str
    hosts: tuple[str, ...]
    text: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.level} {self.check}: {self.text}. {self.remedy}."


def verdict(findings: Iterable[Finding]) -> str:
    """Return FAIL, WARN or PASS: the worst level of all findings."""
    levels = {finding.level for finding in findings}
    return next((level for level in ("FAIL", "WARN") if level in levels), "PASS")


def passing_hosts(hosts: Iterable[str], findings: Iterable[Finding]) -> list[str]:
    """Return the hosts that no finding singles out, in their order."""
    named = {host for finding in findings for host in finding.hosts}
    return [host for host in hosts if host not in named]


def far_below(values: Mapping[str, float], share: float) -> list[str]:
    """Return the keys whose value is below this share of the median of all values; at least three are compared."""
    if len(values) < 3:
        return []
    limit = share * statistics.median(values.values())
    return [key for key, value in values.items() if value < limit]


def listed(names: Iterable[object], most: int = 8) -> str:
    """Return names as text, separated by commas; those after the first `most` are counted."""
    shown = [str(name) for name in names]
    rest = f" and {len(shown) - most} more" if len(shown) > most else ""
    return ", ".join(shown[:most]) + rest


def in_bytes(number: float) -> str:
    """Return a number of bytes as text, in GiB, MiB or KiB."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number / 2**10:.1f} KiB"
