"""Preparation of corpora from input files, as `megatron-slm prepare` runs it.

Several processes encode, and one reads and writes. All files are written to a staging folder beside the corpora and
published at the end. After a kill, finished inputs are not encoded again.
"""

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_slm.data.corpus import Corpus, describe_tokenizer, load_corpus_tokenizer, open_corpus, verify_checksums
from megatron_slm.data.sentencepiece_model import compare_with_sentencepiece, train_tokenizer
from megatron_slm.data.tokenizer import (
    likelier_end_token,
    load_tokenizer,
    save_tokenizer,
    tokenizer_fingerprint,
    tokenizer_probe,
    vocabulary_size,
)
from megatron_slm.errors import UserError
from megatron_slm.io.staging import Journal, Staging
from megatron_slm.prepare.contamination import REPORT_SUFFIX, ContaminationReport
from megatron_slm.prepare.documents import Fields, decode_document
from megatron_slm.prepare.encoding import EncoderSettings, encode_chunks
from megatron_slm.prepare.inputs import Input, find_files, read_chunks, read_documents
from megatron_slm.prepare.staged import DESCRIPTION, PARTS, Progress, StagedCorpora, read_progress, refuse_existing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


logger = logging.getLogger(__name__)

_SAMPLE_DOCUMENTS, _SAMPLE_CHARACTERS, _SAMPLE_MOST = 16, 2_000, 10_000
"""The sample to compare with sentencepiece: documents per input, characters per document, documents of all inputs."""
_TOKENIZER = "tokenizer"  # in the staging folder: the tokenizer that is copied to each corpus
_UINT16_VOCABULARY = 65_500  # Megatron stores the tokens of larger vocabularies as int32


@dataclass(frozen=True)
class Options:
    """The options of a preparation.

    tokenizer    folder, name or file, see ``load_tokenizer``; None to train one
    train_size   vocabulary size of the tokenizer to train on the inputs; None to load one
    fields       keys of the records
    skip_bad     documents that may be skipped because they cannot be read
    evaluation   evaluation files whose 13-grams are looked for in the input
    workers      number of processes that encode; the result does not depend on it
    end_token    piece that ends documents; None for the tokenizer's own
    """

    tokenizer: str | None = None
    train_size: int | None = None
    fields: Fields = field(default_factory=Fields)
    skip_bad: int = 0
    evaluation: tuple[str, ...] = ()
    workers: int = 1
    end_token: str | None = None


def prepare_corpus(
    inputs: list[str],
    output: str,
    *,
    tokenizer: str | None = None,
    train_size: int | None = None,
    json_key: str = "text",
    workers: int = 1,
) -> Corpus:
    """Write the documents of files, in order, as the corpus ``output``; see ``prepare_corpora``."""
    options = Options(tokenizer, train_size, Fields(json_key), workers=workers)
    return prepare_corpora(find_files(inputs), output, options)[0]


def prepare_corpora(inputs: list[Input], output: str, options: Options) -> list[Corpus]:
    """Write the documents of ``inputs``, in order, as one corpus, or as one per value of ``options.fields.by``.

    Empty documents are dropped. A document begins with no special token and ends with one end token. Special tokens
    that are spelled out in a text are text, unless a chat template wrote them. The bytes of the result depend neither
    on the number of workers nor on interruptions.

    Raises:
        UserError: the input cannot be read or holds no text, something exists at ``output``, or there is unfinished
            work with other settings.
    """
    staging = Staging(Path(output), "--output", "preparing")
    with staging.open():
        progress = make_corpora(inputs, staging, options)
        staging.publish_beside(last=DESCRIPTION)
    return [_open(str(staging.output.with_name(state["name"]))) for state in progress.corpora.values()]


def verify_corpus(prefix: str) -> Corpus:
    """Check the sizes, the checksums and the tokenizer of a corpus.

    Raises:
        UserError: a file is missing or has changed.
    """
    corpus = open_corpus(str(Path(prefix)))
    verify_checksums(corpus)
    load_corpus_tokenizer(corpus)
    logger.info("%s is intact: %d documents, %d tokens, %d bytes of %s", prefix, *_counts(corpus))
    return corpus


