"""The cost of a store of reference scores, and its effect on the selection, at the sizes of a run.

    python tools/bench_store.py demo/runs/slm.yaml [--ranks 2] [--tokens 1M] [--rounds 20]

Scores the samples of the run (packed in float32 and in two bytes, and by document). Then, on the same ranks, steps with
the live reference, with each store, and plain steps (CLM) alternate. Reading is also timed alone, the first time and
again. The selections from each store are compared with those from the live reference.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import is_rank, option_parser, start_ranks

from megatron_slm.build.corpora import open_corpora
from megatron_slm.build.references import Order, open_matching_store, stored_reference
from megatron_slm.build.run import build_run
from megatron_slm.build.scoring import score_corpora
from megatron_slm.config import Config, parse_config
from megatron_slm.config_file import read_tree
from megatron_slm.dist import World, all_reduce_sum, connect, disconnect
from megatron_slm.reference.references import NoReference, Reference
from megatron_slm.selection.rule import Rule
from megatron_slm.selection.scores import excess
from megatron_slm.selection.select import select_tokens
from megatron_slm.settings import parse_quantity
from megatron_slm.training.objective import CausalLanguageModeling, SelectiveLanguageModeling
from megatron_slm.training.step import TrainingStep

KINDS = {
    "packed float32": {"kind": "packed", "encoding": "float32"},
    "packed fixed16": {"kind": "packed", "encoding": "fixed16"},
    "document fixed16": {"kind": "document", "encoding": "fixed16"},
}
NEAR = 1e-5


def main() -> None:
    options = parse_arguments()
    if not is_rank():
        with tempfile.TemporaryDirectory() as folder:
            sys.exit(start_ranks(options.ranks, "--folder", folder))
    world = connect()
    found = measure(options, world)
    if world.is_main:
        print(json.dumps(found) if options.json else table(found))
    disconnect()


def parse_arguments() -> argparse.Namespace:
    parser = option_parser(__doc__)
    parser.add_argument("config", help="YAML of a selective run with a live reference")
    parser.add_argument("--ranks", type=int, default=2, help="ranks to start on this host; default: 2")
    parser.add_argument(
        "--tokens", type=parse_quantity, default=1_000_000, help="tokens whose selections are compared; default: 1M"
    )
    parser.add_argument("--rounds", type=int, default=20, help="steps of each kind; default: 20")
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=list(KINDS), help="kinds of stores; default: all")
    parser.add_argument("--json", action="store_true", help="one line of JSON instead of the table")
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    return parser.parse_args()


def measure(options: argparse.Namespace, world: World) -> dict[str, Any]:
    folder = Path(options.folder)
    tree = read_tree(
        options.config,
        [f"run_dir={folder / 'run'}", "training.save_interval=1000000", f"training.train_tokens={options.tokens}"],
    )
    steps = -(-options.tokens // (tree["training"]["global_batch_size"] * tree["data"]["seq_length"]))
    live = parse_config(tree)
    run = build_run(live, world)
    step, loader = run.trainer._step, run.trainer._loader
    stores: dict[str, Reference] = {}
    scoring: dict[str, float] = {}
    for name in options.kinds:
        stores[name], scoring[name] = stored(name, KINDS[name], live, folder, world)
    reading = {name: time_reading(store, loader, live, rounds=options.rounds) for name, store in stores.items()}
    ways = steps_by_way(step, stores, world)
    batches = loader.load(0)
    selective = SelectiveLanguageModeling(Rule(live.selection), live.selection.ratio, pools_whole_step=False)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(options.rounds + 2):
        for name, way in ways.items():
            start = time.perf_counter()
            way(batches, CausalLanguageModeling() if name == "plain" else selective, 0.0, turn)
            if turn > 1:
                seconds[name].append(time.perf_counter() - start)
    return {
        "ranks": world.size,
        "device": world.device.type,
        "scoring_seconds": scoring,
        "step_seconds": {name: statistics.median(found) for name, found in seconds.items()},
        "read_seconds": reading,
        "selections": compare(step, loader, stores, live, steps),
    }


def stored(name: str, kind: dict[str, str], config: Config, folder: Path, world: World) -> tuple[Reference, float]:
    """Score the run's corpora, and return the opened store and the seconds that scoring took."""
    from megatron_slm.reference.settings import ScoreSettings

    output = folder / name.replace(" ", "-")
    settings = ScoreSettings(str(output), **kind)  # type: ignore[arg-type]
    start = time.perf_counter()
    score_corpora(config, settings, world)
    seconds = time.perf_counter() - start
    corpora = open_corpora(config.data)
    store = open_matching_store(str(output), corpora)
    order = Order(store.manifest.order_fingerprint, 0)
    return stored_reference(store, config.data, corpora, order, ()), seconds


