"""The time of collectives on a cluster, by an alpha-beta model.

A message of n bytes takes alpha + n * beta on a link: alpha is the latency of the link, beta the inverse of its
bandwidth. NVLink joins the devices of a node, a network joins the nodes. The model knows no congestion and no
stragglers.
"""

import math
from dataclasses import dataclass, field
from typing import Any

MICRO, GIGA = 1e-6, 1e9


def _parameter(default: float, source: str) -> Any:
    return field(default=default, metadata={"source": source})


@dataclass(frozen=True)
class Network:
    """The links of a cluster; each field names the source of its default.

    NCCL chooses its algorithms by a model of this kind, in `src/graph/tuning.cc` (read at commit b647562). The defaults
    are the latencies of its tree with the LL protocol, which it uses for messages of this size.

    On 256 A100s in 32 nodes, NCCL's all-reduces of 8 to 128 bytes were measured at 62 to 66 us (NVIDIA/nccl#652). The
    model gives 65 us.
    """

    gpus_per_node: int = _parameter(8, "DGX H100")
    launch_us: float = _parameter(6.8, "NCCL tuning.cc, baseLat, tree, LL")
    nvlink_us: float = _parameter(0.6, "NCCL tuning.cc, hwLat, NVLink, tree, LL")
    network_us: float = _parameter(5.0, "NCCL tuning.cc, hwLat, network, tree, LL")
    nvlink_gb: float = _parameter(450.0, "NVLink 4: 900 GB/s per GPU in both directions (H100 datasheet)")
    network_gb: float = _parameter(50.0, "NDR InfiniBand: 400 Gb/s, one adapter per GPU (DGX H100)")
    ll_efficiency: float = _parameter(0.25, "NCCL tuning.cc: LL reaches about 1/4 of the bandwidth")
    ring_launch_us: float = _parameter(8.4, "NCCL tuning.cc (commit 01afd20), baseLat, ring, Simple")
    ring_nvlink_us: float = _parameter(3.4, "NCCL tuning.cc (commit 01afd20), hwLat, NVLink, ring, Simple")
    ring_network_us: float = _parameter(9.6, "NCCL tuning.cc (commit 01afd20), hwLat, network, ring, Simple")

    def all_reduce(self, ranks: int, size: int, algorithm: str) -> float:
        """Return the seconds of an all-reduce of `size` bytes; `best` takes the faster algorithm, as NCCL does."""
        if ranks == 1:
            return 0.0
        times = {"tree": self._tree(ranks, size), "ring": self._ring(ranks, size)}
        return min(times.values()) if algorithm == "best" else times[algorithm]

    def shard_or_gather(self, ranks: int, size: int, messages: int = 1) -> float:
        """Return the seconds of all-gathers (or of reduce-scatters) by a ring with the Simple protocol.

        Args:
            ranks: number of ranks.
            size: bytes of all messages together, as they are when whole.
            messages: number of messages among which they are divided.
        """
        if ranks == 1:
            return 0.0
        between = self._nodes(ranks) - 1
        hops = between * self.ring_network_us + (ranks - 1 - between) * self.ring_nvlink_us
        seconds = size * (ranks - 1) / ranks / (self._bandwidth(ranks) * GIGA)
        return messages * (self.ring_launch_us + hops) * MICRO + seconds

    def gather_ring(self, ranks: int, size: int) -> float:
        """Return the seconds of a ring all-gather of `size` bytes per rank: NCCL's, with several GPUs per node."""
        between = self._nodes(ranks) - 1
        latency = between * self.network_us + (ranks - 1 - between) * self.nvlink_us
        return self._streamed(latency, ranks, (ranks - 1) * size)

    def gather_logarithmic(self, ranks: int, size: int) -> float:
        """Return the seconds of an all-gather by recursive doubling: a lower bound for any algorithm."""
        local = min(ranks, self.gpus_per_node)
        latency = _doublings(local) * self.nvlink_us + _doublings(self._nodes(ranks)) * self.network_us
        return self._streamed(latency, ranks, (ranks - 1) * size)

    def _tree(self, ranks: int, size: int) -> float:
        # A chain within each node and a binary tree of the nodes, up and down. Every hop waits for the whole message;
        # NCCL pipelines chunks and uses all adapters of a node, so this is an upper bound.
        chain, depth = min(ranks, self.gpus_per_node) - 1, _doublings(self._nodes(ranks))
        nvlink = self.nvlink_us * MICRO + size / (self.ll_efficiency * self.nvlink_gb * GIGA)
        network = self.network_us * MICRO + size / (self.ll_efficiency * self.network_gb * GIGA)
        return self.launch_us * MICRO + 2 * (chain * nvlink + depth * network)

    def _ring(self, ranks: int, size: int) -> float:
        nodes, steps = self._nodes(ranks), 2 * (ranks - 1)
        between = 2 * nodes if nodes > 1 else 0
        latency = between * self.network_us + (steps - between) * self.nvlink_us
        return self._streamed(latency, ranks, steps * size / ranks / self.ll_efficiency)

    def _streamed(self, latency_us: float, ranks: int, size: float) -> float:
        return (self.launch_us + latency_us) * MICRO + size / (self._bandwidth(ranks) * GIGA)

    def _bandwidth(self, ranks: int) -> float:
        # NCCL runs one ring per adapter, so a node has the bandwidth of all its adapters.
        between = self.gpus_per_node * self.network_gb if self._nodes(ranks) > 1 else math.inf
        return min(self.nvlink_gb, between)

    def _nodes(self, ranks: int) -> int:
        return -(-ranks // self.gpus_per_node)


def _doublings(count: int) -> int:
    return (count - 1).bit_length()
