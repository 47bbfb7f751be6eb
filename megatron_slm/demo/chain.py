"""The demo's chain: its five training runs with their models, data and lengths, and the stages around them."""

import platform
from dataclasses import astuple, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from megatron_slm.demo.stages import Stage, export_stage, training_stage
from megatron_slm.demo.texts import GENERAL, HELD_OUT, Sizes

MODEL = {
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}
"""A Llama of 1.1M parameters at a vocabulary of 2,048."""

SEQ_LENGTH = 256
SAMPLES_PER_STEP = 16
TOKENS_PER_STEP = SAMPLES_PER_STEP * SEQ_LENGTH
RATIO = 0.5
"""The share of tokens that the selective run keeps."""
COMPARED = {"clm": "CLM", "slm": "SLM", "clm_curated": "CLM + curated text"}
"""The titles of the runs that start from the same base."""


@dataclass(frozen=True)
class Lengths:
    """Bytes of text, optimizer steps of base, reference and each compared run, and steps between evaluations."""

    sizes: Sizes = field(default_factory=Sizes)
    base: int = 160
    reference: int = 200
    compared: int = 120
    eval_interval: int = 15


FULL = Lengths()
QUICK = Lengths(
    Sizes(general=600_000, curated=200_000, held_out=6_000), base=4, reference=4, compared=6, eval_interval=3
)
"""Lengths that run every stage, but too briefly for a result."""


class Folders:
    """The files and folders of a demo, below one folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.corpora, self.runs, self.models = root / "corpora", root / "runs", root / "models"
        self.stages = root / "stages"
        self.summary, self.picture, self.page = root / "summary.md", root / "demo.png", root / "selected.html"
        self.comparison = root / "report.html"


def steps(name: str, lengths: Lengths) -> int:
    """Return the optimizer steps of a run."""
    return {"base": lengths.base, "reference": lengths.reference}.get(name, lengths.compared)


def configuration(name: str, folders: Folders, lengths: Lengths, ranks: int) -> dict[str, Any]:
    """Return the configuration of a run, as `megatron-slm train` reads it.

    The compared runs see the same samples in the same order, except for the curated text that is mixed into one of
    them, in proportion to its size.
    """
    config = run_config(
        folders.runs / name,
        model={"config": MODEL} if name == "base" else {"path": str(folders.models / "base")},
        data=_data(name, folders),
        lr={"base": 2.0e-3, "reference": 1.0e-3}.get(name, 8.0e-4),
        steps=steps(name, lengths),
        eval_interval=lengths.eval_interval if name in COMPARED else steps(name, lengths),
        ranks=ranks,
    )
    if name == "slm":
        selective = {"reference": {"path": str(folders.models / "reference")}, "selection": {"ratio": RATIO}}
        config |= {"objective": "slm"} | selective
    return config


def run_config(
    run_dir: Path, model: dict[str, Any], data: dict[str, Any], lr: float, steps: int, eval_interval: int, ranks: int
) -> dict[str, Any]:
    """Return the configuration of a CLM run under ZeRO-3 with `SAMPLES_PER_STEP` samples per step over all ranks."""
    return {
        "run_dir": str(run_dir),
        "objective": "clm",
        "model": model,
        "data": data | {"seq_length": SEQ_LENGTH},
        "training": {
            "micro_batch_size": SAMPLES_PER_STEP // ranks,
            "global_batch_size": SAMPLES_PER_STEP,
            "train_tokens": steps * TOKENS_PER_STEP,
            "warmup_tokens": min(10, steps) * TOKENS_PER_STEP,
            "lr": lr,
            "min_lr": lr / 10,
            "log_interval": 5,
            "eval_interval": eval_interval,
            "save_interval": 100,
            "keep_checkpoints": 1,
            "observe": {"interval": 10},
        },
        "deepspeed": {"zero_optimization": {"stage": 3}},
    }


def _data(name: str, folders: Folders) -> dict[str, Any]:
    names = {"reference": ("curated",), "clm_curated": (*GENERAL, "curated")}.get(name, GENERAL)
    data: dict[str, Any] = {
        "train": [str(folders.corpora / source) for source in names],
        "valid": {held_out: str(folders.corpora / held_out) for held_out in HELD_OUT},
    }
    if name == "base":
        data["split"] = "25,75,0"
    return data


_TITLES = {
    "base": "train the base",
    "reference": "train the reference",
    "clm": "train CLM",
    "slm": "train SLM",
    "clm_curated": "train CLM with curated text",
}


def demo_stages(folders: Folders, lengths: Lengths, ranks: int) -> list[Stage]:
    """Return all stages in order."""
    runs = {name: _training(name, folders, lengths, ranks) for name in _TITLES}
    exports = {name: export_stage(folders.runs / name, folders.models / name) for name in ("base", "reference")}
    return [
        _texts(folders, lengths),
        runs["base"],
        exports["base"],
        runs["reference"],
        exports["reference"],
        *(runs[name] for name in ("clm", "slm", "clm_curated")),
        _report(folders),
        _comparison(folders),
    ]


def _texts(folders: Folders, lengths: Lengths) -> Stage:
    sizes = astuple(lengths.sizes)
    # The texts depend on the installed packages, including this one.
    installed = sorted(f"{found.name} {found.version}" for found in metadata.distributions())
    return Stage(
        name="corpora",
        title="prepare the texts",
        command=("-m", "megatron_slm.demo.texts", str(folders.corpora), *map(str, sizes)),
        outputs=(folders.corpora,),
        recipe=[platform.python_version(), sizes, installed],
        seconds=25.0,
    )


def _training(name: str, folders: Folders, lengths: Lengths, ranks: int) -> Stage:
    config = configuration(name, folders, lengths, ranks)
    seconds = 14.0 + steps(name, lengths) * (0.6 if name == "slm" else 0.45)
    return training_stage(name, _TITLES[name], config, ranks, seconds, folders.root)


def _report(folders: Folders) -> Stage:
    outputs = (folders.summary, folders.picture, folders.page)
    command = ("-m", "megatron_slm.demo.report", str(folders.root))
    return Stage("report", "draw the curves and the tokens", command, outputs, "", 12.0)


def _comparison(folders: Folders) -> Stage:
    runs = (str(folders.runs / name) for name in COMPARED)
    command = ("-m", "megatron_slm", "report", *runs, "--output", str(folders.comparison))
    return Stage("comparison", "report on the runs", command, (folders.comparison,), "", 10.0)
