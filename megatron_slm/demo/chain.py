"""The demo as a chain of stages: texts, base, reference, the three runs that are compared, report."""

import platform
from dataclasses import astuple, replace
from importlib import metadata

from megatron_slm.demo.runs import Folders, Lengths, configuration
from megatron_slm.demo.stages import Stage, export_stage, training_stage

_TITLES = {
    "base": "train the base",
    "reference": "train the reference",
    "clm": "train CLM",
    "slm": "train SLM",
    "clm_curated": "train CLM with curated text",
}
_STEP_SECONDS = {"slm": 0.6}
_START_SECONDS = 14.0


def demo_stages(folders: Folders, lengths: Lengths, ranks: int) -> list[Stage]:
    """All stages in order."""
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
    ]


def _texts(folders: Folders, lengths: Lengths) -> Stage:
    sizes = astuple(lengths.sizes)
    # The texts are a function of what is installed, this package too.
    installed = sorted(f"{found.name} {found.version}" for found in metadata.distributions())
    return Stage(
        name="corpora",
        title="prepare the texts",
        command=("-m", "megatron_slm.demo.corpora", str(folders.corpora), *map(str, sizes)),
        outputs=(folders.corpora,),
        recipe=[platform.python_version(), sizes, installed],
        seconds=25.0,
    )


def _training(name: str, folders: Folders, lengths: Lengths, ranks: int) -> Stage:
    config = configuration(name, folders, lengths, ranks)
    stage = training_stage(name, _TITLES[name], config, ranks, 0.0, folders.root)
    return replace(stage, seconds=_START_SECONDS + stage.steps * _STEP_SECONDS.get(name, 0.45))


def _report(folders: Folders) -> Stage:
    outputs = (folders.summary, folders.picture, folders.page)
    command = ("-m", "megatron_slm.demo.report", str(folders.root))
    return Stage("report", "draw the curves and the tokens", command, outputs, "", 12.0)