def _open(prefix: str) -> Corpus:
    corpus = open_corpus(prefix)
    logger.info("%s: %d documents, %d tokens, %d bytes of %s", prefix, *_counts(corpus))
    return corpus


def _counts(corpus: Corpus) -> tuple[int, int, int, str]:
    return corpus.num_documents, corpus.num_tokens, corpus.num_bytes, "answers" if corpus.masked else "text"


def make_corpora(inputs: list[Input], staging: Staging, options: Options, *, may_be_empty: bool = False) -> Progress:
    """Make the files to publish in an open staging folder, resuming from its journal; see `prepare_corpora`.

    Args:
        inputs, options: as in `prepare_corpora`.
        staging: the open staging folder.
        may_be_empty: make no corpus, instead of raising an error, if the inputs hold no text.
    """
    if not staging.journal.exists():
        _refuse_existing(staging.output, options)
    report = ContaminationReport(list(options.evaluation)) if options.evaluation else None
    given = load_tokenizer(options.tokenizer, options.end_token) if options.tokenizer else None
    _refuse_missing_template(given, options)
    _warn_of_turns(given, options)
    stamps = [[source.name, *source.stamp()] for source in inputs]
    journal = Journal(staging, deciding_settings(options, stamps, given, report))
    progress = read_progress(journal) or _begin(inputs, staging, journal, options, given)
    folder = staging.folder / _TOKENIZER
    tokenizer = load_tokenizer(str(folder))
    _refuse_changed_tokenizer(staging.folder, options, given, tokenizer)
    if progress.complete:
        return progress
    _refuse_existing(staging.output, options)
    _refuse_changed_inputs(staging, progress, stamps)
    dtype = "uint16" if vocabulary_size(tokenizer) < _UINT16_VOCABULARY else "int32"
    ngrams = report.begin(staging.folder) if report else None
    tokenizer_file = str(folder / "tokenizer.json")
    encoder = EncoderSettings(tokenizer_file, tokenizer.eos_token_id, dtype, options.fields, ngrams)
    corpora = StagedCorpora(staging, journal, progress, dtype, options.fields, options.skip_bad, report)
    _encode(inputs, stamps, encoder, corpora, options.workers)
    if not corpora.by_value and not may_be_empty:
        journal.remove()
        names = " ".join(source.name for source in inputs[:3])
        raise UserError("--input", names, "it holds no text", "Give files with text")
    corpora.finish(folder, describe_tokenizer(tokenizer))
    return progress


def _refuse_changed_inputs(staging: Staging, progress: Progress, stamps: list[list[Any]]) -> None:
    """Raise a UserError if an input has changed since it was encoded; a stamp is its name, size and time of change."""
    for before, now in zip(progress.finished, stamps, strict=False):
        if before != now:
            reason = f"{before[0]} has changed since it was encoded"
            raise UserError("--output", staging.output, reason, f"Remove {staging.folder} to start again")


def _refuse_changed_tokenizer(
    folder: Path,
    options: Options,
    given: "PreTrainedTokenizerFast | None",
    begun: "PreTrainedTokenizerFast",
) -> None:
    """Raise a UserError if the tokenizer gives other ids than that of the unfinished work, with the same pieces."""
    if given is not None and tokenizer_probe(given) != tokenizer_probe(begun):
        reason = f"it splits text differently than the tokenizer of the unfinished work in {folder}"
        remedy = "Give that tokenizer, or remove that folder to start again"
        raise UserError("--tokenizer", options.tokenizer, reason, remedy)


def _refuse_missing_template(tokenizer: "PreTrainedTokenizerFast | None", options: Options) -> None:
    if options.fields.format == "messages" and not (tokenizer and tokenizer.chat_template):
        setting, value = ("--tokenizer", options.tokenizer) if tokenizer else ("--train-tokenizer", options.train_size)
        remedy = "Give a --tokenizer that has one, or use --format prompt-completion"
        raise UserError(setting, value, "it has no chat template, which --format messages needs", remedy)


def _warn_of_turns(tokenizer: "PreTrainedTokenizerFast | None", options: Options) -> None:
    likelier = likelier_end_token(tokenizer) if tokenizer and options.fields.format != "messages" else None
    if tokenizer and likelier:
        logger.warning(
            "--tokenizer %s belongs to a chat model. Its end token %s ends turns, and will end every document. To end "
            "documents as in pretraining, use --end-token '%s'.", options.tokenizer, tokenizer.eos_token, likelier,
        )  # fmt: skip


