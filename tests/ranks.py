"""Functions run by several ranks: real processes with gloo between them, forked from a warm server."""

from __future__ import annotations

import os
import pickle
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import warm
from servers import free_port


def run(
    function: Callable[..., Any],
    size: int,
    folder: Path,
    *arguments: Any,
    timeout: float = 180,
    **options: Any,
) -> list[Any]:
    """What `function(*arguments, **options)` returns on each of `size` ranks; None for one that was killed.

    The function is one of a module; ranks find each other by the variables that torchrun sets.
    """
    port = free_port()
    answers = [folder / f"answer-{port}-{rank}" for rank in range(size)]
    processes = [
        warm.process(_rank, function, arguments, options, rank, size, port, str(answers[rank]))
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout)
    alive = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for process in processes:
        process.kill()
    results = [pickle.loads(answer.read_bytes()) if answer.exists() else None for answer in answers]
    failures = [result for result in results if isinstance(result, _Failure)]
    if failures:
        first = min(failures, key=lambda failure: failure.at)
        raise AssertionError(f"{first.trace}") from first.error
    if alive:
        raise AssertionError(f"ranks {alive} did not end within {timeout} s")
    return [result[0] if result is not None else None for result in results]


class _Failure:
    def __init__(self, error: BaseException, trace: str, at: float) -> None:
        self.error, self.trace, self.at = error, trace, at


def _rank(
    function: Any,
    arguments: Any,
    options: Any,
    rank: int,
    size: int,
    port: int,
    answer: str,
) -> None:
    import time

    import torch

    torch.set_num_threads(1)
    if size > 1:
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size),
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_RUN_ID=str(port),
        )  # fmt: skip
    try:
        result: Any = (function(*arguments, **options),)
    except BaseException as error:
        at, trace = time.time(), traceback.format_exc()
        try:
            pickle.dumps(error)
        except Exception:
            error = RuntimeError(str(error))
        result = _Failure(error, trace, at)
    Path(answer + ".part").write_bytes(pickle.dumps(result))
    Path(answer + ".part").rename(answer)
    from stoker import distributed

    if not isinstance(result, _Failure):
        distributed.leave()
    os._exit(0)
