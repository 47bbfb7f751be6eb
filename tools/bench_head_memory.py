"""Peak memory of the head and its loss, forward and backward: chunked (this package) against full logits."""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_slm.models.head import token_loss


def main() -> None:
    options = parse_arguments()
    if options.way:
        print(peak_bytes(options))
        return
    found = {
        **{name: vars(options)[name] for name in ("tokens", "hidden", "vocab", "ratio", "device", "dtype")},
        "peak_bytes": {way: measure_alone(way) for way in WAYS},
        "seconds": time_in_turn(options) if options.rounds else {},
    }
    print(json.dumps(found) if options.json else table(found))


def parse_arguments() -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        epilog="Each way is measured in its own process: the allocator's peak on CUDA, the peak of the resident set on "
        "the CPU. The inputs and the gradient of the weight do not count. Full logits need about "
        "3 x tokens x vocab numbers: choose smaller sizes if memory is short.",
    )
    parser.add_argument("--tokens", type=int, default=8192, help="tokens of a micro-batch")
    parser.add_argument("--hidden", type=int, default=2048, help="hidden size")
    parser.add_argument("--vocab", type=int, default=128_000, help="vocabulary size")
    parser.add_argument("--ratio", type=float, default=1.0, help="share of the tokens with a gradient")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if cuda else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16" if cuda else "float32")
    parser.add_argument("--rounds", type=int, default=0, help="also time both ways, alternating, for this many rounds")
    parser.add_argument("--json", action="store_true", help="one line of JSON instead of the table")
    parser.add_argument("--way", choices=list(WAYS), help=argparse.SUPPRESS)
    return parser.parse_args()


def chunked(hidden: Tensor, weight: Tensor, labels: Tensor, upstream: Tensor) -> None:
    token_loss(hidden, weight, labels)[0].backward(upstream)


def full(hidden: Tensor, weight: Tensor, labels: Tensor, upstream: Tensor) -> None:
    F.cross_entropy(hidden @ weight.T, labels, reduction="none").backward(upstream.to(hidden.dtype))


WAYS: dict[str, Callable[..., None]] = {"chunked": chunked, "full": full}


def measure_alone(way: str) -> int:
    """Measure in a fresh process, because a peak cannot be reset."""
    return int(subprocess.check_output([sys.executable, *sys.argv, "--way", way], text=True))


def peak_bytes(options: argparse.Namespace) -> int:
    """Return the peak memory minus the inputs and the gradient of the weight."""
    WAYS[options.way](*make_inputs(options, tokens=8, hidden=8, vocab=8))
    inputs = make_inputs(options, options.tokens, options.hidden, options.vocab)
    before = memory_peak(options.device)
    WAYS[options.way](*inputs)
    return memory_peak(options.device) - before - inputs[1].nbytes


def make_inputs(
    options: argparse.Namespace, tokens: int, hidden: int, vocab: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    where = {"device": options.device, "dtype": getattr(torch, options.dtype)}
    hidden_ND = torch.randn(tokens, hidden, **where).requires_grad_()
    weight_VD = torch.randn(vocab, hidden, **where).mul_(0.02).requires_grad_()
    labels_N = torch.randint(vocab, (tokens,), device=options.device)
    upstream_N = (torch.rand(tokens, device=options.device) < options.ratio).float()
    return hidden_ND, weight_VD, labels_N, upstream_N


def memory_peak(device: str) -> int:
    if device == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def time_in_turn(options: argparse.Namespace) -> dict[str, list[float]]:
    """Return the seconds of each round, after one that is not measured."""
    inputs = make_inputs(options, options.tokens, options.hidden, options.vocab)
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for index in range(options.rounds + 1):
        for way, run in WAYS.items():
            start = time.perf_counter()
            run(*inputs)
            if options.device == "cuda":
                torch.cuda.synchronize()
            if index:
                seconds[way].append(time.perf_counter() - start)
            inputs[0].grad = inputs[1].grad = None
    return seconds


def table(found: dict[str, Any]) -> str:
    peak, seconds = found["peak_bytes"], found["seconds"]
    lines = ["{tokens:,} tokens, hidden {hidden:,}, vocabulary {vocab:,}, {dtype} on {device}".format(**found)]
    lines += [f"{way:8} peak {peak[way] / 2**30:8.3f} GiB" for way in WAYS]
    lines += [f"chunked takes {peak['chunked'] / peak['full']:.3f} of the memory of full logits"]
    for way, values in seconds.items():
        lines += [f"{way:8} {statistics.median(values):8.3f} s ({min(values):.3f} to {max(values):.3f})"]
    if seconds:
        ratio = statistics.median(seconds["chunked"]) / statistics.median(seconds["full"])
        lines += [f"chunked takes {ratio:.2f} of the time of full logits"]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
