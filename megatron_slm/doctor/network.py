"""The network: all-reduces between pairs of hosts and among all ranks, and the clocks of the hosts."""

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_slm.dist import World, gather_objects
from megatron_slm.doctor.findings import Finding, far_below, in_bytes

ALL_PAIRS = 16
"""With more hosts than this, each is measured with its two neighbours in a ring only."""

SLOW_LINK = 0.5
"""Share of the usual bandwidth below which a link is slow; latencies are compared by the inverse."""

SAME_LATENCY = 0.5e-3
"""Difference of latencies in seconds that says nothing about a link: a busy core alone adds tenths of a millisecond."""

CLOCK_SKEW = 1.0
"""Skew in seconds above which the logs of two hosts cannot be read side by side."""

_SMALL, _FIRST, _LARGEST = 4, 2**18, 2**26  # bytes
_ENOUGH = 0.15  # seconds of one all-reduce, after which no larger one is measured
_PINGS = 10


@dataclass(frozen=True)
class Speed:
    """The speed of an all-reduce.

    latency    seconds of one of four bytes, the median of several
    bandwidth  bytes per second that each rank sends, 2 (n - 1) / n of the size per all-reduce of n ranks
    """

    latency: float
    bandwidth: float


Pair = tuple[str, str]


def rounds(hosts: Sequence[str]) -> Iterator[list[Pair]]:
    """Yield rounds of pairs in which no host occurs twice: all pairs of up to 16 hosts, else neighbours in a ring."""
    if len(hosts) < 2:
        return
    if len(hosts) > ALL_PAIRS:
        for first in (0, 1):
            yield [(hosts[i], hosts[(i + 1) % len(hosts)]) for i in range(first, len(hosts) - 1 + first, 2)]
        if len(hosts) % 2:
            yield [(hosts[-1], hosts[0])]
        return
    # The circle method of round-robin tournaments; an odd number of hosts gets one that rests.
    circle: list[str | None] = [*hosts, *([None] if len(hosts) % 2 else [])]
    for _ in range(len(circle) - 1):
        half = len(circle) // 2
        paired = zip(circle[:half], reversed(circle[half:]), strict=True)
        yield [(one, other) for one, other in paired if one is not None and other is not None]
        circle = [circle[0], circle[-1], *circle[1:-1]]


def measure_pairs(world: World, hosts: Sequence[str], patience: timedelta) -> dict[Pair, Speed | None]:
    """Return the speed between each pair of hosts, measured by the first rank of each; every rank calls it.

    Args:
        world: this rank.
        hosts: the host of each rank.
        patience: how long one all-reduce may take.

    Returns:
        None for a pair whose all-reduce failed; the same on all ranks.
    """
    leader = {host: hosts.index(host) for host in dict.fromkeys(hosts)}
    measured: dict[Pair, Speed | None] = {}
    for pairs in rounds(list(leader)):
        for pair in pairs:
            ranks = [leader[host] for host in pair]
            if world.rank in ranks:
                measured[pair] = _measure_pair(sorted(ranks), world, patience)
        gather_objects(None)  # so that pairs of different rounds do not share a host
    return {pair: speed for one in gather_objects(measured) for pair, speed in one.items()}


def _measure_pair(ranks: list[int], world: World, patience: timedelta) -> Speed | None:
    group = None
    try:
        group = dist.new_group(ranks, timeout=patience, use_local_synchronization=True)
        return measure_all_reduce(world, group, len(ranks))
    except RuntimeError:  # a time-out or a closed connection, of any backend
        return None
    finally:
        if group is not None:
            dist.destroy_process_group(group)


def measure_all_reduce(world: World, group: dist.ProcessGroup | None, size: int) -> Speed:
    """Return the speed of an all-reduce among the ranks of a group, all ranks if None.

    The measurement of the bandwidth begins small and doubles until one all-reduce takes long enough, so that a slow
    network does not hold it up.
    """
    small = [_all_reduce_seconds(world, group, _SMALL) for _ in range(20)]
    number = _FIRST
    _all_reduce_seconds(world, group, number)  # opens the connections and allocates the buffers
    while True:
        seconds = min(_all_reduce_seconds(world, group, number) for _ in range(2))
        # All ranks must measure equally often.
        slowest = torch.tensor([seconds], device=world.device)
        dist.all_reduce(slowest, dist.ReduceOp.MAX, group=group)
        seconds = float(slowest)
        if seconds > _ENOUGH or number >= _LARGEST:
            break
        number *= 4
    return Speed(statistics.median(small[5:]), 2 * (size - 1) / size * number / seconds)


