"""A store of reference scores, matched with the run that wants to read it."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from megatron_slm.build.corpora import Corpora
from megatron_slm.config import Config
from megatron_slm.data.corpus import Corpus
from megatron_slm.data.tokenizer import TokenizerIdentity
from megatron_slm.dist import World
from megatron_slm.errors import UserError
from megatron_slm.models.fingerprint import weights_fingerprint
from megatron_slm.reference.references import StoredReference
from megatron_slm.reference.store import ORDER, ScoreFile, Store, open_store


class Order(NamedTuple):
    """The run's order of samples: its fingerprint, and the position in it where the run will end."""

    fingerprint: str
    end: int


def store_fingerprints(config: Config) -> list[str]:
    """Of every store that the run reads."""
    parts = config.reference.parts if config.reference is not None and config.objective == "slm" else []
    return [open_store(part.store).fingerprint() for part in parts if part.store is not None]


def reads_document_store(config: Config) -> bool:
    """Return whether a store of kind `document` is among the references of a selective run.

    Raises:
        UserError: a store cannot be opened.
    """
    parts = config.reference.parts if config.reference is not None and config.objective == "slm" else []
    return any(open_store(part.store).manifest.kind == "document" for part in parts if part.store is not None)


def student_as_reference(config: Config) -> str | None:
    """Return a warning if the only reference is the student's own starting point, under the score `excess`.

    Raises:
        UserError: a store cannot be opened.
    """
    settings, student = config.reference, config.model.path
    scores = [part.score for part in config.selection.of] or [config.selection.score]
    if config.objective == "clm" or settings is None or student is None or "excess" not in scores:
        return None
    paths = [part.path or open_store(str(part.store)).manifest.scorer for part in settings.parts]
    if any(os.path.realpath(path) != os.path.realpath(student) for path in paths):
        return None
    return (
        f"the reference is {paths[0]}, which is also model.path: the excess loss of every token is 0 at the start, and "
        "noise after that. Train the reference on text that you trust first, or use another selection.score."
    )


def effective_min_context(config: Config) -> int:
    """Return `selection.min_context` of a resolved configuration; 0 where no store of kind `document` is read."""
    return (config.selection.min_context or 0) if reads_document_store(config) else 0


def open_reference_store(
    path: str, config: Config, corpora: Corpora, order: Order, needs: tuple[str, ...], world: World
) -> StoredReference:
    """The store as a reference, if it is one of these tokens.

    Args:
        path: of its folder.
        config, corpora, order: of the run.
        needs: signals that the objective reads.
        world: this process among all; one of them reads the weights of a `reference.path` beside the store.

    Raises:
        UserError: it is incomplete, corrupted, or of other tokens, another tokenizer, order or model.
    """
    store = open_matching_store(path, corpora)
    manifest = store.manifest
    if "reference.entropy" in needs and "entropy" not in manifest.columns:
        raise UserError(
            f"reference.store is {path}, which holds no entropy, and selection.score needs reference.entropy: score "
            "the corpora again with score.entropy=true."
        )
    if world.is_main and config.reference is not None and config.reference.path is not None:
        _refuse_other_model(store, config.reference.path)
    if manifest.kind == "packed":
        _refuse_other_order(store, config, order)
        files = [store.file_of(ORDER)]
    else:
        files = document_files(store, corpora.train)
    return StoredReference(files, manifest.columns, manifest.kind == "packed")


def open_matching_store(path: str, corpora: Corpora, setting: str = "reference.store") -> Store:
    """A store of the tokenizer of these corpora.

    Args:
        path: of its folder.
        corpora: of the run.
        setting: that named it, for messages.

    Raises:
        UserError: it is incomplete, or of another tokenizer.
    """
    store = open_store(path, setting)
    manifest = store.manifest
    scored = TokenizerIdentity(manifest.tokenizer_fingerprint, manifest.tokenizer_probe)
    difference = scored.difference(corpora.identity)
    if difference:
        raise UserError(
            f"{setting} is {path}, whose tokens are of another tokenizer than those of data.train ({difference}): "
            "score these corpora."
        )
    return store


def document_files(store: Store, corpora: Sequence[Corpus]) -> list[ScoreFile]:
    """Of a store of kind `document`, the file of each corpus.

    Raises:
        UserError: it holds no scores of one of them, or a file is not whole.
    """
    return [store.file_of(store.name_for(corpus.prefix, corpus.sha256)) for corpus in corpora]


def _refuse_other_order(store: Store, config: Config, order: Order) -> None:
    manifest, length = store.manifest, config.data.seq_length
    if (manifest.order_fingerprint, manifest.seq_length) != (order.fingerprint, length):
        raise UserError(
            f"reference.store is {store.path}, of kind packed and of another order of samples (data.train, data.split, "
            "data.keep, data.seq_length, data.order_tokens or seed differ): score this order, or a store of kind "
            "document, which serves any."
        )
    if manifest.reset_attention != config.data.reset_attention:
        raise UserError(
            f"reference.store is {store.path}, scored with data.reset_attention={str(manifest.reset_attention).lower()}"
            ": train with the same, or score again."
        )
    samples = manifest.files[0].rows // length
    if samples < order.end:
        raise UserError(
            f"reference.store is {store.path}, which ends after {samples} samples, and the run takes {order.end}: "
            "lower training.train_tokens, or score the whole run."
        )


def _refuse_other_model(store: Store, path: str) -> None:
    """A path beside a store names the model that the scores must be of."""
    origin = store.manifest.reference
    if path == origin.get("path") and not Path(path).is_dir():
        return  # one name on the hub: its weights are not fetched to be compared
    if weights_fingerprint(path) != origin["fingerprint"]:
        raise UserError(
            f"reference.store is {store.path}, which holds scores of {origin.get('path', 'no model, but imported')}, "
            f"and the weights of reference.path {path} are others: score with this model, or leave reference.path out."
        )
