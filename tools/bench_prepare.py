"""Compare `megatron-slm prepare` with the tokenizer's own batch speed, and watch its memory as the text grows.

The tokenizer gets its share of the same text in memory, in as many processes, and writes nothing. Both
take turns. Peak memory is the sum of the resident sets of all processes, shared pages counted in each.

    python tools/bench_prepare.py --data web.jsonl.gz [--megabytes 100] [--rounds 3] [--workers 2]
"""

import argparse
import contextlib
import gzip
import json
import multiprocessing
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import psutil

from megatron_slm.data.corpus import open_corpus
from megatron_slm.data.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer
from megatron_slm.prepare.encoding import load_encoder

BATCH = 256  # documents


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
            f"{size / 1e6:.0f} MB of text: peak memory {run.peak / 1e6:.0f} MB, {run.tokens:,} tokens in "
            f"{run.seconds:.1f} s ({run.cpu:.1f} CPU s)",
            flush=True,
        )


def compare(arguments: argparse.Namespace, texts: list[str], tokenizer: Path, folder: Path) -> None:
    """Speed of both, in turn, on the same text."""
    some = list(varied(texts, arguments.megabytes))
    write(iter(some), folder / "web.jsonl")
    write(iter(some[:1]), folder / "one.jsonl")
    ratios = []
    for number in range(arguments.rounds):
        alone, alone_cpu, tokens = tokenizer_alone(some, tokenizer, arguments.workers)
        start = prepare(folder / "one.jsonl", tokenizer, folder / "one", arguments.workers)
        whole = prepare(folder / "web.jsonl", tokenizer, folder / "web", arguments.workers)
        assert whole.tokens == tokens + len(some)  # end tokens
        ratios.append(
            (alone / whole.seconds, alone / (whole.seconds - start.seconds), alone_cpu / (whole.cpu - start.cpu))
        )
        print(
            f"round {number + 1}: tokenizer alone {tokens / alone:,.0f} tokens/s ({alone_cpu:.1f} CPU s), "
            f"prepare {tokens / whole.seconds:,.0f} ({whole.cpu:.1f} CPU s), of which its start takes "
            f"{start.seconds:.1f} s ({start.cpu:.1f} CPU s)",
            flush=True,
        )
    whole_ratio, ratio, cpu_ratio = (statistics.median(column) for column in zip(*ratios, strict=True))
    print(
        f"prepare's speed over the tokenizer's, median of {arguments.rounds}: {whole_ratio:.2f}; "
        f"without its start {ratio:.2f}; by CPU seconds, without its start {cpu_ratio:.2f}",
        flush=True,
    )


def varied(texts: list[str], megabytes: float) -> Iterator[str]:
    """Documents up to a size; when all have come, they come again, turned about a place of their own."""
    size = turn = 0
    while True:
        for number, text in enumerate(texts):
            place = (turn * 7919 + number) % (len(text) + 1) if turn else 0
            yield text[place:] + text[:place]
            size += len(text.encode())
            if size >= megabytes * 1e6:
                return
        turn += 1


def write(texts: Iterator[str], path: Path) -> int:
    """Write jsonl; return the bytes of its text."""
    size = 0
    with path.open("w", encoding="utf-8") as stream:
        for text in texts:
            stream.write(json.dumps({"text": text}) + "\n")
            size += len(text.encode())
    return size


class Run(NamedTuple):
    """What one run of the command took: CPU seconds and peak bytes of all its processes."""

    seconds: float
    cpu: float
    peak: int
    tokens: int


def prepare(path: Path, tokenizer: Path, output: Path, workers: int) -> Run:
    """Run the command, and remove what it made."""
    verb = ["prepare", "--input", str(path), "--tokenizer", str(tokenizer), "--output", str(output)]
    start, before = time.perf_counter(), children_cpu()
    process = psutil.Popen(
        [sys.executable, "-m", "megatron_slm", *verb, "--workers", str(workers)], stderr=subprocess.DEVNULL
    )
    peak = 0
    while process.poll() is None:
        with contextlib.suppress(psutil.NoSuchProcess):
            peak = max(peak, sum(p.memory_info().rss for p in (process, *process.children(recursive=True))))
        time.sleep(0.1)
    seconds, cpu = time.perf_counter() - start, children_cpu() - before
    if process.returncode:
        raise SystemExit("prepare failed")
    tokens = open_corpus(str(output)).num_tokens
    for suffix in (".bin", ".idx", ".json"):
        Path(f"{output}{suffix}").unlink()
    shutil.rmtree(f"{output}.tokenizer")
    return Run(seconds, cpu, peak, tokens)


def children_cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def tokenizer_alone(texts: list[str], tokenizer: Path, workers: int) -> tuple[float, float, int]:
    """Seconds, CPU seconds and tokens of `encode_batch` on equal shares that each process holds."""
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


def encode_share(texts: list[str], tokenizer: Path, barrier: object, queue: object) -> None:
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
