"""The method on a folder of real text, with a random selection as a control.

Trains a tokenizer, a base model on noisy general text, and a reference (the base, trained further on curated
mathematics). Then trains, from the same base, on the same data in the same order and for equal tokens: CLM, SLM, and a
run with as many random tokens. Prints the held-out losses of all runs. `megatron-slm demo` does the same with text that
every machine has.

    python tools/quickstart.py --data DIR --output runs/quickstart

DIR holds `quickstart/` and `general/` (jsonl.gz); it can also be set by SLM_DATA. Finished stages are not run again.
"""

import os
import sys
from pathlib import Path
from typing import Any

from common import exit_on_stop, option_parser, parse_with_data, prepare_stage

from megatron_slm.demo.chain import MODEL, run_config
from megatron_slm.demo.report import draw_held_out, overtaking, results_table
from megatron_slm.demo.stages import Stage, Stages, export_stage, training_stage

FILES = {
    "general": "quickstart/general_noisy.jsonl.gz",
    "curated": "quickstart/curated_math.jsonl.gz",
    "math": "quickstart/eval_math.jsonl.gz",
    "held_out": "general/general_valid.jsonl.gz",
}
TITLES = {"math": "Held-out mathematics", "held_out": "Held-out general text"}
COMPARED = {"clm": "CLM, all tokens", "slm": "SLM, excess loss", "random": "random choice"}
DEEPER = MODEL | {"num_hidden_layers": 6}
"""A Llama of 1.5M parameters at a vocabulary of 2,048."""


def run_stage(name: str, corpus: str, steps: int, lr: float, folder: Path, ranks: int, **settings: Any) -> Stage:
    """Return a stage that trains a run; `settings` replaces groups of the configuration, and `split`."""
    data = {
        "train": str(folder / corpus),
        "valid": {held_out: str(folder / held_out) for held_out in TITLES},
        "split": settings.pop("split", None),
    }
    base = {"path": str(folder / "hf-base")}
    config = run_config(folder / name, base, data, lr, steps, eval_interval=25, ranks=ranks) | settings
    return training_stage(name, f"train {name}", config, ranks, 15.0 + 0.6 * steps, folder)


def chain(folder: Path, data: Path, ratio: float, ranks: int) -> list[Stage]:
    """Return all stages, up to the three runs that are compared."""
    prepared = [prepare_stage(name, data / file, folder) for name, file in FILES.items()]
    base = run_stage("base", "general", 200, 2.0e-3, folder, ranks, model={"config": DEEPER}, split="25,75,0")
    reference = run_stage("reference", "curated", 250, 1.0e-3, folder, ranks)
    exports = {name: export_stage(folder / name, folder / f"hf-{name}") for name in ("base", "reference")}
    clm = run_stage("clm", "general", 150, 8.0e-4, folder, ranks)
    selective = {"objective": "slm", "reference": {"path": str(folder / "hf-reference")}}
    choices = [
        run_stage(name, "general", 150, 8.0e-4, folder, ranks, **selective, selection={"score": score, "ratio": ratio})
        for name, score in (("slm", "excess"), ("random", "random"))
    ]
    return [*prepared, base, exports["base"], reference, exports["reference"], clm, *choices]


def main() -> None:
    parser = option_parser(__doc__)
    parser.add_argument("--data", default=os.environ.get("SLM_DATA"), help="folder of quickstart/ and general/")
    parser.add_argument("--output", default="runs/quickstart", type=Path, help="default: %(default)s")
    parser.add_argument("--ranks", default=2, type=int, help="processes per run; default: %(default)s")
    parser.add_argument("--ratio", default=0.5, type=float, help="share of tokens to keep; default: %(default)s")
    arguments = parse_with_data(parser, "quickstart/ and general/")
    folder = arguments.output
    stages = chain(folder, arguments.data, arguments.ratio, arguments.ranks)
    with exit_on_stop("quickstart") as stop:
        Stages(folder / "stages", stages, arguments.ranks).run(stop)
    names = {"base": "base", "reference": "reference", **COMPARED}
    draw_held_out(folder, COMPARED, TITLES, folder / "quickstart.png")
    sys.stdout.write(f"\n{results_table(folder, names, TITLES)}\n\n{overtaking(folder, 'math')}\n")
    sys.stdout.write(f"Curves: {folder / 'quickstart.png'}\n")


if __name__ == "__main__":
    main()
