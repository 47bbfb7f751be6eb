"""Time of the radix threshold over all ranks, against gathering all scores and sorting them."""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from common import is_rank, start_ranks
from torch import Tensor

from megatron_slm.dist import World, connect, disconnect
from megatron_slm.selection import plan_k, select_tokens


def main() -> None:
    options = parse_arguments()
    if not is_rank():
        sys.exit(start_ranks(options.ranks))
    # Ranks on one host share its cores: one thread each, unless the launcher sets another number.
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    world = connect()
    torch.manual_seed(world.rank)
    scores = torch.randn(options.scores, device=world.device)
    valid = torch.rand(options.scores, device=world.device) < 0.95
    check(scores, valid, options.ratio)
    seconds = measure(scores, valid, options.ratio, options.rounds, world)
    if world.is_main:
        report(seconds, options, world)
    disconnect()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        epilog="All ways alternate within each round, so that a busy machine slows all of them. The exit status is 1 "
        "if the masks differ. Without a launcher the program starts its ranks; under torchrun it is one of them.",
    )
    parser.add_argument("--ranks", type=int, default=2, help="ranks to start on this host; ignored under torchrun")
    parser.add_argument("--scores", type=int, default=1_000_000, help="scores per rank")
    parser.add_argument("--ratio", type=float, default=0.6, help="share that is selected")
    parser.add_argument("--rounds", type=int, default=15, help="measured rounds, after two that are not measured")
    parser.add_argument("--json", action="store_true", help="one line of JSON instead of the table")
    return parser.parse_args()


def radix(scores: Tensor, valid: Tensor, ratio: float) -> Tensor:
    return select_tokens(scores, valid, ratio).mask


def gather_and_sort(scores: Tensor, valid: Tensor, ratio: float) -> Tensor:
    everyone, k = gather(scores, valid, ratio)
    return valid & (scores >= everyone.sort(descending=True).values[k - 1])


def gather_and_topk(scores: Tensor, valid: Tensor, ratio: float) -> Tensor:
    everyone, k = gather(scores, valid, ratio)
    return valid & (scores >= everyone.topk(k).values[-1])


def gather(scores: Tensor, valid: Tensor, ratio: float) -> tuple[Tensor, int]:
    """Return the scores of all ranks, with -inf for invalid ones, and the number of tokens to select."""
    num_valid = valid.sum()
    dist.all_reduce(num_valid)
    everyone = scores.new_empty(dist.get_world_size(), len(scores))
    dist.all_gather(list(everyone), scores.masked_fill(~valid, -torch.inf))
    return everyone.flatten(), int(plan_k(num_valid, ratio))


WAYS: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "radix": radix,
    "gather_and_sort": gather_and_sort,
    "gather_and_topk": gather_and_topk,
}


def check(scores: Tensor, valid: Tensor, ratio: float) -> None:
    """Exit if the masks differ: by a bug, or by a tie at the threshold, which sorting the values does not break."""
    masks = [way(scores, valid, ratio) for way in WAYS.values()]
    if any(not torch.equal(mask, masks[0]) for mask in masks):
        sys.exit("The masks differ: a bug, or a tie at the threshold.")


def measure(scores: Tensor, valid: Tensor, ratio: float, rounds: int, world: World) -> dict[str, list[float]]:
    """Return the seconds of each round on the slowest rank."""
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    for index in range(rounds + 2):
        for name, way in WAYS.items():
            dist.barrier()
            start = time.perf_counter()
            way(scores, valid, ratio)
            if world.device.type == "cuda":
                torch.cuda.synchronize()
            taken = torch.tensor(time.perf_counter() - start)
            dist.all_reduce(taken, op=dist.ReduceOp.MAX)
            if index >= 2:
                seconds[name].append(taken.item())
    return seconds


def report(seconds: dict[str, list[float]], options: argparse.Namespace, world: World) -> None:
    median = {name: statistics.median(values) for name, values in seconds.items()}
    rows = {
        name: {
            "median_ms": 1e3 * median[name],
            "fastest_ms": 1e3 * min(values),
            "slowest_ms": 1e3 * max(values),
            "radix_relative": median["radix"] / median[name],
        }
        for name, values in seconds.items()
    }
    if options.json:
        setting = {"ranks": world.size, "scores_per_rank": options.scores, "ratio": options.ratio}
        print(json.dumps({**setting, "rounds": options.rounds, "device": world.device.type, **rows}))
        return
    print(
        f"{world.size} ranks x {options.scores:,} scores on {world.device.type}, {options.rounds} rounds, milliseconds"
    )
    print(f"{'':18}{'median':>9}{'fastest':>9}{'slowest':>9}   radix/this")
    for name, row in rows.items():
        times = "".join(f"{row[key]:9.1f}" for key in ("median_ms", "fastest_ms", "slowest_ms"))
        print(f"{name:18}{times}{row['radix_relative']:13.2f}")


if __name__ == "__main__":
    main()
