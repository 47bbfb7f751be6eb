"""The first phase of a run: everything that a user can get wrong is opened and checked; nothing is loaded.

The result is one value, `Resolved`. `train` builds the run from it (run.py), and a dry run reports it (report.py).
The phase runs no collective: the caller makes all ranks agree on its errors once (`agree`).
"""

from dataclasses import dataclass

from transformers import PretrainedConfig

from megatron_slm.backend import refuse_other_ranks
from megatron_slm.build.corpora import Corpora, open_observed, open_run_corpora
from megatron_slm.build.models import checked_student, refuse_unregistered_attention
from megatron_slm.build.objective import make_rule
from megatron_slm.build.plan import schedule_warning, settle
from megatron_slm.build.references import (
    CheckedReference,
    check_reference,
    planned_order,
    reads_document_store,
    self_reference_warning,
    with_signals,
)
from megatron_slm.config import Config
from megatron_slm.data.corpus import Corpus
from megatron_slm.data.samples import check_order
from megatron_slm.dist import World
from megatron_slm.errors import Mistakes
from megatron_slm.models.pretrained import refuse_pickles
from megatron_slm.run_directory import RunDirectory
from megatron_slm.selection.rule import Rule
from megatron_slm.training.checkpoints import list_checkpoints, refuse_missing_checkpoint, saved_ranks, step_of
from megatron_slm.training.loggers import refuse_missing_loggers
from megatron_slm.training.state import Plan
from megatron_slm.training.trainer import Callback, make_callback


@dataclass(frozen=True)
class Resolved:
    """A run that is checked, before any weights are loaded or samples indexed.

    Attributes:
        config: with every default resolved.
        plan: length of the run in steps.
        corpora: opened.
        rule: the selection rule; None under CLM.
        student: Hugging Face configuration of the student.
        references: checked; none under CLM.
        observed: corpora of `training.observe` by name; none if it is not set.
        callbacks: those named in the configuration.
        warnings: sentences for the user.
    """

    config: Config
    plan: Plan
    corpora: Corpora
    rule: Rule | None
    student: PretrainedConfig
    references: list[CheckedReference]
    observed: dict[str, Corpus]
    callbacks: list[Callback]
    warnings: list[str]

    @property
    def min_context(self) -> int:
        """`selection.min_context` where it has an effect: with a store of kind `document`; 0 otherwise."""
        return (self.config.selection.min_context or 0) if reads_document_store(self.references) else 0

    @property
    def store_fingerprints(self) -> list[str]:
        """The fingerprints of all stores that the run reads."""
        return [one.store.fingerprint() for one in self.references if one.store is not None]


def resolve(config: Config, directory: RunDirectory, world: World, rollback: int | None = None) -> Resolved:
    """Open and check everything that a user can get wrong.

    Args:
        config: of the run, as given.
        directory: its run directory, which is only read.
        world: this rank; in a dry run, rank 0 of the ranks to check for.
        rollback: step of the checkpoint to resume from; None for the newest.

    Raises:
        UserError: all errors that were found, as one.
    """
    mistakes = Mistakes()
    with mistakes.collect():
        config = directory.compare(config)
    with mistakes.collect():
        _check_checkpoint(config, directory, world, rollback)
    with mistakes.collect():
        refuse_pickles("model", config.model.path)
    with mistakes.collect():
        refuse_unregistered_attention(config)
    callbacks = _make_callbacks(config, world, mistakes)
    rule = corpora = student = settled = None
    with mistakes.collect():
        rule = make_rule(config, world)
    with mistakes.collect():
        corpora = open_run_corpora(config.data)
    if corpora is None:  # all further checks read the corpora
        mistakes.raise_any()
    assert corpora is not None
    with mistakes.collect():
        student = checked_student(config, corpora)
    observed: dict[str, Corpus] = {}
    with mistakes.collect():
        observed = open_observed(config.training.observe, corpora)
    references: list[CheckedReference] = []
    for part in config.references:
        with mistakes.collect():
            references.append(check_reference(part, corpora, config.data.seq_length))
    with mistakes.collect():
        settled = settle(config, corpora, world.device.type, reads_document_store=reads_document_store(references))
        check_order(settled[0].data, corpora.train, settled[1].total_samples)
    mistakes.raise_any()
    assert student is not None and settled is not None
    config, plan = settled
    order = planned_order(config, plan, corpora)
    opened: list[CheckedReference] = []
    for reference in references:
        with mistakes.collect():
            opened.append(with_signals(config, reference, corpora, order, rule, world))
    warnings = [
        self_reference_warning(references, config),
        schedule_warning(config, plan, corpora, directory, world.device.type, rollback),
    ]
    shown = [warning for warning in warnings if warning is not None]
    resolved = Resolved(config, plan, corpora, rule, student, opened, observed, callbacks, shown)
    with mistakes.collect():
        directory.refuse_other_inputs(order.fingerprint, resolved.store_fingerprints)
    mistakes.raise_any()
    return resolved


def _make_callbacks(config: Config, world: World, mistakes: Mistakes) -> list[Callback]:
    """Return the callbacks that the configuration names; those of loggers are built later, and only checked here."""
    with mistakes.collect():
        # Only rank 0 sends records, so the other hosts need no trackers.
        refuse_missing_loggers(config.training.loggers if world.is_main else [])
    callbacks: list[Callback] = []
    for entry in config.callbacks:
        with mistakes.collect():
            callbacks.append(make_callback(entry))
    return callbacks


def _check_checkpoint(config: Config, directory: RunDirectory, world: World, rollback: int | None) -> None:
    """Check that the checkpoint to resume from exists, and that this number of ranks can load it."""
    if rollback is not None:
        refuse_missing_checkpoint(directory.checkpoints, rollback)
    saved = [path for path in list_checkpoints(directory.checkpoints) if rollback is None or step_of(path) == rollback]
    if saved and config.training.backend == "deepspeed":
        stage = config.deepspeed.get("zero_optimization", {}).get("stage", 3)
        refuse_other_ranks(saved[-1], stage, saved_ranks(saved[-1]) or world.size, world.size)
