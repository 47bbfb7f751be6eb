"""Loss against cost of CLM, and of the ways to spend less compute on unselected tokens.

Trains a base on a part of noisy general text, and a reference (the base, trained further on curated mathematics).
Scores another part with both, and keeps the better half of its documents. Then trains, from the same base, on that
part, for equal tokens and over several seeds: CLM; SLM with the backward exact, rows and replay; rows on the kept
documents; and rows on the better half of the sequences that are read. Also compares the gradients. Writes tables and a
picture.

    python tools/efficiency.py --data DIR --output runs/efficiency

DIR holds `quickstart/` (jsonl.gz); it can also be set by SLM_DATA. Two runs train at a time, with one process and one
thread each, so that all runs have the same load. Finished stages are not run again.
"""

import gzip
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from common import exit_on_stop, option_parser, parse_with_data, prepare_stage
from efficiency_report import ARMS, HELD_OUT, write_report

from megatron_slm.demo.chain import SEQ_LENGTH, run_config
from megatron_slm.demo.processes import StopRequest
from megatron_slm.demo.stages import Stage, Stages, export_stage, training_stage

MODEL = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 640,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": SEQ_LENGTH,
    "tie_word_embeddings": False,
}
"""A Llama of 5.6M parameters at a vocabulary of 2,048; embedding and head are not tied, to compare their gradients."""

SAMPLES = 8
"""The samples per step of the compared runs."""
RATIO, KEEP = 0.5, 0.5
"""The shares of tokens that are selected and of documents that are kept."""
AT_ONCE = 2
TOOLS = Path(__file__).parent


@dataclass(frozen=True)
class Text:
    """The documents `first`, `first + every`, ... of a file, each cut to its first `longest` characters."""

    file: str
    first: int
    every: int
    longest: int | None = None

    def read(self, data: Path, thin: int) -> str:
        """Return every `thin`-th of these documents, as JSON lines."""
        with gzip.open(data / "quickstart" / self.file, "rt", encoding="utf-8") as lines:
            texts = [json.loads(line)["text"] for line in lines][self.first :: self.every * thin]
        return "".join(json.dumps({"text": text[: self.longest]}) + "\n" for text in texts)


TEXTS = {
    "general": Text("general_noisy.jsonl.gz", 1, 4),
    "earlier": Text("general_noisy.jsonl.gz", 0, 4),
    "curated": Text("curated_math.jsonl.gz", 0, 1),
    "math": Text("eval_math.jsonl.gz", 0, 6),
    "held_out": Text("general_noisy.jsonl.gz", 3, 64, 1000),
}
"""The texts of the compared runs, of the base, of the reference, and the two held-out sets."""


@dataclass(frozen=True)
class Lengths:
    """The lengths of the runs.

    base, reference, compared  optimizer steps; `compared` is for each compared run
    eval_interval              steps between evaluations of the compared runs
    batches                    micro-batches whose gradients are compared
    thin                       use every `thin`-th document of each text
    """

    base: int = 160
    reference: int = 120
    compared: int = 150
    eval_interval: int = 25
    batches: int = 8
    thin: int = 1


QUICK = Lengths(base=4, reference=4, compared=20, eval_interval=10, batches=2, thin=12)
"""Lengths that run every stage, but too briefly for a result."""


