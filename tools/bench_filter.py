"""Time and memory of `megatron-slm filter`, as tokens and documents grow.

Corpora of random tokens, described by `prepare --adopt`, and two stores of random losses, by `score --import`. Each
size is filtered several times, all sizes in turn, with the stores in the page cache. Memory is the command's own: pages
of files, which the system takes back when it needs them, are not counted.

    python tools/bench_filter.py --tokenizer data/web.tokenizer [--tokens 20M 200M] [--documents 100k 1M] [--rounds 3]
"""

import argparse
import contextlib
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil

from megatron_slm.data.corpus import write_index
from megatron_slm.settings import parse_quantity


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, help="folder of any tokenizer with more than 255 tokens")
    parser.add_argument("--tokens", type=parse_quantity, nargs="*", default=[20_000_000, 200_000_000])
    parser.add_argument("--documents", type=parse_quantity, nargs="*", default=[100_000, 1_000_000])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sizes = list(itertools.product(options.tokens, options.documents))
        configs = [made(Path(folder), tokens, documents, options.tokenizer) for tokens, documents in sizes]
        found = [[filtered(config) for config in configs] for _ in range(options.rounds)]
    for (tokens, documents), runs in zip(sizes, zip(*found, strict=True), strict=True):
        seconds, peak = statistics.median(run[0] for run in runs), max(run[1] for run in runs)
        text = f"{tokens:,} tokens in {documents:,} documents: {seconds:.1f} s, {tokens / seconds / 1e6:.0f}M tokens/s"
        sys.stdout.write(f"{text}, peak memory {peak / 1e6:.0f} MB\n")


def made(folder: Path, tokens: int, documents: int, tokenizer: str) -> Path:
    """The configuration of a corpus of this size, with its stores; lengths of documents vary."""
    prefix = folder / f"{tokens}-{documents}"
    draw = np.random.default_rng(0)
    ends = np.sort(draw.integers(0, tokens, documents - 1))
    np.diff(ends, prepend=0, append=tokens).astype(np.int32).tofile(folder / "lengths")
    write_index(Path(f"{prefix}.idx"), "uint16", folder / "lengths")
    draw.integers(0, 256, tokens, dtype=np.uint16).tofile(f"{prefix}.bin")
    command("prepare", "--adopt", str(prefix), "--tokenizer", tokenizer)
    config = Path(f"{prefix}.yaml")
    config.write_text(json.dumps({"data": {"train": [str(prefix)]}}))
    for model in ("base", "reference"):
        np.save(f"{prefix}.npy", -draw.random(tokens, dtype=np.float32))
        store = (f"score.output={prefix}-{model}", "score.kind=document")
        command("score", str(config), *store, "--import", f"{prefix}.npy")
    Path(f"{prefix}.npy").unlink()
    return config


def filtered(config: Path) -> tuple[float, int]:
    """Seconds and peak bytes of one run of the command; what it wrote is removed."""
    prefix = config.with_suffix("")
    keep = Path(f"{prefix}.keep")
    settings = [f"filter.base={prefix}-base", f"filter.reference={prefix}-reference", f"filter.output={keep}"]
    start = time.perf_counter()
    arguments = [sys.executable, "-m", "megatron_slm", "filter", str(config), *settings, "filter.keep=0.5"]
    process = psutil.Popen(arguments, stderr=subprocess.PIPE)
    peak = 0
    while process.poll() is None:
        with contextlib.suppress(psutil.NoSuchProcess):
            memory = process.memory_info()
            peak = max(peak, memory.rss - memory.shared)
        time.sleep(0.02)
    if process.returncode:
        sys.exit(process.stderr.read().decode())
    keep.unlink()
    return time.perf_counter() - start, peak


def command(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "megatron_slm", *arguments], check=True, stderr=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
