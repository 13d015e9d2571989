"""Encodes documents as tokens in batches: in this process, or in several if there are many documents.

Each process has its own tokenizer, since threads speed up only what is not Python. The batches are the same
as with one process, and the results come in their order, so the output does not depend on who did what.
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

_DOCUMENTS = 1024  # per batch, at most
_CHARACTERS = 2**20  # per batch, or a single document
_ALONE = 16 * 2**20  # characters up to which one process is enough
_EACH = 4 * 2**20  # characters per process for which starting it pays off
_SAY_EVERY = 10.0  # seconds


class Encoded(NamedTuple):
    """A document as tokens."""

    ids: Sequence[int]
    has_loss: Sequence[bool] | None
    """Which tokens are predicted; None: all, as in plain text, which may be cut into pieces."""
    unfound: int = 0
    """Turns of a conversation that should be predicted, but were not found among the tokens."""


Encode = Callable[[Sequence[Document]], Iterable[Encoded]]


class Part(NamedTuple):
    """Some documents, cut into pieces."""

    tokens: NDArray[np.unsignedinteger[Any]]
    has_loss: NDArray[np.bool_]
    """Like `tokens`, (n,)."""
    lengths: NDArray[np.int32]
    """Lengths of the consecutive pieces: (pieces,)."""
    sizes: NDArray[np.int32]
    """Lengths of the documents in tokens before they were cut: (documents,)."""
    truncated: int
    """Pairs and conversations that were truncated."""
    dropped: int
    """Those of which nothing to predict was left."""
    unfound: int
    """Those in which nothing to predict was found at all."""
    unfound_turns: int
    """Turns that were not found in the others."""


Cut = Callable[[Sequence[Document]], Part]


def parts(documents: Sequence[Document], cut: Cut, workers: int | None = None) -> Generator[Part]:
    """Apply `cut` to the documents in batches, in order; logs progress if it takes long.

    Args:
        cut: is pickled if several processes are used.
        workers: number of processes, 1 being this one; default: as many as there are cores, if the documents
            are worth it.

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
    """Ranges of documents with a limited number and size."""
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
    """The parts in order, made by other processes.

    One thread per process waits for its answers, and does nothing else. If this process is killed, the
    others find their pipe closed, and end; those of an executor would wait for ever.
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
    """A process that answers on a pipe; spawned, so that it inherits neither threads nor a GPU."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_answer, args=(theirs, cut), daemon=True)
    resource_tracker.ensure_running()  # started below, it would let SIGTERM and SIGINT through
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals.STATUS)
    try:
        process.start()  # it blocks signals that are meant for the training process
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    theirs.close()
    return process, ours


def _answer(connection: Connection, cut: Cut) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is one process per core
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            documents = connection.recv()
            try:
                answer: Part | StokerError = cut(documents)
            except StokerError as error:
                answer = error
            connection.send(answer)
