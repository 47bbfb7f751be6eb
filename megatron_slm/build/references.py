"""The references of a run: checked against its corpora first, then built."""

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from transformers import PretrainedConfig

from megatron_slm.backend import Backend
from megatron_slm.build.corpora import Corpora, require_tokenizer
from megatron_slm.build.models import frozen_model
from megatron_slm.config import Config
from megatron_slm.data.corpus import Corpus
from megatron_slm.data.loader import position_after
from megatron_slm.data.samples import order_fingerprint
from megatron_slm.data.settings import DataSettings
from megatron_slm.data.tokenizer import TokenizerIdentity
from megatron_slm.dist import World, agree, gather_objects
from megatron_slm.errors import AgreedError, UserError
from megatron_slm.models.checks import check_length
from megatron_slm.models.pretrained import pretrained_config, refuse_pickles, weights_fingerprint
from megatron_slm.reference.references import LiveReference, MixedReference, NoReference, Reference, StoredReference
from megatron_slm.reference.settings import PartSettings
from megatron_slm.reference.store import ORDER, ScoreFile, Store, open_store
from megatron_slm.selection.rule import Rule
from megatron_slm.signals import COLUMNS, columns_of
from megatron_slm.training.state import Plan

logger = logging.getLogger(__name__)


class Order(NamedTuple):
    """The order of samples of a run: its fingerprint, and the position in it where the run will end."""

    fingerprint: str
    end: int


@dataclass(frozen=True)
class CheckedReference:
    """A reference of a run that has been checked.

    Attributes:
        settings: of this reference.
        model: Hugging Face configuration of the model to run; None for a store.
        store: opened; None for a model.
        signals: the store as a reference, once its samples are known to be those of the run.
        is_loaded: False to build the model from its configuration with random weights.
    """

    settings: PartSettings
    model: PretrainedConfig | None = None
    store: Store | None = None
    signals: Reference | None = None
    is_loaded: bool = True

    @property
    def scorer(self) -> str:
        """The path of the model that computes the losses, or computed those of the store."""
        return self.store.manifest.scorer if self.store is not None else str(self.settings.path)


def reads_document_store(references: Sequence[CheckedReference]) -> bool:
    """Return True if one of the references is a store of kind `document`."""
    return any(reference.store is not None and reference.store.manifest.kind == "document" for reference in references)


def check_reference(settings: PartSettings, corpora: Corpora, seq_length: int) -> CheckedReference:
    """Check a reference: read the configuration of its model, or open its store. No weights are loaded.

    Raises:
        UserError: it cannot be read, has another tokenizer than the corpora, or cannot score samples of this length.
    """
    if settings.store is not None:
        return CheckedReference(settings, store=open_matching_store(settings.store, corpora))
    path = str(settings.path)
    require_tokenizer(path, "reference", corpora)
    refuse_pickles("reference", path)
    model = pretrained_config(path, "reference", settings.trust_remote_code)
    check_length(model, "reference", seq_length)
    return CheckedReference(settings, model=model)


def self_reference_warning(references: Sequence[CheckedReference], config: Config) -> str | None:
    """Return a warning if the only reference is the student's own starting point, under the score `excess`."""
    student = config.model.path
    scores = [part.score for part in config.selection.of] or [config.selection.score]
    if not references or student is None or "excess" not in scores:
        return None
    if any(os.path.realpath(one.scorer) != os.path.realpath(student) for one in references):
        return None
    return (
        f"the reference is {references[0].scorer}, which is also model.path: the excess loss of every token is 0 at "
        "the start, and noise after that. Train the reference on text that you trust first, or use another "
        "selection.score."
    )


def open_matching_store(path: str, corpora: Corpora, setting: str = "reference.store") -> Store:
    """Open the store that `setting` names, and check that it was scored with the tokenizer of these corpora.

    Raises:
        UserError: the store is incomplete, or was scored with another tokenizer.
    """
    store = open_store(path, setting)
    manifest = store.manifest
    scored = TokenizerIdentity(manifest.tokenizer_fingerprint, manifest.tokenizer_probe)
    difference = scored.difference(corpora.identity)
    if difference:
        reason = f"it was scored with a different tokenizer than data.train ({difference})"
        raise UserError(setting, path, reason, "Score the corpora of data.train")
    return store


def document_files(store: Store, corpora: Sequence[Corpus]) -> list[ScoreFile]:
    """Return the file of each corpus in a store of kind `document`.

    Raises:
        UserError: the store holds no scores of one of them, or a file is incomplete.
    """
    return [store.file_of(store.name_for(corpus.prefix, corpus.sha256)) for corpus in corpora]