def time_reading(store: Reference, loader: Any, config: Config, rounds: int) -> dict[str, float]:
    """Return the median seconds to read the scores of a step: the first time, which verifies checksums, and again."""
    steps = [loader.load(turn * config.training.global_batch_size) for turn in range(rounds)]
    found = {}
    for name in ("first", "again"):
        seconds = []
        for batches in steps:
            start = time.perf_counter()
            store.signals(batches, ())
            seconds.append(time.perf_counter() - start)
        found[name] = statistics.median(seconds)
    return found


def steps_by_way(live: TrainingStep, stores: dict[str, Reference], world: World) -> dict[str, TrainingStep]:
    """Return a step for each reference, all on the same engine. At a learning rate of 0 they do the same work."""
    common: dict[str, Any] = {"seed": 1, "num_sources": live._num_sources, "world": world}
    ways = {"plain": TrainingStep(live._engine, NoReference(), **common), "live": live}
    return ways | {name: TrainingStep(live._engine, store, **common) for name, store in stores.items()}


@torch.no_grad()
def compare(
    step: TrainingStep, loader: Any, stores: dict[str, Reference], config: Config, steps: int
) -> dict[str, dict[str, float]]:
    """Compare the masks from each store with those from the live reference, over all ranks, at the initial weights."""
    sums = {name: torch.zeros(5, dtype=torch.float64) for name in stores}
    for turn in range(steps):
        batches = loader.load(turn * config.training.global_batch_size)
        live = step._reference.signals(batches, ())
        taken = {name: store.signals(batches, ()) for name, store in stores.items()}
        for index, batch in enumerate(batches):
            student = step._exact.score(batch, (), keep=False)[0]["loss"]
            signals = {"student.loss": student, "reference.loss": live[index]["loss"]}
            pool: dict[str, Any] = {
                "valid": batch.valid_BT,
                "ratio": config.selection.ratio,
                "position": batch.token_position_BT,
            }
            exact = select_tokens(excess(signals), **pool)
            margin = (excess(signals) - exact.threshold).abs()
            for name, columns in taken.items():
                scores = student - columns[index]["loss"]
                mask = select_tokens(scores, **pool).mask
                differs = mask != exact.mask
                sums[name] += torch.tensor(
                    [
                        batch.valid_BT.sum(),
                        differs.sum(),
                        (differs & (margin > NEAR)).sum(),
                        (student * mask).sum() - (student * exact.mask).sum(),
                        exact.mask.sum(),
                    ],
                    dtype=torch.float64,
                )
    found = {}
    for name, values in sums.items():
        tokens, differ, far, loss, kept = all_reduce_sum(values).tolist()
        found[name] = {"tokens": tokens, "differ": differ, "beyond_1e-5": far, "selected_loss_off": loss / kept}
    return found


def table(found: dict[str, Any]) -> str:
    """Return the report as text."""
    plain = found["step_seconds"]["plain"]
    lines = [f"{found['ranks']} ranks on {found['device']}; a plain step takes {1e3 * plain:.0f} ms", ""]
    for name, seconds in found["step_seconds"].items():
        lines.append(f"step, {name:18}{seconds / plain:6.3f} of plain")
    for name, read in found["read_seconds"].items():
        shares = ", ".join(f"{way} {read[way] / plain:.2%}" for way in read)
        lines.append(f"reading, {name:18} {shares} of a plain step")
    for name, differs in found["selections"].items():
        lines.append(
            f"selection, {name:18} {differs['differ']:.0f} of {differs['tokens']:.0f} differ from live, "
            f"{differs['beyond_1e-5']:.0f} of them more than 1e-5 from the threshold; "
            f"loss of the selected {differs['selected_loss_off']:+.2e} nats"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
