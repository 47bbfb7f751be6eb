"""Speed of `megatron-slm prepare` against the tokenizer alone, and its memory as the text grows.

The tokenizer alone encodes the same text from memory, in as many processes, and writes nothing. Both alternate. Peak
memory is the sum of the resident sets of all processes; shared pages count in each.

    python tools/bench_prepare.py --data web.jsonl.gz [--megabytes 100] [--rounds 3] [--workers 2]
"""

import argparse
import gzip
import json
import multiprocessing
import os
import resource
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from common import CommandCost, measure_command, option_parser

from megatron_slm.data.corpus import open_corpus
from megatron_slm.data.sentencepiece_model import train_tokenizer
from megatron_slm.data.tokenizer import load_tokenizer, save_tokenizer
from megatron_slm.prepare.encoding import load_encoder

BATCH = 256  # documents


def main() -> None:
    parser = option_parser(__doc__)
    parser.add_argument("--data", required=True, help="jsonl.gz with real text under 'text'")
    parser.add_argument("--megabytes", type=float, default=100, help="of text, for the comparison of speed")
    parser.add_argument("--memory-megabytes", type=float, nargs="*", default=[100, 1000], help="of text, for memory")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--vocab", type=int, default=32_000)
    arguments = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with tempfile.TemporaryDirectory() as folder:
        measure(arguments, Path(folder))


def measure(arguments: argparse.Namespace, folder: Path) -> None:
    with gzip.open(arguments.data, "rt", encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in lines]
    train_tokenizer(texts[: len(texts) // 4], arguments.vocab, folder / "tokenizer.model")
    tokenizer = folder / "tokenizer"
    save_tokenizer(load_tokenizer(str(folder / "tokenizer.model")), tokenizer)
    print(f"tokenizers {version('tokenizers')}, Python {sys.version.split()[0]}, {arguments.workers} processes")
    compare(arguments, texts, tokenizer, folder)
    for megabytes in arguments.memory_megabytes:
        size = write(varied(texts, megabytes), folder / "long.jsonl")
        run = prepare(folder / "long.jsonl", tokenizer, folder / "long", arguments.workers)
        print(
            f"{size / 1e6:.0f} MB of text: peak memory {run.cost.peak_bytes / 1e6:.0f} MB, {run.tokens:,} tokens in "
            f"{run.cost.seconds:.1f} s ({run.cpu:.1f} CPU s)",
            flush=True,
        )


def compare(arguments: argparse.Namespace, texts: list[str], tokenizer: Path, folder: Path) -> None:
    """Compare the speed of prepare and of the tokenizer alone on the same text, alternating."""
    some = list(varied(texts, arguments.megabytes))
    write(some, folder / "web.jsonl")
    write(some[:1], folder / "one.jsonl")
    ratios = []
    for number in range(arguments.rounds):
        alone, alone_cpu, tokens = tokenizer_alone(some, tokenizer, arguments.workers)
        start = prepare(folder / "one.jsonl", tokenizer, folder / "one", arguments.workers)
        whole = prepare(folder / "web.jsonl", tokenizer, folder / "web", arguments.workers)
        assert whole.tokens == tokens + len(some)  # end tokens
        ratios.append(
            (
                alone / whole.cost.seconds,
                alone / (whole.cost.seconds - start.cost.seconds),
                alone_cpu / (whole.cpu - start.cpu),
            )
        )
        print(
            f"round {number + 1}: tokenizer alone {tokens / alone:,.0f} tokens/s ({alone_cpu:.1f} CPU s), "
            f"prepare {tokens / whole.cost.seconds:,.0f} ({whole.cpu:.1f} CPU s), of which its start takes "
            f"{start.cost.seconds:.1f} s ({start.cpu:.1f} CPU s)",
            flush=True,
        )
    whole_ratio, ratio, cpu_ratio = (statistics.median(column) for column in zip(*ratios, strict=True))
    print(
        f"prepare's speed over the tokenizer's, median of {arguments.rounds}: {whole_ratio:.2f}; "
        f"without its start {ratio:.2f}; by CPU seconds, without its start {cpu_ratio:.2f}",
        flush=True,
    )


def varied(texts: list[str], megabytes: float) -> Iterator[str]:
    """Yield documents up to a total size; repeated documents are rotated by different numbers of characters."""
    size = turn = 0
    while True:
        for number, text in enumerate(texts):
            place = (turn * 7919 + number) % (len(text) + 1) if turn else 0
            yield text[place:] + text[:place]
            size += len(text.encode())
            if size >= megabytes * 1e6:
                return
        turn += 1


def write(texts: Iterable[str], path: Path) -> int:
    """Write jsonl, and return the bytes of its text."""
    size = 0
    with path.open("w", encoding="utf-8") as stream:
        for text in texts:
            stream.write(json.dumps({"text": text}) + "\n")
            size += len(text.encode())
    return size


class PrepareRun(NamedTuple):
    """One run of the command: its cost, the CPU seconds of all its processes, and the tokens that it wrote."""

    cost: CommandCost
    cpu: float
    tokens: int


def prepare(path: Path, tokenizer: Path, output: Path, workers: int) -> PrepareRun:
    """Measure one run of the command, and remove its output."""
    options = ["--input", str(path), "--tokenizer", str(tokenizer), "--output", str(output), "--workers", str(workers)]
    before = children_cpu()
    cost = measure_command(["prepare", *options], tree_bytes, interval=0.1)
    cpu = children_cpu() - before
    tokens = open_corpus(str(output)).num_tokens
    for suffix in (".bin", ".idx", ".json"):
        Path(f"{output}{suffix}").unlink()
    shutil.rmtree(f"{output}.tokenizer")
    return PrepareRun(cost, cpu, tokens)


def tree_bytes(process: psutil.Process) -> int:
    return sum(member.memory_info().rss for member in (process, *process.children(recursive=True)))


def children_cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def tokenizer_alone(texts: list[str], tokenizer: Path, workers: int) -> tuple[float, float, int]:
    """Return the seconds, CPU seconds and tokens of `encode_batch` with an equal share of the texts per process."""
    context = multiprocessing.get_context("fork")
    barrier, queue = context.Barrier(workers + 1), context.Queue()
    processes = [
        context.Process(target=encode_share, args=(texts[rank::workers], tokenizer, barrier, queue))
        for rank in range(workers)
    ]
    for process in processes:
        process.start()
    barrier.wait()
    start = time.perf_counter()
    cpu, tokens = (sum(column) for column in zip(*(queue.get() for _ in processes), strict=True))
    seconds = time.perf_counter() - start
    for process in processes:
        process.join()
    return seconds, cpu, tokens


def encode_share(texts: list[str], tokenizer: Path, barrier: Any, queue: Any) -> None:
    encoder = load_encoder(str(tokenizer / "tokenizer.json"))
    barrier.wait()
    start_cpu = time.process_time()
    tokens = 0
    for start in range(0, len(texts), BATCH):
        encoded = encoder.encode_batch(texts[start : start + BATCH], add_special_tokens=False)
        tokens += sum(len(one) for one in encoded)
    queue.put((time.process_time() - start_cpu, tokens))


if __name__ == "__main__":
    main()
