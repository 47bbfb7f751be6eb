"""Encoding of documents as tokens, in worker processes whose results are returned in order."""

import functools
import multiprocessing
import os
import signal
import threading
from array import array
from bisect import bisect_left
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from megatron_slm.data.corpus import Tally, add_label, counts
from megatron_slm.data.tokenizer import load_tokenizer
from megatron_slm.errors import UserError
from megatron_slm.io.progress import Meter
from megatron_slm.prepare.contamination import hash_ngrams
from megatron_slm.prepare.documents import Document, Fields, RawDocument, decode_document, token_mask
from megatron_slm.prepare.inputs import Chunk

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer
    from transformers import PreTrainedTokenizerFast

_WINDOW, _OVERLAP = 65_536, 4_096  # characters; documents longer than a window are encoded window by window


@dataclass(frozen=True)
class EncoderSettings:
    """The settings with which workers turn documents into tokens."""

    tokenizer_file: str
    end_id: int
    dtype: str
    fields: Fields
    evaluation_file: str | None = None  # .npy of the sorted n-grams to look for


@dataclass
class Group:
    """The documents of one corpus in a chunk, as tokens with end tokens."""

    pieces: list[np.ndarray] = field(default_factory=list)
    masks: list[np.ndarray] = field(default_factory=list)  # uint8, for the same tokens; empty if all of them count
    lengths: list[int] = field(default_factory=list)
    num_bytes: int = 0  # of the text that counts, in UTF-8
    sources: Tally = field(default_factory=dict)
    licenses: Tally = field(default_factory=dict)

    def add(self, document: Document, tokens: "Tokens") -> None:
        """Append a document."""
        count = counts(1, sum(map(len, tokens.pieces)), tokens.num_bytes)
        self.pieces += tokens.pieces
        self.masks += tokens.masks
        self.lengths.append(count["tokens"])
        self.num_bytes += count["bytes"]
        for tally, label in ((self.sources, document.source), (self.licenses, document.license)):
            if label is not None:
                add_label(tally, label, count)


class Tokens(NamedTuple):
    """The tokens of a document and its end token; no pieces if its text has no tokens."""

    pieces: list[np.ndarray]
    masks: list[np.ndarray]
    num_bytes: int  # of the text that counts


class Encoded(NamedTuple):
    """The result of encoding a chunk."""

    groups: dict[str, Group]  # by the value of the field ``by``; "" without one
    bad: list[UserError]  # one for each document that cannot be used
    found: np.ndarray | None  # indices in ``evaluation_file`` of the n-grams that occur in the chunk


def encode_documents(settings: EncoderSettings, raw: list[RawDocument]) -> Encoded:
    """Encode documents, and drop those without text or tokens."""
    bad: list[UserError] = []
    documents = list(_decode(raw, settings, bad))
    groups: dict[str, Group] = {}
    encode = _encode_answers if settings.fields.masked else _encode
    for document, tokens in zip(documents, encode(settings, documents), strict=True):
        if tokens.pieces:
            groups.setdefault(document.group, Group()).add(document, tokens)
    for group in groups.values():
        group.pieces = [np.concatenate(group.pieces)]
        group.masks = [np.concatenate(group.masks)] if group.masks else []
    return Encoded(groups, bad, _found(settings.evaluation_file, documents) if settings.evaluation_file else None)


