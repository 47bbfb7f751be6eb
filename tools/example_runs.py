"""Runs to look at: plain, selective at three ratios, and five that are not healthy. docs/reading-a-run.md shows them.

Splits noisy general text by its sources. Trains a base model on all of them, a reference (the base, trained further on
curated mathematics), and then, from the same base, on the same samples in the same order:

    clm                    all tokens
    slm_30 slm_50 slm_70   30, 50 and 70 % of the tokens, by excess loss
    weak_reference         50 %, with a reference that was hardly trained
    low_ratio              5 %
    high_lr                50 %, at thirty times the learning rate
    corrupted_shard        50 %, with a source of compressed bytes that were read as text
    unselected_source      50 %, with a source that its student knows by heart: one notice, 900 times

    python tools/example_runs.py --data DIR --output runs/examples
    megatron-slm report runs/examples/clm runs/examples/slm_50 --output report.html

DIR holds `quickstart/`, `general/` and `eval/` (jsonl.gz); it can also be set by SLM_DATA. Finished stages are not run
again. On two cores this takes an hour.
"""

import gzip
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import exit_on_stop, option_parser, parse_with_data, prepare_stage
from quickstart import DEEPER

from megatron_slm.demo.chain import run_config
from megatron_slm.demo.stages import Stage, Stages, export_stage, training_stage

GROUPS = {
    "books": (
        "standardebooks",
        "openstax_us-history",
        "openstax_psychology-2e",
        "openstax_economics",
        "opensource_guide",
    ),
    "code_and_manuals": ("powershell_docs", "peps", "18f_blog", "thealgorithms_python", "tldr", "mdn_learning_area"),
    "mathematics": ("openstax_algebra-and-trigonometry-2e", "openstax_contemporary-mathematics", "openstax_statistics"),
    "german_law": ("gesetze_de",),
    "tables": ("fivethirtyeight_csv",),
}
"""The sources of the noisy text, as corpora of the blend."""
HELD_OUT = {
    "math": (("quickstart/eval_math.jsonl.gz",), 1_000),
    "general": (("general/general_valid.jsonl.gz",), 60),
    "problems": (("eval/gsm8k_test.jsonl.gz", "eval/svamp.jsonl.gz", "eval/aqua_rat_dev_test.jsonl.gz"), 400),
}
"""Evaluation sets: their files, and the documents to take of each."""
STEPS, RATIO, LR = 150, 0.5, 8.0e-4
INTERVAL = 25
"""Steps between evaluations, and between recordings of the observed tokens."""


def read(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a compressed jsonl file."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def write_texts(data: Path, folder: Path) -> None:
    """Write the text of each corpus as jsonl, unless it exists."""
    texts: dict[str, list[str]] = {}
    general = list(read(data / "quickstart/general_noisy.jsonl.gz"))
    for name, sources in GROUPS.items():
        texts[name] = [record["text"] for record in general if record["source"] in sources]
    texts["curated"] = [record["text"] for record in read(data / "quickstart/curated_math.jsonl.gz")]
    for name, (files, count) in HELD_OUT.items():
        texts[name] = [record["text"] for file in files for record in list(read(data / file))[:count]]
    texts["compressed"] = [gzip.compress(text.encode(), mtime=0).decode("latin-1") for text in texts["books"]]
    texts["notice"] = [texts["books"][0][:800]] * 900
    folder.mkdir(parents=True, exist_ok=True)
    for name, documents in texts.items():
        path = folder / f"{name}.jsonl"
        if not path.exists():
            path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")


def run_stage(name: str, folder: Path, ranks: int, steps: int, **settings: Any) -> Stage:
    """Return a stage that trains a run.

    `settings` replaces groups of the configuration, `train`, `lr`, `split`, and the number of tokens `observed`.
    """
    data = {
        "train": [str(folder / source) for source in settings.pop("train", GROUPS)],
        "valid": {held_out: str(folder / held_out) for held_out in HELD_OUT},
        "split": settings.pop("split", None),
    }
    model = {"path": str(folder / "hf-base")}
    observe = {"tokens": settings.pop("observed", 45_000), "interval": INTERVAL}
    config = run_config(folder / name, model, data, settings.pop("lr", LR), steps, eval_interval=INTERVAL, ranks=ranks)
    config["training"] |= {"log_interval": 1, "observe": observe}
    return training_stage(name, f"train {name}", config | settings, ranks, 25.0 + 1.2 * steps, folder)


def chain(folder: Path, ranks: int) -> list[Stage]:
    """Return all stages."""
    texts = folder / "texts"
    everything = [*GROUPS, "curated", "compressed", "notice", *HELD_OUT]
    prepared = [prepare_stage(name, texts / f"{name}.jsonl", folder, first="books") for name in everything]
    new = {"model": {"config": DEEPER}}
    base = run_stage("base", folder, ranks, 200, train=[*GROUPS, "notice"], split="25,75,0", lr=2.0e-3, **new)
    reference = run_stage("reference", folder, ranks, 250, train=["curated"], lr=1.0e-3)
    weak = run_stage("weak", folder, ranks, 12, train=["curated"], lr=1.0e-3, **new)
    exports = {name: export_stage(folder / name, folder / f"hf-{name}") for name in ("base", "reference", "weak")}

    def selective(name: str, ratio: float = RATIO, reference: str = "reference", **settings: Any) -> Stage:
        chosen = {"reference": {"path": str(folder / f"hf-{reference}")}, "selection": {"ratio": ratio}}
        return run_stage(name, folder, ranks, STEPS, objective="slm", **chosen, **settings)

    return [
        *prepared,
        base,
        exports["base"],
        reference,
        exports["reference"],
        weak,
        exports["weak"],
        run_stage("clm", folder, ranks, STEPS, observed=320_000),
        *(selective(f"slm_{ratio}", ratio / 100, observed=320_000) for ratio in (50, 30, 70)),
        selective("weak_reference", reference="weak"),
        selective("low_ratio", ratio=0.05),
        selective("high_lr", lr=30 * LR),
        selective("corrupted_shard", train=[*GROUPS, "compressed"]),
        run_stage("knowing", folder, ranks, 40, train=["notice"]),
        export_stage(folder / "knowing", folder / "hf-knowing"),
        selective("unselected_source", train=[*GROUPS, "notice"], model={"path": str(folder / "hf-knowing")}),
    ]


def main() -> None:
    parser = option_parser(__doc__)
    parser.add_argument("--data", default=os.environ.get("SLM_DATA"), help="folder of quickstart/, general/ and eval/")
    parser.add_argument("--output", default="runs/examples", type=Path, help="default: %(default)s")
    parser.add_argument("--ranks", default=2, type=int, help="processes per run; default: %(default)s")
    arguments = parse_with_data(parser, "quickstart/, general/ and eval/")
    write_texts(arguments.data, arguments.output / "texts")
    with exit_on_stop("example_runs") as stop:
        Stages(arguments.output / "stages", chain(arguments.output, arguments.ranks), arguments.ranks).run(stop)


if __name__ == "__main__":
    main()
