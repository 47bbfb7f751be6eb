"""Time and memory of the order of samples at the size of a long run: corpora of many documents, blended.

The corpora are sparse: their indices are real, with documents of random lengths, and their `.bin` files are holes that
take no disk space. Ranks on this machine build the order of samples as a run does: rank 0 builds the indices, all ranks
map them. Then every rank reads random samples. Private memory is what a rank alone holds; a mapped page that all ranks
use is counted once per node.

    python tools/data_path_at_scale.py [--tokens 80B] [--documents 100M] [--weights 6 3 1] [--ranks 8] [--json]
"""

import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from common import is_rank, option_parser, start_ranks

from megatron_slm.data.corpus import Corpus, write_index
from megatron_slm.data.samples import build_samples
from megatron_slm.data.settings import DataSettings
from megatron_slm.dist import connect, disconnect, gather_objects
from megatron_slm.settings import parse_quantity

_BLOCK = 1 << 22  # documents whose lengths are drawn at once


def main() -> None:
    parser = option_parser(__doc__)
    parser.add_argument("--tokens", type=parse_quantity, default=80_000_000_000, help="tokens of all corpora")
    parser.add_argument("--documents", type=parse_quantity, default=100_000_000, help="documents of all corpora")
    parser.add_argument("--weights", type=float, nargs="+", default=[6.0, 3.0, 1.0], help="of the blend")
    parser.add_argument("--train-tokens", type=parse_quantity, help="tokens to train on (default: --tokens)")
    parser.add_argument("--seq-length", type=parse_quantity, default=2048)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--reads", type=int, default=2000, help="random samples that every rank reads")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--folder", type=Path, help="folder for the corpora (default: a temporary one)")
    options = parser.parse_args()
    if is_rank():
        measure_rank(options)
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        begin = time.perf_counter()
        make_corpora(Path(folder), options.tokens, options.documents, options.weights)
        sys.stderr.write(f"made the corpora in {time.perf_counter() - begin:.0f} s\n")
        sys.exit(start_ranks(options.ranks, "--folder", folder))


def make_corpora(folder: Path, tokens: int, documents: int, weights: list[float]) -> None:
    """Write sparse corpora that divide tokens and documents by their weights, and `corpora.json`."""
    described = []
    for number, share in enumerate(np.array(weights) / sum(weights)):
        prefix, count = folder / f"corpus{number}", round(documents * share)
        total = write_lengths(folder / "lengths", count, tokens / documents, number)
        write_index(Path(f"{prefix}.idx"), "uint16", folder / "lengths")
        (folder / "lengths").unlink()
        Path(f"{prefix}.bin").touch()
        os.truncate(f"{prefix}.bin", 2 * total)
        described.append({"prefix": str(prefix), "name": prefix.name, "num_documents": count, "num_tokens": total})
    (folder / "corpora.json").write_text(json.dumps(described))


def write_lengths(path: Path, documents: int, mean: float, seed: int) -> int:
    """Write the lengths of documents, int32, log-normal with the given mean; return their sum."""
    draw, total = np.random.default_rng(seed), 0
    with path.open("wb") as stream:
        for first in range(0, documents, _BLOCK):
            count = min(_BLOCK, documents - first)
            length_D = np.maximum(1, draw.lognormal(np.log(mean) - 0.5, 1.0, count)).astype(np.int32)
            total += int(length_D.sum(dtype=np.int64))
            length_D.tofile(stream)
    return total


def measure_rank(options: Any) -> None:
    """Build the order and read samples; rank 0 prints the results of all ranks."""
    world = connect()
    described = json.loads((options.folder / "corpora.json").read_text())
    corpora = [
        Corpus(**entry, num_bytes=1, tokenizer_fingerprint="", sha256={".bin": entry["name"]}) for entry in described
    ]
    blend = [part for weight, corpus in zip(options.weights, corpora, strict=True) for part in (weight, corpus.prefix)]
    settings = DataSettings(train=blend, seq_length=options.seq_length)
    order_tokens = options.train_tokens or sum(corpus.num_tokens for corpus in corpora)
    total = order_tokens // options.seq_length

    def build() -> Any:
        cache = options.folder / "cache"
        return build_samples(
            settings, corpora, seed=1, order_tokens=order_tokens, total_samples=total, cache=cache, world=world
        )

    found: dict[str, float] = {"samples": total, "private_before": private_bytes()}
    for name in ("build", "load"):  # at the first start of a run, and at a restart
        with measured(found, name):
            samples = build()
        found[f"{name}_private"] = private_bytes()
        if name == "build":
            del samples
    places = np.random.default_rng(world.rank).integers(0, total, options.reads)
    begin = time.perf_counter()
    for place in places:
        samples[int(place)]
    found["read_us"] = 1e6 * (time.perf_counter() - begin) / max(1, len(places))
    found["read_private"], found["pss"] = private_bytes(), psutil.Process().memory_full_info().pss
    everything = gather_objects(found)
    if world.is_main:
        indices = sum(path.stat().st_size for path in (options.folder / "cache").rglob("*") if path.is_file())
        show(everything, indices, options.json)
    disconnect()


def private_bytes() -> int:
    """Return the memory of this process without pages of mapped files and other shared pages."""
    memory = psutil.Process().memory_info()
    return int(memory.rss - memory.shared)


@contextmanager
def measured(found: dict[str, float], name: str) -> Iterator[None]:
    """Record the seconds and the peak private memory of a block."""
    peak, stop = [private_bytes()], threading.Event()

    def watch() -> None:
        while not stop.wait(0.05):
            peak.append(max(peak.pop(), private_bytes()))

    thread = threading.Thread(target=watch)
    thread.start()
    begin = time.perf_counter()
    try:
        yield
    finally:
        found[f"{name}_seconds"] = time.perf_counter() - begin
        stop.set()
        thread.join()
        found[f"{name}_peak"] = peak[0]


def show(ranks: list[dict[str, float]], indices: int, as_json: bool) -> None:
    if as_json:
        sys.stdout.write(json.dumps({"indices": indices, "ranks": ranks}) + "\n")
        return
    first = ranks[0]
    sys.stdout.write(f"{first['samples']:,} samples, indices of {indices / 1e9:.2f} GB\n")
    for name in ("build", "load"):
        sys.stdout.write(f"{name}: {max(rank[f'{name}_seconds'] for rank in ranks):.1f} s\n")
    sys.stdout.write(f"read: {sum(rank['read_us'] for rank in ranks) / len(ranks):.0f} us per sample\n")
    columns = ("private_before", "build_peak", "build_private", "load_peak", "load_private", "read_private", "pss")
    for number, rank in enumerate(ranks):
        memory = ", ".join(f"{column} {rank[column] / 1e6:.0f} MB" for column in columns)
        sys.stdout.write(f"rank {number}: {memory}\n")
    added = sum(rank["read_private"] - rank["private_before"] for rank in ranks)
    sys.stdout.write(f"node: {added / 1e9:.2f} GB of private memory added by {len(ranks)} ranks\n")


if __name__ == "__main__":
    main()
