"""Text to tokens: jsonl or text files, plain or gzipped, into a prepared corpus.

Several processes encode, one reads and writes. Everything is written beside the corpus and
renamed into place at the end, PREFIX.json last: a corpus exists when its PREFIX.json does.
"""

import contextlib
import fcntl
import functools
import logging
import multiprocessing
import os
import shutil
import signal
import threading
import time
from array import array
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from tqdm import tqdm

from megatron_slm.data.corpus import Corpus, describe, file_sha256, open_corpus, verify_checksums
from megatron_slm.data.corpus import corpus_tokenizer_path as carried_tokenizer
from megatron_slm.data.documents import RawDocument, checked_input, decode_text, read_chunks, read_documents
from megatron_slm.data.tokenizer import load_tokenizer, tokenizer_fingerprint, train_tokenizer
from megatron_slm.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

logger = logging.getLogger(__name__)

_WINDOW, _OVERLAP = 65_536, 4_096  # characters; longer documents are encoded window by window
_LOG_SECONDS = 30.0


@dataclass(frozen=True)
class Encoding:
    """How workers turn documents into tokens."""

    tokenizer_file: str
    end_id: int
    dtype: str
    json_key: str


class Encoded(NamedTuple):
    """A chunk's documents as tokens, end tokens included."""

    tokens: np.ndarray  # [sum of lengths]
    lengths: list[int]
    num_bytes: int  # of their text in UTF-8


def prepare_corpus(
    inputs: list[str],
    output: str,
    *,
    tokenizer: str | None = None,
    train_size: int | None = None,
    json_key: str = "text",
    workers: int = 1,
) -> Corpus:
    """Write the documents of ``inputs``, in order, as the corpus ``output``.

    A file ``*.jsonl``, ``*.ndjson`` or ``*.json`` (or any of them with ``.gz``) holds a document
    a line, under ``json_key``; any other file is one document. Empty documents are left out. No
    token begins a document, one end token ends it; special tokens spelled out in a text are
    text. The bytes written do not depend on ``workers``.

    Args:
        tokenizer: what ``load_tokenizer`` takes; or None
        train_size: the vocabulary size of a tokenizer to train on the inputs first; or None

    Raises:
        UserError: the input cannot be read, holds no text, or something exists at ``output``.
    """
    paths = [checked_input(Path(name)) for name in inputs]
    with _staging(Path(output)) as staged:
        source = tokenizer or _trained(paths, json_key, train_size, staged)
        encoding, fingerprint = _carry_tokenizer(source, staged, json_key)
        corpus = _write_tokens(paths, encoding, workers, staged, fingerprint)
        _publish(corpus, Path(output))
    corpus = open_corpus(str(Path(output)))
    logger.info("%s: %d documents, %d tokens, %d bytes of text", output, *_counts(corpus))
    return corpus


def verify_corpus(prefix: str) -> Corpus:
    """Check a corpus completely: sizes, checksums, and the tokenizer that it carries.

    Raises:
        UserError: something is missing or has changed.
    """
    corpus = open_corpus(str(Path(prefix)))
    verify_checksums(corpus)
    folder = carried_tokenizer(corpus)
    if tokenizer_fingerprint(load_tokenizer(str(folder))) != corpus.tokenizer_fingerprint:
        raise UserError(f"{folder} is not the tokenizer that {prefix} was prepared with: prepare it again")
    logger.info("%s is intact: %d documents, %d tokens, %d bytes of text", prefix, *_counts(corpus))
    return corpus


def _counts(corpus: Corpus) -> tuple[int, int, int]:
    return corpus.num_documents, corpus.num_tokens, corpus.num_bytes


# Tokenizer


def _trained(paths: list[Path], json_key: str, train_size: int | None, staged: Path) -> str:
    if train_size is None:
        raise UserError("no tokenizer is given: name one with --tokenizer, or train one with --train-tokenizer")
    model = staged.with_suffix(".model")
    logger.info("training a tokenizer of %d pieces", train_size)
    texts = (decode_text(document, json_key) for path in paths for document, _ in read_documents(path))
    train_tokenizer(texts, train_size, model)
    return str(model)


