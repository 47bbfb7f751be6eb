"""The first phase of a run: everything that a user can get wrong is opened and checked; nothing is loaded.

The result is one value, `Resolved`. `train` builds the run from it (run.py), and a dry run reports it (report.py).
The phase runs no collective: the caller makes all ranks agree on its errors once (`agree`).
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar

from transformers import PretrainedConfig

from megatron_slm.backend import refuse_other_ranks
from megatron_slm.build.corpora import Corpora, open_run_corpora
from megatron_slm.build.models import student_config
from megatron_slm.build.objective import make_rule
from megatron_slm.build.plan import schedule_warning, settle
from megatron_slm.build.references import (
    CheckedReference,
    Order,
    check_reference,
    reads_document_store,
    refuse_other_model,
    refuse_pickles,
    self_reference_warning,
    stored_reference,
)
from megatron_slm.config import Config
from megatron_slm.data.loader import position_after
from megatron_slm.data.samples import check_order, order_fingerprint
from megatron_slm.dist import World
from megatron_slm.errors import UserError
from megatron_slm.models.pretrained import refuse_untied_files
from megatron_slm.models.sparse_backward.attention import require_registered
from megatron_slm.run_directory import RunDirectory
from megatron_slm.selection.rule import Rule
from megatron_slm.training.checkpoints import (
    list_checkpoints,
    refuse_missing_checkpoint,
    saved_ranks,
    saved_steps,
    step_of,
)
from megatron_slm.training.state import Plan
from megatron_slm.training.trainer import Callback, make_callback

T = TypeVar("T")


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
        callbacks: those named in the configuration.
        warnings: sentences for the user.
    """

    config: Config
    plan: Plan
    corpora: Corpora
    rule: Rule | None
    student: PretrainedConfig
    references: list[CheckedReference]
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


@dataclass
class Mistakes:
    """The user errors of a phase, collected so that all of them are reported at once."""

    errors: list[UserError] = field(default_factory=list)

    def check(self, look: Callable[[], T]) -> T | None:
        """Return the result of `look`; None if it raises a user error, which is kept."""
        try:
            return look()
        except UserError as error:
            if error.args not in [other.args for other in self.errors]:
                self.errors.append(error)
            return None

    def raise_any(self) -> None:
        """Raise the errors that were kept, if any, as one UserError."""
        if self.errors:
            first, *others = self.errors
            raise UserError(*first.args, *others)


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
    config = mistakes.check(lambda: directory.compare(config)) or config
    _check_checkpoint(config, directory, world, rollback, mistakes)
    mistakes.check(lambda: refuse_pickles("model", config.model.path))
    mistakes.check(lambda: _refuse_unregistered_attention(config))
    callbacks = [mistakes.check(partial(make_callback, name)) for name in config.callbacks]
    rule = mistakes.check(lambda: make_rule(config, world))
    corpora = mistakes.check(lambda: open_run_corpora(config.data))
    if corpora is None:
        mistakes.raise_any()
    assert corpora is not None
    student = mistakes.check(lambda: _checked_student(config, corpora))
    parts = config.reference.parts if config.reference is not None and config.objective == "slm" else []
    length = config.data.seq_length
    checked = [mistakes.check(partial(check_reference, part, corpora, length)) for part in parts]
    references = [reference for reference in checked if reference is not None]
    document_store = reads_document_store(references)
    settled = mistakes.check(lambda: settle(config, corpora, world.device.type, reads_document_store=document_store))
    if settled is not None:
        mistakes.check(lambda: check_order(settled[0].data, corpora.train, _total_samples(settled[1])))
    mistakes.raise_any()
    assert settled is not None and student is not None
    config, plan = settled
    order = _order(config, plan, corpora)
    opened = [mistakes.check(partial(_with_signals, config, one, corpora, order, rule, world)) for one in references]
    warnings = [
        self_reference_warning(references, config),
        _moved_schedules(config, plan, corpora, directory, world.device.type, rollback),
    ]
    resolved = Resolved(
        config=config,
        plan=plan,
        corpora=corpora,
        rule=rule,
        student=student,
        references=[one for one in opened if one is not None],
        callbacks=[callback for callback in callbacks if callback is not None],
        warnings=[warning for warning in warnings if warning is not None],
    )
    mistakes.check(lambda: directory.refuse_other_inputs(order.fingerprint, resolved.store_fingerprints))
    mistakes.raise_any()
    return resolved


def _check_checkpoint(
    config: Config, directory: RunDirectory, world: World, rollback: int | None, mistakes: Mistakes
) -> None:
    """Check that the checkpoint to resume from exists, and that this number of ranks can load it."""
    if rollback is not None:
        mistakes.check(lambda: refuse_missing_checkpoint(directory.checkpoints, rollback))
    saved = [path for path in list_checkpoints(directory.checkpoints) if rollback is None or step_of(path) == rollback]
    if saved and config.training.backend == "deepspeed":
        stage = config.deepspeed.get("zero_optimization", {}).get("stage", 3)
        ranks = saved_ranks(saved[-1]) or world.size
        mistakes.check(lambda: refuse_other_ranks(saved[-1], stage, ranks, world.size))


def _refuse_unregistered_attention(config: Config) -> None:
    """Raise an error for an attention kernel that the sparse backward does not support.

    If no kernel is named, Hugging Face chooses one when the model is loaded, and it is checked then.
    """
    kernel = config.model.attn_implementation
    if config.objective == "slm" and config.selection.backward != "exact" and kernel is not None:
        require_registered(kernel, "the student")


def _checked_student(config: Config, corpora: Corpora) -> PretrainedConfig:
    student = student_config(config, corpora)
    if config.model.path is not None:
        refuse_untied_files(student, config.model.path, config.model.trust_remote_code)
    return student


def _total_samples(plan: Plan) -> int:
    return plan.total_steps * plan.samples_per_step


def _order(config: Config, plan: Plan, corpora: Corpora) -> Order:
    data = config.data
    fingerprint = order_fingerprint(data, corpora.train, config.seed, data.order_tokens or 0, corpora.kept)
    return Order(fingerprint, position_after(data.skip_samples, 0, _total_samples(plan)))


def _with_signals(
    config: Config, reference: CheckedReference, corpora: Corpora, order: Order, rule: Rule | None, world: World
) -> CheckedReference:
    """Add the signals of a reference that is a store, after checking that they are those of this run."""
    if reference.store is None:
        return reference
    # Rank 0 only: hashing the weights takes long, and all ranks would read the same files.
    if world.is_main and config.reference is not None and config.reference.path is not None:
        refuse_other_model(reference.store, config.reference.path)
    needs = rule.needs if rule is not None else ()
    return replace(reference, signals=stored_reference(reference.store, config.data, corpora, order, needs))


def _moved_schedules(
    config: Config, plan: Plan, corpora: Corpora, directory: RunDirectory, device: str, rollback: int | None
) -> str | None:
    """Return a warning if the run resumes with another length than it had."""
    stored, steps = directory.stored(), saved_steps(directory.checkpoints)
    if stored is None or not steps:
        return None
    # The defaults of a stored configuration are resolved, so the kind of its store has no effect.
    before = settle(stored, corpora, device, reads_document_store=False)
    return schedule_warning(before, (config, plan), steps[-1] if rollback is None else rollback)