@functools.lru_cache(maxsize=1)
def load_encoder(tokenizer_file: str, special_tokens: bool = False) -> "Tokenizer":
    """Load a tokenizer.json to encode whole texts, without truncation, padding or added tokens.

    Args:
        tokenizer_file: path of the tokenizer.json.
        special_tokens: treat a spelled-out special token as that token, as chat templates intend, and not as text.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(tokenizer_file)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.post_processor = None  # some exclude a token's leading space from its offsets
    tokenizer.encode_special_tokens = not special_tokens  # a spelled-out end token does not end a document
    return tokenizer


@functools.lru_cache(maxsize=1)
def _chat_tokenizer(tokenizer_file: str) -> "PreTrainedTokenizerFast":
    return load_tokenizer(str(Path(tokenizer_file).parent))


def _decode(raw: list[RawDocument], settings: EncoderSettings, bad: list[UserError]) -> Iterator[Document]:
    tokenizer = _chat_tokenizer(settings.tokenizer_file) if settings.fields.format == "messages" else None
    for one in raw:
        try:
            yield decode_document(one, settings.fields, tokenizer)
        except UserError as error:
            bad.append(error)


def _encode(settings: EncoderSettings, documents: list[Document]) -> Iterator[Tokens]:
    encoder = load_encoder(settings.tokenizer_file)
    end = np.array([settings.end_id], dtype=settings.dtype)
    texts = [document.text for document in documents]
    short = [text for text in texts if len(text) <= _WINDOW]
    encoded = iter(encoder.encode_batch_fast(short, add_special_tokens=False))
    for text in texts:
        parts = [next(encoded).ids] if len(text) <= _WINDOW else [*_encode_long(encoder, text)]
        pieces = [*(np.asarray(part, dtype=settings.dtype) for part in parts), end]
        yield Tokens(pieces if any(map(len, parts)) else [], [], len(text.encode()))


def _encode_answers(settings: EncoderSettings, documents: list[Document]) -> Iterator[Tokens]:
    """Encode prompt and answer in one pass, so that the tokens do not depend on where the answer begins."""
    encoder = load_encoder(settings.tokenizer_file, special_tokens=settings.fields.format == "messages")
    encoded = encoder.encode_batch([document.text for document in documents], add_special_tokens=False)
    for document, one in zip(documents, encoded, strict=True):
        yield _mask(settings, document, one) if one.ids else Tokens([], [], 0)


def _mask(settings: EncoderSettings, document: Document, encoded: "Encoding") -> Tokens:
    """Return the tokens and their mask. After an answer, the end token counts, but its bytes do not."""
    assert document.spans is not None
    ids, text = encoded.ids, document.text
    mask = token_mask([begin for begin, _ in encoded.offsets], document.spans)
    size = sum(len(text[first:last].encode()) for first, last in document.spans)
    ends = (place for place, index in enumerate(ids) if index == settings.end_id and mask[place])
    size -= sum(len(text[slice(*encoded.offsets[place])].encode()) for place in ends)
    if ids[-1] != settings.end_id:
        ids, mask = [*ids, settings.end_id], np.append(mask, np.uint8(document.spans[-1][1] == len(text)))
    return Tokens([np.array(ids, dtype=settings.dtype)], [mask], size)


def _encode_long(tokenizer: "Tokenizer", text: str) -> list["array[int]"]:
    """Encode a long text in overlapping windows, with the ids of one pass but less memory.

    If two windows disagree on the tokens just after their seam, encode the text in one pass.
    """
    parts: list[array[int]] = []
    expected: list[tuple[int, int]] | None = None  # (first character, id) after the seam, in the last window
    for start in range(0, len(text), _WINDOW):
        low = max(0, start - _OVERLAP)
        encoded = tokenizer.encode(text[low : start + _WINDOW + _OVERLAP], add_special_tokens=False)
        ids, begins = encoded.ids, [low + begin for begin, _ in encoded.offsets]
        first, last = bisect_left(begins, start), bisect_left(begins, start + _WINDOW)
        if expected is not None and expected != _after(begins, ids, first, start):
            return [array("i", tokenizer.encode(text, add_special_tokens=False).ids)]
        expected = _after(begins, ids, last, start + _WINDOW)
        parts.append(array("i", ids[first:last]))  # a ninth of a list's memory
    return parts


def _after(begins: list[int], ids: list[int], first: int, seam: int) -> list[tuple[int, int]]:
    last = bisect_left(begins, seam + _OVERLAP // 2)
    return list(zip(begins[first:last], ids[first:last], strict=True))


def _found(evaluation_file: str, documents: list[Document]) -> np.ndarray:
    evaluation = _evaluation(evaluation_file)
    hashes = np.concatenate([np.zeros(0, np.uint64), *(hash_ngrams(document.text) for document in documents)])
    places = np.searchsorted(evaluation, hashes).clip(max=len(evaluation) - 1)
    return np.unique(places[evaluation[places] == hashes])


@functools.lru_cache(maxsize=1)
def _evaluation(path: str) -> np.ndarray:
    hashes: np.ndarray = np.load(Path(path), mmap_mode="r", allow_pickle=False)
    return hashes


def encode_chunks(
    chunks: Iterable[Chunk], settings: EncoderSettings, workers: int, total_bytes: int
) -> Iterator[tuple[Encoded, Chunk]]:
    """Yield the encoded chunks in order; only a few per worker are in memory at a time.

    Args:
        chunks: the chunks of documents.
        settings: the settings of the encoder.
        workers: number of processes.
        total_bytes: bytes of all inputs, for the progress; 0 if unknown.

    Raises:
        UserError: a worker was killed.
    """
    context = multiprocessing.get_context("spawn")
    executor = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)
    encode = functools.partial(encode_documents, settings)
    try:
        # Keep no documents here: the executor drops its own reference once they are sent to a worker.
        pending = ((executor.submit(encode, chunk.documents), chunk._replace(documents=[])) for chunk in chunks)
        with Meter(total_bytes, "bytes") as meter:
            for encoded, chunk in _in_order(pending, 2 * workers + 2):
                meter.reach(chunk.position)
                yield encoded, chunk
    except BrokenProcessPool as error:
        main = "In a script, call this under `if __name__ == '__main__':`, because workers import the script"
        remedy = f"Use fewer workers if memory ran out. {main}"
        raise UserError("--workers", workers, "a worker was killed", remedy) from error
    finally:
        executor.shutdown(cancel_futures=True)


def _start_worker() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _in_order(submitted: Iterable[tuple["Future[Encoded]", Chunk]], limit: int) -> Iterator[tuple[Encoded, Chunk]]:
    pending: deque[tuple[Future[Encoded], Chunk]] = deque()
    for item in submitted:
        pending.append(item)
        if len(pending) == limit:
            future, chunk = pending.popleft()
            yield future.result(), chunk
    for future, chunk in pending:
        yield future.result(), chunk