def _carry_tokenizer(source: str, staged: Path, json_key: str) -> tuple[Encoding, str]:
    """Save the tokenizer beside the corpus; encode with what was saved, not with what was loaded."""
    from megatron.core.datasets.indexed_dataset import DType

    tokenizer = load_tokenizer(source)
    folder = f"{staged}.tokenizer"
    tokenizer.save_pretrained(folder)
    fingerprint = tokenizer_fingerprint(tokenizer)
    if tokenizer_fingerprint(load_tokenizer(folder)) != fingerprint:
        raise UserError(f"tokenizer {source} changes when it is saved and loaded: give its tokenizer.json folder")
    dtype = np.dtype(DType.optimal_dtype(max(tokenizer.get_vocab().values()) + 1)).name
    return Encoding(f"{folder}/tokenizer.json", tokenizer.eos_token_id, dtype, json_key), fingerprint


@functools.lru_cache(maxsize=1)
def _encoder(tokenizer_file: str) -> "Tokenizer":
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(tokenizer_file)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # an end token spelled out in a text does not end a document
    return tokenizer


# Encoding, in workers


def _start_worker() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _encode(encoding: Encoding, documents: list[RawDocument]) -> Encoded:
    """Encode documents; those without text or tokens are left out."""
    tokenizer = _encoder(encoding.tokenizer_file)
    texts = [decode_text(document, encoding.json_key) for document in documents]
    short = [text for text in texts if len(text) <= _WINDOW]
    encoded = iter(tokenizer.encode_batch_fast(short, add_special_tokens=False))
    end = np.array([encoding.end_id], dtype=encoding.dtype)
    pieces: list[np.ndarray] = []
    lengths: list[int] = []
    num_bytes = 0
    for text in texts:
        parts = [next(encoded).ids] if len(text) <= _WINDOW else _encode_long(tokenizer, text)
        count = sum(map(len, parts))
        if count:
            pieces += [*(np.asarray(part, dtype=encoding.dtype) for part in parts), end]
            lengths.append(count + 1)
            num_bytes += len(text.encode())
    return Encoded(np.concatenate(pieces) if pieces else end[:0], lengths, num_bytes)


def _encode_long(tokenizer: "Tokenizer", text: str) -> list[array]:
    """Encode a long text in overlapping windows: the ids of one pass, without its memory.

    Where two windows disagree on the tokens that begin just after their seam, the text has no
    place to cut, and it is encoded in one pass after all.
    """
    parts: list[array] = []
    expected: list[tuple[int, int]] | None = None  # (first character, id) after the seam, as the last window saw it
    for start in range(0, len(text), _WINDOW):
        low = max(0, start - _OVERLAP)
        encoding = tokenizer.encode(text[low : start + _WINDOW + _OVERLAP], add_special_tokens=False)
        ids, begins = encoding.ids, [low + begin for begin, _ in encoding.offsets]
        first, last = bisect_left(begins, start), bisect_left(begins, start + _WINDOW)
        if expected is not None and expected != _after(begins, ids, first, start):
            return [array("i", tokenizer.encode(text, add_special_tokens=False).ids)]
        expected = _after(begins, ids, last, start + _WINDOW)
        parts.append(array("i", ids[first:last]))  # a ninth of a list's memory
    return parts


def _after(begins: list[int], ids: list[int], first: int, seam: int) -> list[tuple[int, int]]:
    last = bisect_left(begins, seam + _OVERLAP // 2)
    return list(zip(begins[first:last], ids[first:last], strict=True))


# Writing


def _write_tokens(paths: list[Path], encoding: Encoding, workers: int, staged: Path, fingerprint: str) -> Corpus:
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{staged}.bin", dtype=np.dtype(encoding.dtype).type)
    # As lists these would take 70 bytes a document.
    builder.sequence_lengths, builder.document_indices = array("i"), array("q", [0])
    num_tokens = num_bytes = 0
    for encoded in _encode_all(paths, functools.partial(_encode, encoding), workers):
        for document in np.split(encoded.tokens, np.cumsum(encoded.lengths)[:-1]) if encoded.lengths else ():
            builder.add_document(torch.from_numpy(document), [len(document)])
        num_tokens += len(encoded.tokens)
        num_bytes += encoded.num_bytes
    if not num_tokens:
        raise UserError(f"--input {' '.join(map(str, paths))} holds no text: give files with text")
    num_documents = len(builder.sequence_lengths)
    builder.finalize(f"{staged}.idx")
    sha256 = {suffix: file_sha256(Path(f"{staged}{suffix}")) for suffix in (".bin", ".idx")}
    return Corpus(str(staged), staged.name, num_documents, num_tokens, num_bytes, fingerprint, sha256)


def _encode_all(paths: list[Path], encode: Callable[[list[RawDocument]], Encoded], workers: int) -> Iterator[Encoded]:
    """Yield the encoded chunks in order; a few a worker are in flight, however long the input."""
    context = multiprocessing.get_context("spawn")
    executor = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)
    try:
        pending = ((executor.submit(encode, chunk.documents), chunk.position) for chunk in read_chunks(paths))
        total = sum(path.stat().st_size for path in paths)
        yield from _reported(_in_order(pending, 2 * workers + 2), total)
    except BrokenProcessPool as error:
        raise UserError(f"a worker was killed, probably out of memory: use fewer than --workers {workers}") from error
    finally:
        executor.shutdown(cancel_futures=True)


