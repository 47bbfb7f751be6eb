"""Time and memory of `megatron-slm filter`, as tokens and documents grow.

The corpora have random tokens (`prepare --adopt`), and the two stores random losses (`score --import`). Each size is
filtered several times, alternating with the others, with the stores in the page cache. Memory excludes pages of mapped
files, which the system can reclaim.

    python tools/bench_filter.py --tokenizer data/web.tokenizer [--tokens 20M 200M] [--documents 100k 1M] [--rounds 3]
"""

import itertools
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import psutil
from common import CommandCost, measure_command, option_parser

from megatron_slm.data.corpus import write_index
from megatron_slm.settings import parse_quantity


def main() -> None:
    parser = option_parser(__doc__)
    parser.add_argument("--tokenizer", required=True, help="folder of any tokenizer with more than 255 tokens")
    parser.add_argument("--tokens", type=parse_quantity, nargs="*", default=[20_000_000, 200_000_000])
    parser.add_argument("--documents", type=parse_quantity, nargs="*", default=[100_000, 1_000_000])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sizes = list(itertools.product(options.tokens, options.documents))
        configs = [make_corpus(Path(folder), tokens, documents, options.tokenizer) for tokens, documents in sizes]
        found = [[run_filter(config) for config in configs] for _ in range(options.rounds)]
    for (tokens, documents), runs in zip(sizes, zip(*found, strict=True), strict=True):
        seconds, peak = statistics.median(run.seconds for run in runs), max(run.peak_bytes for run in runs)
        text = f"{tokens:,} tokens in {documents:,} documents: {seconds:.1f} s, {tokens / seconds / 1e6:.0f}M tokens/s"
        sys.stdout.write(f"{text}, peak memory {peak / 1e6:.0f} MB\n")


def make_corpus(folder: Path, tokens: int, documents: int, tokenizer: str) -> Path:
    """Make a corpus with documents of random lengths and its two stores, and return its configuration."""
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


def run_filter(config: Path) -> CommandCost:
    """Measure one run of the command, and remove its output."""
    prefix = config.with_suffix("")
    keep = Path(f"{prefix}.keep")
    settings = [f"filter.base={prefix}-base", f"filter.reference={prefix}-reference", f"filter.output={keep}"]
    cost = measure_command(["filter", str(config), *settings, "filter.keep=0.5"], own_bytes, interval=0.02)
    keep.unlink()
    return cost


def own_bytes(process: psutil.Process) -> int:
    memory = process.memory_info()
    return int(memory.rss - memory.shared)


def command(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "megatron_slm", *arguments], check=True, stderr=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