class Chain:
    """All stages of the comparison: `data` is the folder of the texts, and `folder` holds all outputs."""

    def __init__(self, data: Path, folder: Path, lengths: Lengths, seeds: list[int]) -> None:
        self._data = data
        self._folder = folder
        self._lengths = lengths
        self._seeds = seeds

    def start(self) -> list[Stage]:
        """Return the stages that make the corpora and the base."""
        base = self._run("base", "earlier", self._lengths.base, 2.0e-3, {"config": MODEL})
        return [*map(self._prepare, TEXTS), base, self._export("base")]

    def reference(self) -> list[Stage]:
        """Return the stages that train the reference and score the corpus with it."""
        run = self._run("reference", "curated", self._lengths.reference, 1.0e-3, self._model("base"))
        return [run, self._export("reference"), self.score("reference")]

    def score(self, name: str) -> Stage:
        """Return the stage that scores the corpus of the compared runs with the model `name`."""
        output = self._folder / f"score-{name}"
        config = {
            "reference": self._model(name) | {"micro_batch_size": 32},
            "score": {"output": str(output), "kind": "document"},
        }
        return self._command("score", f"score-{name}", config, output, 200.0)

    def filter(self) -> Stage:
        """Return the stage that selects documents; it needs both scores."""
        output = self._folder / "kept.safetensors"
        stores = {name: str(self._folder / f"score-{name}") for name in ("base", "reference")}
        return self._command(
            "filter", "filter", {"filter": stores | {"keep": KEEP, "output": str(output)}}, output, 5.0
        )

    def compared(self, lane: int) -> list[Stage]:
        """Return the runs of one lane: half of the arms, for each seed."""
        half = len(ARMS) // AT_ONCE
        return [self._arm(arm, seed) for seed in self._seeds for arm in list(ARMS)[lane * half : (lane + 1) * half]]

    def gradients(self) -> list[Stage]:
        """Return the stages that compare gradients: at initialization, at the base, and in the middle of a run."""
        run, half = f"exact-{self._seeds[0]}", self._lengths.compared // 2
        middle = export_stage(self._folder / run, self._folder / "hf-middle")
        middle = replace(middle, command=(*middle.command, "--checkpoint", str(half)), recipe=half)
        output = self._folder / "gradients.json"
        models = [f"{name}={self._folder / f'hf-{name}'}" for name in ("base", "middle")]
        command = (str(TOOLS / "gradient_truth.py"), str(self._folder / run), "--models", *models)
        command += ("--batches", str(self._lengths.batches), "--output", str(output))
        return [middle, Stage("gradients", "compare gradients", command, (output,), self._lengths.batches, 400.0)]

    def _prepare(self, name: str) -> Stage:
        thin, file = self._lengths.thin, self._folder / "texts" / f"{name}.jsonl"
        stage, text = prepare_stage(name, file, self._folder), TEXTS[name].read(self._data, thin)
        return replace(stage, files={file: text}, recipe=[str(TEXTS[name]), thin])

    def _export(self, name: str) -> Stage:
        return export_stage(self._folder / name, self._folder / f"hf-{name}")

    def _model(self, name: str) -> dict[str, Any]:
        return {"path": str(self._folder / f"hf-{name}")}

    def _run(self, name: str, corpus: str, steps: int, lr: float, model: dict[str, Any], **changes: Any) -> Stage:
        """Return a stage that trains a run; `changes` replaces groups, and updates `training` and `data`."""
        data = {
            "train": str(self._folder / corpus),
            "valid": {held_out: str(self._folder / held_out) for held_out in HELD_OUT},
        }
        config = run_config(self._folder / name, model, data, lr, steps, eval_interval=steps, ranks=1)
        config["training"] |= {"backend": "plain"} | changes.pop("training", {})
        config["data"] |= changes.pop("data", {})
        del config["deepspeed"]
        return training_stage(name, f"train {name}", config | changes, 1, 10.0 + 1.5 * steps, self._folder)

    def _arm(self, arm: str, seed: int) -> Stage:
        steps = self._lengths.compared
        training = {
            "micro_batch_size": SAMPLES,
            "global_batch_size": SAMPLES,
            "train_tokens": steps * SAMPLES * SEQ_LENGTH,
            "eval_interval": self._lengths.eval_interval,
            "save_interval": steps // 2,
            "keep_checkpoints": 2,
        }
        selective: dict[str, Any] = {"objective": "slm", "reference": {"store": str(self._folder / "score-reference")}}
        selective["selection"] = {
            "ratio": RATIO,
            "backward": ARMS[arm].backward,
            "candidates": ARMS[arm].candidates,
            # The figures of docs/benchmarks.md were measured with 0; these models are too small for it to matter.
            "min_context": 0,
        }
        if ARMS[arm].documents:
            selective["data"] = {"keep": str(self._folder / "kept.safetensors")}
        changes = {"seed": seed, "training": training} | ({} if arm == "clm" else selective)
        return self._run(f"{arm}-{seed}", "general", steps, 8.0e-4, self._model("base"), **changes)

    def _command(self, verb: str, name: str, config: dict[str, Any], output: Path, seconds: float) -> Stage:
        data = {"data": {"train": str(self._folder / "general"), "seq_length": SEQ_LENGTH}}
        file, text = self._folder / f"{name}.yaml", yaml.safe_dump(data | config)
        command = ("-m", "megatron_slm", verb, str(file), "training.backend=plain")
        recipe = text.replace(str(self._folder), "")
        return Stage(name, name.replace("-", " "), command, (output,), recipe, seconds, {file: text})


def run_all(chain: Chain, markers: Path, stop: StopRequest) -> None:
    """Run the common stages, then the compared runs in lanes; the gradients follow the lane of the first exact run."""
    start = chain.start()
    run_beside(markers, [start], stop)
    run_beside(markers, [[*start, *chain.reference()], [*start, chain.score("base")]], stop)
    before = [*start, *chain.reference(), chain.filter()]
    run_beside(markers, [before], stop)
    lanes = [[*before, *chain.compared(lane)] for lane in range(AT_ONCE)]
    lanes[0] += chain.gradients()
    run_beside(markers, lanes, stop)


def run_beside(markers: Path, lanes: list[list[Stage]], stop: StopRequest) -> None:
    """Run chains of stages at the same time. A stage that a chain needs from another one must be finished before."""
    with ThreadPoolExecutor(len(lanes)) as threads:
        for lane in [threads.submit(Stages(markers, stages, ranks=AT_ONCE).run, stop) for stages in lanes]:
            lane.result()


def main() -> None:
    parser = option_parser(__doc__)
    parser.add_argument("--data", default=os.environ.get("SLM_DATA"), help="folder of quickstart/")
    parser.add_argument("--output", default="runs/efficiency", type=Path, help="default: %(default)s")
    parser.add_argument("--seeds", default=[1, 2, 3], type=int, nargs="+", help="default: 1 2 3")
    parser.add_argument("--quick", action="store_true", help="run every stage, but too briefly for a result")
    arguments = parse_with_data(parser, "quickstart/")
    lengths = QUICK if arguments.quick else Lengths()
    chain = Chain(arguments.data, arguments.output, lengths, arguments.seeds)
    with exit_on_stop("efficiency") as stop:
        run_all(chain, arguments.output / "stages", stop)
    sys.stdout.write(write_report(arguments.output, arguments.seeds))


if __name__ == "__main__":
    main()
