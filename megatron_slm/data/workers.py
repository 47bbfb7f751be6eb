"""The processes that encode: a few chunks in flight, results in the order of the input, progress on the way."""

import functools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from megatron_slm.data.encoding import Encoded, Encoding, encode_documents
from megatron_slm.data.inputs import Chunk
from megatron_slm.data.progress import reported
from megatron_slm.errors import UserError


def encode_chunks(
    chunks: Iterable[Chunk], encoding: Encoding, workers: int, total_bytes: int
) -> Iterator[tuple[Encoded, Chunk]]:
    """Yield the encoded chunks in order; a few a worker are in flight, however long the input.

    Args:
        total_bytes: of all chunks, for the progress; 0 if unknown.

    Raises:
        UserError: a worker was killed.
    """
    context = multiprocessing.get_context("spawn")
    executor = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)
    encode = functools.partial(encode_documents, encoding)
    try:
        pending = ((executor.submit(encode, chunk.documents), _without_documents(chunk)) for chunk in chunks)
        results = _in_order(pending, 2 * workers + 2)
        yield from reported(((result, result[1].position) for result in results), total_bytes, "bytes")
    except BrokenProcessPool as error:
        raise UserError(
            f"a worker was killed: if memory ran out, use fewer than --workers {workers}; a script of your own must "
            "prepare under `if __name__ == '__main__':`, for workers import it"
        ) from error
    finally:
        executor.shutdown(cancel_futures=True)


def _without_documents(chunk: Chunk) -> Chunk:
    return chunk._replace(documents=[])  # the executor drops its own reference once they are sent


def _start_worker() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
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
