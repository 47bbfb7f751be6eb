"""Text to tokens: what `megatron-slm prepare` does, from the inputs to the corpora in place.

Several processes encode, one reads and writes. Everything is made in a folder beside the corpora
and moved into place at the end; what a killed attempt had finished is not encoded again.
"""

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_slm.data.corpus import Corpus, describe_tokenizer, load_corpus_tokenizer, open_corpus, verify_checksums
from megatron_slm.data.sentencepiece_model import compare_with_sentencepiece
from megatron_slm.data.tokenizer import (
    largest_id,
    likelier_end_token,
    load_tokenizer,
    save_tokenizer,
    tokenizer_fingerprint,
    tokenizer_probe,
    train_tokenizer,
)
from megatron_slm.errors import UserError
from megatron_slm.io.staging import Journal, Staging
from megatron_slm.prepare.contamination import REPORT_SUFFIX, ContaminationReport
from megatron_slm.prepare.documents import Fields, decode_document
from megatron_slm.prepare.encoding import Encoding, encode_chunks
from megatron_slm.prepare.inputs import Input, find_files, read_chunks, read_documents
from megatron_slm.prepare.staged import DESCRIPTION, PARTS, Progress, StagedCorpora, read_progress, refuse_existing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


logger = logging.getLogger(__name__)

_SAMPLE_DOCUMENTS, _SAMPLE_CHARACTERS, _SAMPLE_MOST = 16, 2_000, 10_000
"""Of every input, documents to compare with sentencepiece; characters of each; documents of all inputs."""
_TOKENIZER = "tokenizer"  # in the staging folder: the tokenizer that the corpora will carry
_UINT16_VOCABULARY = 65_500  # as Megatron has it: larger vocabularies are int32


@dataclass(frozen=True)
class Options:
    """How inputs become corpora.

    tokenizer    what ``load_tokenizer`` takes; or None
    end_token    the piece that ends documents; None: the tokenizer's own
    train_size   the vocabulary size of a tokenizer to train on the inputs first; or None
    fields       where a record holds its text, and what it is sorted by
    skip_bad     documents that may be left out because they cannot be read
    evaluation   evaluation files whose 13-grams are looked for; a report is written
    workers      processes that encode; the result is the same with any number
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
    """Write the documents of files, in order, as the one corpus ``output``: ``prepare_corpora`` for the common case."""
    options = Options(tokenizer, train_size, Fields(json_key), workers=workers)
    return prepare_corpora(find_files(inputs), output, options)[0]


def prepare_corpora(inputs: list[Input], output: str, options: Options) -> list[Corpus]:
    """Write the documents of ``inputs``, in order, as one corpus, or as one for each value of ``options.fields.by``.

    Empty documents are left out. No token begins a document, one end token ends it; special
    tokens spelled out in a text are text, unless a chat template wrote it. The bytes written depend
    neither on the number of workers nor on how often the work was interrupted.

    Raises:
        UserError: the input cannot be read, holds no text, something exists at ``output``, or an
            attempt with other settings was not completed there.
    """
    staging = Staging(Path(output), "--output", "preparing")
    with staging.open():
        progress = _make(inputs, staging, options)
        staging.publish_beside(last=DESCRIPTION)
    return [_open(str(staging.output.with_name(state["name"]))) for state in progress.corpora.values()]


def verify_corpus(prefix: str) -> Corpus:
    """Check a corpus completely: sizes, checksums, and the tokenizer that it carries.

    Raises:
        UserError: something is missing or has changed.
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
    what = "answers" if corpus.masked else "text"
    return corpus.num_documents, corpus.num_tokens, corpus.num_bytes, what


def _make(inputs: list[Input], staging: Staging, options: Options) -> Progress:
    """Make what is to be published, resuming from the journal."""
    if not staging.journal.exists():
        _refuse_existing(staging.output, options)
    report = ContaminationReport(list(options.evaluation)) if options.evaluation else None
    given = load_tokenizer(options.tokenizer, options.end_token) if options.tokenizer else None
    _refuse_missing_template(given, options)
    _warn_of_turns(given, options)
    stamps = [[source.name, *source.stamp()] for source in inputs]
    settings = _settings(options, stamps, given, report)
    journal = Journal(staging, settings)
    progress = read_progress(journal) or _begin(inputs, staging, journal, options, given)
    folder = staging.folder / _TOKENIZER
    tokenizer = load_tokenizer(str(folder))
    _refuse_changed_tokenizer(staging.folder, options, given, tokenizer)
    if progress.complete:
        return progress
    _refuse_existing(staging.output, options)
    _refuse_changed_inputs(staging, progress, stamps)
    dtype = "uint16" if largest_id(tokenizer) + 1 < _UINT16_VOCABULARY else "int32"
    ngrams = report.begin(staging.folder) if report else None
    tokenizer_file = str(folder / "tokenizer.json")
    encoding = Encoding(tokenizer_file, tokenizer.eos_token_id, dtype, options.fields, ngrams)
    corpora = StagedCorpora(staging, journal, progress, dtype, options.fields, options.skip_bad, report)
    _encode(inputs, stamps, encoding, corpora, options.workers)
    if not corpora.corpora:
        journal.remove()
        names = " ".join(source.name for source in inputs[:3])
        raise UserError("--input", names, "it holds no text", "Name files with text")
    corpora.finish(folder, describe_tokenizer(tokenizer))
    return progress


