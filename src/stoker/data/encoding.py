"""Documents as tokens, a batch at a time: in this process, or in several where there are many documents.

Each process has a tokenizer of its own, since threads help only what of it is not Python. The batches are
those that one process would encode, and their answers come in their order: what comes out does not depend
on who did what.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import queue
import signal
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from stoker import signals
from stoker.data.documents import Document
from stoker.errors import StokerError

log = logging.getLogger("stoker")

_DOCUMENTS = 1024  # of a batch, at most
_CHARACTERS = 2**20  # of a batch, or one document
_ALONE = 16 * 2**20  # characters that one process encodes sooner than several are started
_EACH = 4 * 2**20  # characters for which another process pays
_SAY_EVERY = 10.0  # seconds


class Encoded(NamedTuple):
    """A document as tokens."""

    ids: Sequence[int]
    has_loss: Sequence[bool] | None
    """Which tokens are to be predicted; None: all, as of a plain text, which may be cut into pieces."""


Encode = Callable[[Sequence[Document]], Iterable[Encoded]]


class Part(NamedTuple):
    """Some documents, cut into pieces."""

    tokens: NDArray[np.unsignedinteger[Any]]
    has_loss: NDArray[np.bool_]
    """As `tokens`, (n,)."""
    lengths: NDArray[np.int32]
    """Of the pieces, which follow one another: (pieces,)."""
    sizes: NDArray[np.int32]
    """Of the documents before they were cut, in tokens: (documents,)."""
    truncated: int
    """Pairs and conversations that were cut off."""
    dropped: int
    """Those of which nothing to be predicted is left then."""
    unfound: int
    """Those in which nothing to be predicted was found at all."""


Cut = Callable[[Sequence[Document]], Part]


def parts(documents: Sequence[Document], cut: Cut, workers: int | None = None) -> Generator[Part]:
    """What `cut` makes of some documents at a time, in their order; says how far it is, where it takes long.

    Args:
        cut: is pickled, where several processes do it.
        workers: how many, 1 being this one; by default as many as there are cores, where the documents are
            worth it.

    Raises:
        StokerError: one of the processes ended.
    """
    characters = [_size(document) for document in documents]
    total = sum(characters)
    workers = workers or _paying(total)
    batches = list(_batches(characters))
    found: Iterator[Part] = map(cut, (documents[b.start : b.stop] for b in batches))
    with contextlib.ExitStack() as stack:
        if workers > 1:
            found = stack.enter_context(_by_several(documents, batches, cut, min(workers, len(batches))))
        began = said = time.monotonic()
        done = 0
        for batch, part in zip(batches, found, strict=True):
            yield part
            done += sum(characters[batch.start : batch.stop])
            now = time.monotonic()
            if now - said > _SAY_EVERY:
                said = now
                left = (now - began) / done * (total - done)
                log.info("tokenised %.0f%%, %.0f s left", 100 * done / total, left)


def _size(document: Document) -> int:
    said = sum(len(message.content) + len(message.more) for message in document.messages)
    return len(document.tools) + len(document.system) + len(document.prompt) + len(document.text) + said


def _paying(characters: int) -> int:
    if characters < _ALONE:
        return 1
    return max(1, min(len(os.sched_getaffinity(0)), characters // _EACH))


def _batches(characters: Sequence[int]) -> Iterator[range]:
    """Ranges of documents of some number and size."""
    begin = size = 0
    for number, count in enumerate(characters):
        if number > begin and (number - begin == _DOCUMENTS or size + count > _CHARACTERS):
            yield range(begin, number)
            begin, size = number, 0
        size += count
    if begin < len(characters):
        yield range(begin, len(characters))


@contextlib.contextmanager
def _by_several(
    documents: Sequence[Document], batches: Sequence[range], cut: Cut, workers: int
) -> Iterator[Iterator[Part]]:
    """The parts in their order, made by other processes.

    A thread waits for each of them, which is all that it does. Where this process is killed they find their
    pipe closed, and end; an executor's would wait for ever.
    """
    started = [_start(cut) for _ in range(workers)]
    idle: queue.SimpleQueue[tuple[SpawnProcess, Connection]] = queue.SimpleQueue()
    for pair in started:
        idle.put(pair)

    def ask(batch: range) -> Part:
        process, connection = idle.get()
        try:
            connection.send(documents[batch.start : batch.stop])
            answer = connection.recv()
        except (EOFError, OSError) as error:
            process.join()
            raise StokerError(
                f"a tokenising process ended with exit code {process.exitcode}: if memory ran out, free "
                "some, or train with streaming=true"
            ) from error
        finally:
            idle.put((process, connection))
        if isinstance(answer, StokerError):
            raise answer
        assert isinstance(answer, Part)
        return answer

    pool = ThreadPoolExecutor(workers, "tokenise")
    try:
        yield _in_order(pool, ask, batches, 2 * workers)
    finally:
        pool.shutdown(cancel_futures=True)
        for _, connection in started:
            connection.close()
        for process, _ in started:
            process.join()


def _in_order(
    pool: ThreadPoolExecutor, ask: Callable[[range], Part], batches: Sequence[range], ahead: int
) -> Iterator[Part]:
    asked: deque[Future[Part]] = deque()
    for batch in batches:
        asked.append(pool.submit(ask, batch))
        if len(asked) > ahead:
            yield asked.popleft().result()
    while asked:
        yield asked.popleft().result()


def _start(cut: Cut) -> tuple[SpawnProcess, Connection]:
    """A process that answers on a pipe; spawned, so that neither threads nor a GPU are in it."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_answer, args=(theirs, cut), daemon=True)
    resource_tracker.ensure_running()  # which would let SIGTERM and SIGINT through, were it to start below
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (*signals.ENDED_BY, signal.SIGINT))
    try:
        process.start()  # it holds back what is meant for the process that trains
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    theirs.close()
    return process, ours


def _answer(connection: Connection, cut: Cut) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is a process for each core
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            documents = connection.recv()
            try:
                answer: Part | StokerError = cut(documents)
            except StokerError as error:
                answer = error
            connection.send(answer)
