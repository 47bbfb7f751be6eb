"""The corpora of a run, their one tokenizer, and the order of samples."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_slm.config import Config
from megatron_slm.data.corpus import Corpus, load_corpus_tokenizer, open_corpus
from megatron_slm.data.samples import Kept, Samples, build_samples, kept_documents
from megatron_slm.data.settings import blend
from megatron_slm.data.tokenizer import TokenizerIdentity, load_tokenizer, tokenizer_identity
from megatron_slm.dist import World, agree
from megatron_slm.errors import UserError
from megatron_slm.training.state import Plan


@dataclass(frozen=True)
class Corpora:
    """The training corpora in the order of the blend, the evaluation sets by name, and their one tokenizer.

    `kept` is what a keep-list leaves of each training corpus; None: there is no list, or it is not asked for.
    `end_token` was chosen to end the documents; None: it is the tokenizer's own.
    """

    train: list[Corpus]
    valid: dict[str, Corpus]
    identity: TokenizerIdentity
    tokenizer: Any
    end_token: str | None = None
    kept: list[Kept] | None = None


def open_corpora(config: Config) -> Corpora:
    """Open all corpora of the run, which must share a tokenizer.

    Raises:
        UserError: a corpus is missing or damaged, or they do not share one.
    """
    prefixes, _ = blend(config.data.train)
    train = [open_corpus(prefix) for prefix in prefixes]
    valid = {name: open_corpus(prefix) for name, prefix in config.data.valid.items()}
    tokenizer = load_corpus_tokenizer(train[0])
    identity = tokenizer_identity(tokenizer)
    everything = [*train, *valid.values()]
    for (setting, prefix), corpus in zip(config.data.corpora(), everything, strict=True):
        difference = corpus.tokenizer.difference(identity)
        if difference:
            raise UserError(
                f"{setting} names {prefix}, and data.train {train[0].prefix}, which were prepared with different "
                f"tokenizers ({difference}): prepare one of them again with the other's PREFIX.tokenizer."
            )
    end_token = next((corpus.end_token for corpus in everything if corpus.end_token is not None), None)
    return Corpora(train, valid, identity, tokenizer, end_token)


def open_run_corpora(config: Config) -> Corpora:
    """The same, and what `data.keep` leaves of them."""
    corpora = open_corpora(config)
    return dataclasses.replace(corpora, kept=kept_documents(config.data, corpora.train))


def kept_in_words(corpora: Corpora) -> str:
    """What a keep-list leaves of each corpus, in one line."""
    return "; ".join(
        f"{part.documents.sum():,} of {corpus.num_documents:,} documents of {corpus.name}, {part.num_tokens:,} of "
        f"{corpus.num_tokens:,} tokens"
        for corpus, part in zip(corpora.train, corpora.kept or [], strict=True)
    )


def require_tokenizer(path: str, setting: str, corpora: Corpora) -> None:
    """Raise an error unless a model has the tokenizer of the corpora.

    Losses of two models compare token by token only if their tokens are the same. Where an end token was chosen for
    the corpora, the model may have another one.

    Args:
        path: of the model.
        setting: that named it, `model` or `reference`.
        corpora: of the run.

    Raises:
        UserError: it has another one, or none that can be read.
    """
    try:
        found = tokenizer_identity(load_tokenizer(path, corpora.end_token))
    except UserError as error:
        raise UserError(f"{setting}.path is '{path}', which has no tokenizer that can be read: {error}") from error
    difference = found.difference(corpora.identity)
    if difference:
        raise UserError(
            f"{setting}.path is '{path}', whose tokenizer is not that of data.train ({difference}): "
            "prepare the corpora with this tokenizer, or use a model that has the corpora's."
        )


def make_samples(config: Config, corpora: Corpora, plan: Plan, cache: Path, world: World) -> Samples:
    """The order of samples; every rank calls it. Its indices are kept in `cache` unless `data.cache` is set."""
    return build_samples(
        config.data,
        corpora.train,
        seed=config.seed,
        order_tokens=config.data.order_tokens or 0,
        total_samples=plan.total_steps * plan.samples_per_step,
        cache=agree(lambda: _cache_folder(config, cache)),
        world=world,
        kept=corpora.kept,
    )


def _cache_folder(config: Config, default: Path) -> Path:
    path = Path(config.data.cache) if config.data.cache else default
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"data.cache is {path}, which is no folder that can be written: name another.") from error
    return path