def _refuse_changed_inputs(staging: Staging, progress: Progress, stamps: list[list[Any]]) -> None:
    """Raise an error if an input changed after it was encoded; a stamp is an input's name, size and time of change."""
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
    """Refuse to resume with a tokenizer of the same pieces that gives other ids than at the beginning."""
    if given is not None and tokenizer_probe(given) != tokenizer_probe(begun):
        raise UserError(
            f"--tokenizer {options.tokenizer} splits text differently than when the attempt in {folder} began: give "
            "the tokenizer of then, or remove that folder to begin afresh"
        )


def _refuse_missing_template(tokenizer: "PreTrainedTokenizerFast | None", options: Options) -> None:
    if options.fields.format == "messages" and not (tokenizer and tokenizer.chat_template):
        given = f"--tokenizer {options.tokenizer}" if tokenizer else f"--train-tokenizer {options.train_size}"
        raise UserError(
            f"{given} has no chat template, which --format messages needs: give a --tokenizer that has one, "
            "or use --format prompt-completion"
        )


def _warn_of_turns(tokenizer: "PreTrainedTokenizerFast | None", options: Options) -> None:
    likelier = likelier_end_token(tokenizer) if tokenizer and options.fields.format != "messages" else None
    if tokenizer and likelier:
        logger.warning(
            "--tokenizer %s is a chat model's: its end token %s ends a turn, and will end every document; to end them "
            "as in pretraining, give --end-token '%s'", options.tokenizer, tokenizer.eos_token, likelier,
        )  # fmt: skip


def _refuse_existing(output: Path, options: Options) -> None:
    report = (REPORT_SUFFIX,) if options.evaluation else ()
    if options.fields.by is None:
        refuse_existing(output, (DESCRIPTION, *PARTS, *report))
    else:
        refuse_existing(output, report)


def _settings(
    options: Options,
    stamps: list[list[Any]],
    tokenizer: "PreTrainedTokenizerFast | None",
    report: ContaminationReport | None,
) -> dict[str, Any]:
    """What decides the bytes of the result, by the option that sets it."""
    return {
        # A tokenizer is trained on all of them; otherwise an input that is not yet encoded may change.
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
    if tokenizer is None:  # training takes long enough to be kept
        journal.write(asdict(progress))
    return progress


def _compare_sample(inputs: list[Input], options: Options, tokenizer: "PreTrainedTokenizerFast") -> None:
    """Compare a sentencepiece model with its fast form on the first documents of every input."""
    sample = islice(chain.from_iterable(_first_texts(source, options) for source in inputs), _SAMPLE_MOST)
    compared = compare_with_sentencepiece(Path(str(options.tokenizer)), tokenizer, sample)
    logger.info(
        "--tokenizer %s gives the ids of sentencepiece in %d documents of the input (%d characters)",
        options.tokenizer, compared.documents, compared.characters,
    )  # fmt: skip


def _first_texts(source: Input, options: Options) -> Iterator[tuple[str, str]]:
    for raw, _ in islice(read_documents(source, options.fields), _SAMPLE_DOCUMENTS):
        text = ""
        with contextlib.suppress(UserError):  # named when it is encoded
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
                bad += 1  # named when they are encoded
                if bad > options.skip_bad:
                    raise


def _encode(
    inputs: list[Input], stamps: list[list[Any]], encoding: Encoding, corpora: StagedCorpora, workers: int
) -> None:
    done = len(corpora.progress.finished)
    if done:
        logger.info("resuming after %d of %d inputs", done, len(inputs))
    total = sum(size for _, *stamp in stamps[done:] for size in stamp[:1])
    chunks = read_chunks(inputs[done:], encoding.fields, done)
    for encoded, chunk in encode_chunks(chunks, encoding, workers, total):
        corpora.add(encoded)
        if chunk.finished is not None:
            corpora.commit(stamps[: chunk.finished])
    if corpora.corpora:
        corpora.commit_now(stamps)
