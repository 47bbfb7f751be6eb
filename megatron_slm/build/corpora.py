"""The corpora of a run, their common tokenizer, and the order of samples."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_slm.data.corpus import Corpus, load_corpus_tokenizer, open_corpus, unique_names
from megatron_slm.data.keep_list import KeptDocuments, kept_documents
from megatron_slm.data.samples import Samples, build_samples
from megatron_slm.data.settings import DataSettings
from megatron_slm.data.tokenizer import TokenizerIdentity, load_tokenizer, tokenizer_identity
from megatron_slm.dist import World, agree
from megatron_slm.errors import UserError, refuse_missing_folder
from megatron_slm.training.settings import ObserveSettings
from megatron_slm.training.state import Plan


@dataclass(frozen=True)
class Corpora:
    """The opened corpora of a run.

    Attributes:
        train: training corpora in the order of the blend.
        valid: evaluation corpora by name.
        identity, tokenizer: the tokenizer that all of them share.
        end_token: the token that was chosen to end documents; None for the tokenizer's own.
        kept: the documents of each training corpus that the keep-list keeps; None without a keep-list.
    """

    train: list[Corpus]
    valid: dict[str, Corpus]
    identity: TokenizerIdentity
    tokenizer: Any
    end_token: str | None = None
    kept: list[KeptDocuments] | None = None

    @property
    def sources(self) -> dict[str, Corpus]:
        """The training corpora by unique names, in the order of the blend."""
        return dict(zip(unique_names([corpus.prefix for corpus in self.train]), self.train, strict=True))


def open_corpora(data: DataSettings) -> Corpora:
    """Open all corpora, which must share a tokenizer, without applying a keep-list.

    Raises:
        UserError: a corpus is missing or damaged, or their tokenizers differ.
    """
    named = data.corpora()
    everything = [open_corpus(prefix, setting) for setting, prefix in named]
    num_train = len(everything) - len(data.valid)
    train, valid = everything[:num_train], dict(zip(data.valid, everything[num_train:], strict=True))
    tokenizer = load_corpus_tokenizer(train[0])
    identity = tokenizer_identity(tokenizer)
    for (setting, _), corpus in zip(named, everything, strict=True):
        _refuse_other_tokenizer(setting, corpus, train[0].prefix, identity)
    end_token = next((corpus.end_token for corpus in everything if corpus.end_token is not None), None)
    return Corpora(train, valid, identity, tokenizer, end_token)


def open_beside(prefix: str, setting: str, corpora: Corpora) -> Corpus:
    """Open a further corpus, which must have the tokenizer of the corpora of a run.

    Raises:
        UserError: it is missing or damaged, or has another tokenizer.
    """
    corpus = open_corpus(prefix, setting)
    _refuse_other_tokenizer(setting, corpus, corpora.train[0].prefix, corpora.identity)
    return corpus


def open_observed(observe: ObserveSettings | None, corpora: Corpora) -> dict[str, Corpus]:
    """Return the corpora of `training.observe` by name; none if it is not set.

    Raises:
        UserError: one is missing or damaged or has another tokenizer, or there is none.
    """
    if observe is None:
        return {}
    setting = "training.observe.corpus"
    named = observe.corpus
    if isinstance(named, str):
        named = {Path(named).name: named}
    found = {name: open_beside(prefix, setting, corpora) for name, prefix in (named or {}).items()} or corpora.valid
    if not found:
        reason = "there is no corpus to observe, because data.valid is empty"
        raise UserError(setting, None, reason, "Set it to a PREFIX, or set data.valid")
    return found


def _refuse_other_tokenizer(setting: str, corpus: Corpus, first: str, identity: TokenizerIdentity) -> None:
    difference = corpus.tokenizer.difference(identity)
    if difference:
        reason = f"it was prepared with a different tokenizer than data.train {first} ({difference})"
        remedy = "Prepare one of the two again with the PREFIX.tokenizer of the other"
        raise UserError(setting, corpus.prefix, reason, remedy)


def open_run_corpora(data: DataSettings) -> Corpora:
    """Open all corpora and apply the keep-list `data.keep`, if there is one.

    Raises:
        UserError: as `open_corpora`, or the keep-list does not fit the corpora.
    """
    corpora = open_corpora(data)
    return dataclasses.replace(corpora, kept=kept_documents(data, corpora.train))


def describe_kept(corpora: Corpora) -> str:
    """Return one line with the documents and tokens of each corpus that the keep-list keeps."""
    return "; ".join(
        f"{part.documents.sum():,} of {corpus.num_documents:,} documents of {corpus.name}, {part.num_tokens:,} of "
        f"{corpus.num_tokens:,} tokens"
        for corpus, part in zip(corpora.train, corpora.kept or [], strict=True)
    )


def require_tokenizer(path: str, setting: str, corpora: Corpora) -> None:
    """Raise an error unless a model has the tokenizer of the corpora.

    The losses of two models can be compared per token only if their tokens are the same. If an end token was chosen
    for the corpora, the model's own end token may differ.

    Args:
        path: Hugging Face folder or hub name of the model.
        setting: the group that names it, `model` or `reference`.
        corpora: of the run.

    Raises:
        UserError: the model has another tokenizer, or none that can be read.
    """
    refuse_missing_folder(f"{setting}.path", path)
    try:
        found = tokenizer_identity(load_tokenizer(path, corpora.end_token))
    except UserError as error:
        # An error of any other setting concerns the end token that the corpora were prepared with.
        cause = error.reason if error.setting == "tokenizer" else f"{error.setting} {error.value}: {error.reason}"
        raise UserError(f"{setting}.path", path, f"its tokenizer cannot be used ({cause})", error.remedy) from error
    difference = found.difference(corpora.identity)
    if difference:
        reason = f"its tokenizer differs from that of data.train ({difference})"
        remedy = "Prepare the corpora with this tokenizer, or use a model that has the tokenizer of the corpora"
        raise UserError(f"{setting}.path", path, reason, remedy)


def make_samples(data: DataSettings, seed: int, corpora: Corpora, plan: Plan, cache: Path, world: World) -> Samples:
    """Build the order of samples of a run, whose `data.order_tokens` is resolved; every rank calls it.

    The indices are written to `cache`, unless `data.cache` names another folder.
    """
    return build_samples(
        data,
        corpora.train,
        seed=seed,
        order_tokens=data.order_tokens or 0,
        total_samples=plan.total_samples,
        cache=agree(lambda: _make_cache_folder(data.cache, cache)),
        world=world,
        kept=corpora.kept,
    )


def _make_cache_folder(setting: str | None, default: Path) -> Path:
    path = Path(setting) if setting else default
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = f"the index of samples cannot be written there ({error.strerror})"
        remedy = "Set data.cache to a writable folder"
        raise UserError("data.cache" if setting else "run_dir", str(path), reason, remedy) from error
    return path