def _in_order(submitted: Iterable[tuple["Future[Encoded]", int]], limit: int) -> Iterator[tuple[Encoded, int]]:
    pending: deque[tuple[Future[Encoded], int]] = deque()
    for item in submitted:
        pending.append(item)
        if len(pending) == limit:
            future, position = pending.popleft()
            yield future.result(), position
    for future, position in pending:
        yield future.result(), position


def _reported(results: Iterable[tuple[Encoded, int]], total: int) -> Iterator[Encoded]:
    """Pass results on; show a bar on a terminal, log a line now and then elsewhere."""
    start = reported = time.monotonic()
    done = 0
    with tqdm(total=total, unit="B", unit_scale=True, disable=None) as bar:
        for encoded, position in results:
            bar.update(position - done)
            done = position
            if bar.disable and time.monotonic() - reported > _LOG_SECONDS:
                reported = time.monotonic()
                rate = done / (reported - start)
                logger.info("read %.0f of %.0f MB, %.0f s left", done / 1e6, total / 1e6, (total - done) / rate)
            yield encoded


# Publishing

_PARTS = (".bin", ".idx", ".tokenizer")  # .json comes last: it makes the others a corpus


@contextlib.contextmanager
def _staging(output: Path) -> Iterator[Path]:
    """Yield the prefix to write under: in a folder of its own, locked while this process lives.

    Raises:
        UserError: something exists at ``output``, or another process is preparing it.
    """
    if not output.name:
        raise UserError(f"--output {output} names no file: give a prefix such as data/corpus")
    folder = output.with_name(f".{output.name}.preparing")
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        _lock(handle, output)
        try:
            _clear(folder, output)
            yield folder / output.name
        finally:
            shutil.rmtree(folder)
    finally:
        os.close(handle)


def _lock(handle: int, output: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"--output {output} is being prepared by another process: wait for it") from None
    except OSError as error:
        logger.warning("no locks here (%s): see that nothing else prepares %s", error, output)


def _clear(folder: Path, output: Path) -> None:
    """Remove what a killed attempt left; refuse anything else that exists."""
    if Path(f"{output}.json").exists():
        raise UserError(f"--output {output} exists ({output}.json): choose another, or remove it first")
    published = (folder / f"{output.name}.json").exists()  # so the parts at output are of that attempt
    for part in (Path(f"{output}{suffix}") for suffix in _PARTS):
        if part.exists() and not published:
            raise UserError(f"--output {output} would overwrite {part}: choose another, or remove it first")
        _remove(part)
    for leftover in sorted(folder.iterdir()):
        _remove(leftover)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _publish(corpus: Corpus, output: Path) -> None:
    """Put a staged corpus in place; at any instant it is there completely or has no PREFIX.json."""
    staged = Path(corpus.prefix)
    for path in [*staged.parent.rglob("*"), staged.parent]:
        _sync(path)
    description = Path(f"{staged}.json")
    description.write_text(describe(replace(corpus, prefix=str(output))) + "\n", encoding="utf-8")
    _sync(description)
    for suffix in _PARTS:
        os.replace(f"{staged}{suffix}", f"{output}{suffix}")
    _sync(output.parent)
    os.replace(description, f"{output}.json")
    _sync(output.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