def _refuse_existing(output: Path, options: Options) -> None:
    corpus = (DESCRIPTION, *PARTS) if options.fields.by is None else ()
    report = (REPORT_SUFFIX,) if options.evaluation else ()
    refuse_existing(output, corpus + report)


def deciding_settings(
    options: Options,
    stamps: list[list[Any]],
    tokenizer: "PreTrainedTokenizerFast | None",
    report: ContaminationReport | None,
) -> dict[str, Any]:
    """Return the settings that decide the bytes of the result, by option."""
    return {
        # A trained tokenizer depends on all inputs; otherwise, inputs may change until they are encoded.
        "--input": [stamp if options.train_size else stamp[0] for stamp in stamps],
        "--tokenizer": tokenizer and tokenizer_fingerprint(tokenizer),
        "chat template": tokenizer.chat_template if tokenizer and options.fields.format == "messages" else None,
        "--end-token": options.end_token,
        "--train-tokenizer": options.train_size,
        "--format": options.fields.format,
        **options.fields.needed(),
        "--separator": options.fields.separator,
        "--source-key": options.fields.source,
        "--contamination": report and report.fingerprint(),
    }


def _begin(
    inputs: list[Input],
    staging: Staging,
    journal: Journal,
    options: Options,
    tokenizer: "PreTrainedTokenizerFast | None",
) -> Progress:
    if tokenizer is not None and Path(str(options.tokenizer)).is_file():
        _compare_sample(inputs, options, tokenizer)
    staging.clear()
    progress = Progress()
    trained = tokenizer or _train(inputs, staging.folder / "trained.model", options)
    save_tokenizer(trained, staging.folder / _TOKENIZER)
    if tokenizer is None:  # training takes so long that its result is kept
        journal.write(asdict(progress))
    return progress


def _compare_sample(inputs: list[Input], options: Options, tokenizer: "PreTrainedTokenizerFast") -> None:
    """Compare a sentencepiece model with its fast form on the first documents of every input."""
    sample = islice(chain.from_iterable(_first_texts(source, options) for source in inputs), _SAMPLE_MOST)
    compared = compare_with_sentencepiece(Path(str(options.tokenizer)), tokenizer, sample)
    logger.info(
        "--tokenizer %s gives the same ids as sentencepiece in %d documents of the input (%d characters)",
        options.tokenizer, compared.documents, compared.characters,
    )  # fmt: skip


def _first_texts(source: Input, options: Options) -> Iterator[tuple[str, str]]:
    for raw, _ in islice(read_documents(source, options.fields), _SAMPLE_DOCUMENTS):
        text = ""
        with contextlib.suppress(UserError):  # raised again when the document is encoded
            text = decode_document(raw, options.fields).text[:_SAMPLE_CHARACTERS]
        yield raw.place, text


def _train(inputs: list[Input], model: Path, options: Options) -> "PreTrainedTokenizerFast":
    assert options.train_size is not None
    logger.info("training a tokenizer of %d pieces", options.train_size)
    train_tokenizer(_texts(inputs, options), options.train_size, model)
    return load_tokenizer(str(model))


def _texts(inputs: list[Input], options: Options) -> Iterator[str]:
    bad = 0
    for source in inputs:
        for raw, _ in read_documents(source, options.fields):
            try:
                yield decode_document(raw, options.fields).text
            except UserError:
                bad += 1  # raised or skipped again when the document is encoded
                if bad > options.skip_bad:
                    raise


def _encode(
    inputs: list[Input], stamps: list[list[Any]], encoder: EncoderSettings, corpora: StagedCorpora, workers: int
) -> None:
    done = len(corpora.progress.finished)
    if done:
        logger.info("resuming after %d of %d inputs", done, len(inputs))
    total = sum(stamp[1] for stamp in stamps[done:] if len(stamp) > 1)
    chunks = read_chunks(inputs[done:], encoder.fields, done)
    for encoded, chunk in encode_chunks(chunks, encoder, workers, total):
        corpora.add(encoded)
        if chunk.finished is not None:
            corpora.commit(stamps[: chunk.finished])
    corpora.commit_now(stamps)