def _all_reduce_seconds(world: World, group: dist.ProcessGroup | None, number: int) -> float:
    value = torch.zeros(number // 4, device=world.device)
    _finish(world.device)
    start = time.perf_counter()
    dist.all_reduce(value, group=group)
    _finish(world.device)
    return time.perf_counter() - start


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_skew(world: World, hosts: Sequence[str]) -> dict[str, float]:
    """Return how many seconds the clock of each host is ahead of rank 0's; every rank calls it.

    Rank 0 and the first rank of each host exchange their times, host by host. The reply is compared with the middle of
    the exchange, and the fastest exchange counts: its error is at most half of its duration.
    """
    skew = {hosts[0]: 0.0}
    for host in dict.fromkeys(hosts):
        if host == hosts[0]:
            continue
        other = hosts.index(host)
        if world.rank == 0:
            skew[host] = min(_ping(other) for _ in range(_PINGS))[1]
        elif world.rank == other:
            for _ in range(_PINGS):
                _pong()
    return gather_objects(skew)[0]


def _ping(other: int) -> tuple[float, float]:
    """Return the duration of an exchange with another rank, and how far its clock is ahead, in seconds."""
    reply = torch.zeros(1, dtype=torch.float64)
    before = time.time()
    dist.send(reply, other)
    dist.recv(reply, other)
    after = time.time()
    return after - before, float(reply) - (before + after) / 2


def _pong() -> None:
    word = torch.zeros(1, dtype=torch.float64)
    dist.recv(word, 0)
    dist.send(torch.tensor([time.time()], dtype=torch.float64), 0)


def judge_pairs(speeds: Mapping[Pair, Speed | None]) -> list[Finding]:
    """Return the findings about links: pairs that failed, hosts with a slow link, and slow pairs of other hosts."""
    found = []
    for (one, other), speed in speeds.items():
        if speed is None:
            text = f"an all-reduce between {one} and {other} failed or took too long"
            remedy = "Check the route, the MTU and the firewall between them"
            found.append(Finding("FAIL", "network", (one, other), text, remedy))
    measured = {pair: speed for pair, speed in speeds.items() if speed is not None}
    bandwidth, latency = _best(measured)
    slow = far_below(bandwidth, SLOW_LINK)
    usual = statistics.median(latency.values()) if latency else 0.0
    distant = far_below({host: 1 / seconds for host, seconds in latency.items()}, SLOW_LINK)
    distant = [host for host in distant if latency[host] - usual > SAME_LATENCY]
    remedy = "Check its cable, switch port and interface (`ethtool`, `ip -s link`), or leave the host out"
    for host in dict.fromkeys([*slow, *distant]):
        text = f"{host} reaches its best partner with {_text(bandwidth[host], latency[host])}; the median of all hosts "
        text += f"is {_text(statistics.median(bandwidth.values()), usual)}"
        found.append(Finding("WARN", "network", (host,), text, remedy))
    for (one, other), speed in measured.items():
        expected = min(bandwidth[one], bandwidth[other])
        if speed.bandwidth < SLOW_LINK * expected and not {one, other} & {*slow, *distant}:
            text = f"{one} and {other} reach {in_bytes(speed.bandwidth)}/s between them, and "
            text += f"{in_bytes(expected)}/s with others"
            found.append(Finding("WARN", "network", (), text, "Check the switches and routes between these two hosts"))
    return found


def _best(speeds: Mapping[Pair, Speed]) -> tuple[dict[str, float], dict[str, float]]:
    """Return the highest bandwidth and the lowest latency of each host: a slow partner is not its fault."""
    hosts = list(dict.fromkeys(host for pair in speeds for host in pair))
    own = {host: [speed for pair, speed in speeds.items() if host in pair] for host in hosts}
    bandwidth = {host: max(speed.bandwidth for speed in found) for host, found in own.items()}
    return bandwidth, {host: min(speed.latency for speed in found) for host, found in own.items()}


def judge_skew(skew: Mapping[str, float]) -> list[Finding]:
    """Return the findings about clocks, relative to the median of all hosts."""
    middle = statistics.median(skew.values())
    found = []
    for host, seconds in skew.items():
        if abs(seconds - middle) > CLOCK_SKEW:
            direction = "ahead of" if seconds > middle else "behind"
            text = f"the clock of {host} is {abs(seconds - middle):.1f} s {direction} the others"
            remedy = "Start chrony or ntpd on it: logs, files and certificates carry its times"
            found.append(Finding("WARN", "clock", (host,), text, remedy))
    return found


def _text(bandwidth: float, latency: float) -> str:
    return f"{in_bytes(bandwidth)}/s and {1e3 * latency:.2f} ms"