def stored_reference(
    store: Store, data: DataSettings, corpora: Corpora, order: Order, needs: tuple[str, ...]
) -> StoredReference:
    """Return a store as a reference, after checking that it holds the signals `needs` of the samples of this run.

    Raises:
        UserError: the store is corrupted, lacks a signal, or holds other tokens or another order.
    """
    manifest = store.manifest
    for column in columns_of("reference", needs):
        if column not in manifest.columns:
            flag = COLUMNS[column].stored_if
            raise UserError(
                store.setting,
                str(store.path),
                f"it holds no {column}, and selection.score needs reference.{column}",
                f"Score the corpora again with score.{flag}=true" if flag else "Set reference.path: no store holds it",
            )
    if manifest.kind == "packed":
        _refuse_other_order(store, data, order)
        files = [store.file_of(ORDER)]
    else:
        files = document_files(store, corpora.train)
    return StoredReference(files, manifest.columns, manifest.kind == "packed")


def planned_order(config: Config, plan: Plan, corpora: Corpora) -> Order:
    """Return the order of samples that a store of kind `packed` must hold."""
    data = config.data
    fingerprint = order_fingerprint(data, corpora.train, config.seed, data.order_tokens or 0, corpora.kept)
    return Order(fingerprint, position_after(data.skip_samples, 0, plan.total_samples))


def with_signals(
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


def refuse_other_model(store: Store, path: str) -> None:
    """Raise a UserError if a store was scored with other weights than those of the model in `reference.path`."""
    origin = store.manifest.reference
    if path == origin.get("path") and not Path(path).is_dir():
        return  # the same name on the hub: weights are not downloaded to compare them
    if weights_fingerprint(path) != origin["fingerprint"]:
        reason = (
            f"it holds scores from {origin.get('path', 'imported files')}, not from a model with the weights of "
            f"reference.path {path}"
        )
        raise UserError(store.setting, str(store.path), reason, "Score with this model, or remove reference.path")


def make_reference(config: Config, references: Sequence[CheckedReference], backend: Backend) -> tuple[Reference, float]:
    """Build the source of the reference signals from checked references; every rank calls it.

    Returns:
        The reference, and the forward FLOPs per token of the models in it.
    """
    if not references or config.reference is None:
        return NoReference(), 0.0
    sources: list[Reference] = []
    flops = 0.0
    for reference in references:
        if reference.signals is not None:
            sources.append(reference.signals)
        else:
            unloaded = None if reference.is_loaded else reference.model
            engine, forward_flops = frozen_model(config, reference.settings, backend, unloaded)
            sources.append(LiveReference(engine, reference.settings.micro_batch_size))
            flops += forward_flops
    settings = config.reference
    if not settings.of:
        return sources[0], flops
    return MixedReference(sources, [part.weight for part in settings.of], settings.mix), flops


@contextmanager
def open_scorer(
    config: Config, references: Sequence[CheckedReference], corpora: Corpora, backend: Backend
) -> Iterator[Reference | None]:
    """Yield the model that scored the only store of a run, or None if it cannot be run; every rank calls it.

    The model is freed at the end.
    """
    path = None
    if len(references) == 1 and references[0].store is not None:
        path = references[0].store.manifest.reference.get("path")
    if not gather_objects(path is not None and Path(path).is_dir())[0]:
        yield None
        return
    part = replace(references[0].settings, path=path, store=None)
    try:
        agree(lambda: check_reference(part, corpora, config.data.seq_length))
        engine, _ = frozen_model(config, part, backend)
    except AgreedError as error:
        logger.info("the model that wrote the store cannot be compared with it: %s", error)
        yield None
        return
    try:
        yield LiveReference(engine, part.micro_batch_size)
    finally:
        backend.release(engine)


def _refuse_other_order(store: Store, data: DataSettings, order: Order) -> None:
    manifest, path = store.manifest, str(store.path)
    if (manifest.order_fingerprint, manifest.seq_length) != (order.fingerprint, data.seq_length):
        raise UserError(
            store.setting,
            path,
            "it is of kind packed, and holds another order of samples (data.train, data.split, data.keep, "
            "data.seq_length, data.order_tokens or seed differ)",
            "Score this order, or use a store of kind document, which serves any order",
        )
    if manifest.reset_attention != data.reset_attention:
        reason = f"it was scored with data.reset_attention={str(manifest.reset_attention).lower()}"
        raise UserError(store.setting, path, reason, "Train with the same setting, or score again")
    samples = manifest.files[0].rows // data.seq_length
    if samples < order.end:
        reason = f"it ends after {samples} samples, and the run reads {order.end}"
        raise UserError(store.setting, path, reason, "Lower training.train_tokens, or score the whole run")
