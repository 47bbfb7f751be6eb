"""The outline of a run for `plan`: what resolving finds, or, while inputs do not exist yet, what their settings say."""

import dataclasses
import tempfile
from dataclasses import dataclass
from pathlib import Path

from transformers import PretrainedConfig

from megatron_slm.build.corpora import Corpora, open_run_corpora
from megatron_slm.build.models import check_student_settings
from megatron_slm.build.objective import make_rule
from megatron_slm.build.plan import settle
from megatron_slm.build.references import CheckedReference
from megatron_slm.build.resolve import resolve
from megatron_slm.config import Config
from megatron_slm.data.tokenizer import vocabulary_size
from megatron_slm.dist import World
from megatron_slm.errors import Mistakes, UserError
from megatron_slm.models.checks import check_length
from megatron_slm.models.configuration import model_config
from megatron_slm.models.pretrained import pretrained_config
from megatron_slm.reference.settings import PartSettings
from megatron_slm.run_directory import RunDirectory
from megatron_slm.selection.rule import Rule
from megatron_slm.training.state import Plan

Shapes = dict[str, PretrainedConfig | None]
ANY_VOCABULARY = 1
"""Size of the tokenizer if the corpora do not exist: no vocabulary of a model is too small for it."""


@dataclass(frozen=True)
class Outline:
    """A run as far as it is known.

    Attributes:
        config: with every default resolved.
        plan: length of the run in steps.
        rule: the selection rule; None under CLM.
        student: Hugging Face configuration of the student.
        references: each with its model's configuration or its store; neither for a store that does not exist yet.
        min_context: as `Resolved.min_context`.
        corpora: None if one of them does not exist yet.
        assumptions: a sentence for each input that does not exist yet.
    """

    config: Config
    plan: Plan
    rule: Rule | None
    student: PretrainedConfig
    references: list[CheckedReference]
    min_context: int
    corpora: Corpora | None
    assumptions: list[str]


def outline(config: Config, world: World) -> Outline:
    """Return the outline of a run; if all of its inputs exist, they are checked as `train` checks them.

    Args:
        config: of the run. Its run directory is not looked at: a plan is for a run from the beginning.
        world: rank 0 of the ranks to plan for, and the device to plan for.

    Raises:
        UserError: all errors that were found, as one.
    """
    shapes = _shapes(config)
    absent = _absent_inputs(config, shapes)
    if absent:
        return _outline_without(config, world, absent, shapes)
    with tempfile.TemporaryDirectory(prefix="megatron-slm-plan-") as folder:
        fresh = dataclasses.replace(config, run_dir=str(Path(folder) / "run"))
        found = resolve(fresh, RunDirectory(fresh.run_dir, world), world)
    return Outline(
        dataclasses.replace(found.config, run_dir=config.run_dir),
        found.plan,
        found.rule,
        found.student,
        found.references,
        found.min_context,
        found.corpora,
        [],
    )


def _shapes(config: Config) -> Shapes:
    """Return the configuration of each model that `config` names by a path, None for those that cannot be read."""
    trusted = {str(part.path): part.trust_remote_code for part in config.references if part.store is None}
    if config.model.path is not None:
        trusted[config.model.path] = config.model.trust_remote_code
    shapes: Shapes = {}
    for path, trust_remote_code in trusted.items():
        try:
            shapes[path] = pretrained_config(path, "model", trust_remote_code)
        except UserError:
            shapes[path] = None
    return shapes


def _absent_inputs(config: Config, shapes: Shapes) -> list[str]:
    """Return a sentence for each corpus, model and store that does not exist yet."""
    absent = [
        f"{setting} {prefix} does not exist yet." for setting, prefix in config.data.corpora() if not _is_there(prefix)
    ]
    models = [("model.path", config.model.path)] if config.model.path is not None else []
    for part in config.references:
        if part.store is None:
            models.append(("reference.path", str(part.path)))
        elif not Path(part.store).exists():
            absent.append(f"reference.store {part.store} does not exist yet.")
    for setting, path in models:
        if shapes[path] is None:
            absent.append(f"{setting} {path} cannot be read.")
        elif Path(path).is_dir() and not list(Path(path).glob("*.safetensors")):
            absent.append(f"{setting} {path} holds no weights; its shape is enough.")
    return absent


def _is_there(prefix: str) -> bool:
    """Return whether a corpus exists, whole or not."""
    return Path(f"{prefix}.json").exists()


def _outline_without(config: Config, world: World, absent: list[str], shapes: Shapes) -> Outline:
    """Return the outline of a run some of whose inputs do not exist yet, as the sentences `absent` say."""
    mistakes = Mistakes()
    rule = corpora = student = settled = None
    with mistakes.collect():
        rule = make_rule(config, world)
    if all(_is_there(prefix) for _, prefix in config.data.corpora()):
        with mistakes.collect():
            corpora = open_run_corpora(config.data)
    assumptions = list(absent)
    with mistakes.collect():
        student = _student(config, corpora, shapes, assumptions)
        check_student_settings(config, student)
    references: list[CheckedReference] = []
    for part in config.references:
        with mistakes.collect():
            references.append(_reference(config, part, student, shapes, assumptions))
    with mistakes.collect():
        settled = settle(config, corpora, world.device.type, reads_document_store=False)
    mistakes.raise_any()
    assert student is not None and settled is not None
    return Outline(*settled, rule, student, references, 0, corpora, assumptions)


def _student(config: Config, corpora: Corpora | None, shapes: Shapes, assumptions: list[str]) -> PretrainedConfig:
    """Return the student's configuration, from `model.path` if that can be read, and from `model.config` otherwise."""
    settings = config.model
    size = ANY_VOCABULARY if corpora is None else vocabulary_size(corpora.tokenizer)
    if settings.path is not None and shapes[settings.path] is None:
        if "model_type" not in settings.config:
            remedy = "Put its config.json into this folder, or set model.config with model_type and the sizes"
            raise UserError("model.path", settings.path, "no configuration can be read there", remedy)
        assumptions.append("The student has the sizes of model.config.")
        settings = dataclasses.replace(settings, path=None)
    if settings.path is None and corpora is None and "vocab_size" not in settings.config:
        reason = "the corpora, whose tokenizer would give it, do not exist yet"
        raise UserError("model.config.vocab_size", None, reason, "Set it, for example to 32000")
    return model_config(settings, size, {})


def _reference(
    config: Config, part: PartSettings, student: PretrainedConfig | None, shapes: Shapes, assumptions: list[str]
) -> CheckedReference:
    """Return a reference with the configuration of its model, or the student's if that cannot be read."""
    if part.store is not None:
        return CheckedReference(part)
    path = str(part.path)
    model = shapes[path]
    if model is None:
        assumptions.append(f"The reference {path} has the student's shape.")
        model = student
    if model is not None:
        check_length(model, "reference", config.data.seq_length)
    return CheckedReference(part, model=model)
