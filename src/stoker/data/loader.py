"""The loader: this rank's share of each global batch, endless, from any sample position.

Which samples make up a batch is a pure function of (seed, position), see `order`. The randomness of an
augmentation is a function of (seed, epoch, sample): a dataset with `read(index, key)` receives a key
derived from them; for any other dataset, Python's, NumPy's and torch's CPU generators are seeded before each
sample is read. So are those that a dataset of either kind or its transforms hold. After the batch they are
restored. So the number of workers, ranks and restarts changes no sample, and loading never touches the global
random state.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import multiprocessing
import os
import pickle
import signal
import threading
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.context import BaseContext
from typing import Any, NoReturn, Protocol, TypeAlias, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from stoker import forkserver, signals
from stoker.data import chosen, generators, order
from stoker.data.order import fold
from stoker.errors import BadInput, StokerError
from stoker.words import counted
from stoker.world import World
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, default_collate, get_worker_info

log = logging.getLogger("stoker")

Collate: TypeAlias = Callable[[list[Any]], Any]
Pair: TypeAlias = tuple[int, int]  # epoch, dataset index
OrderAt: TypeAlias = Callable[[order.Positions], tuple[order.Positions, order.Positions]]

_COLLATE = 1  # salt: a collate function draws different numbers than the samples it joins
_EPOCHS = 2**16  # between the first epochs of two stages
_AHEAD = 512  # samples whose order is computed at once, which costs little more than for one


class MapDataset(Protocol):
    """A dataset that can be loaded: a number of samples, each read by its index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


@runtime_checkable
class TokenDataset(Protocol):
    """A dataset that knows its mean number of tokens per sample, so that durations can be given in tokens."""

    tokens_per_sample: float


@runtime_checkable
class KeyedDataset(Protocol):
    """A dataset that is given its randomness, and draws from no global generator."""

    def read(self, index: int, key: int, /) -> Any:
        """A sample; any randomness is a function of the key, a 64-bit number."""
        ...


class Loader:
    """Global batches of a map-style dataset, this rank's share of each.

    Args:
        batch_size: samples per global batch, over all ranks.
        world: determines whose share is loaded.
        seed: seed for the order and for augmentations.
        workers: processes that read samples; 0 reads in this process.
        collate: joins a list of samples into a batch; default: torch's `default_collate`.
        shuffle: whether each epoch is shuffled; otherwise samples come in the dataset's order. An
            `order.OrderedDataset` always has its own order.
        share: use only this share of the samples, drawn with the seed; a smaller share is a subset of a
            larger one.
        lengths: of each sample, in any unit: batches have samples of similar length, see `order.by_length`.

    Raises:
        BadInput: the dataset is empty or not read by index, the batch size cannot be divided among the
            ranks, a share is requested of a dataset that does not support it, or the lengths do not fit.
    """

    def __init__(
        self,
        dataset: MapDataset,
        *,
        batch_size: int,
        world: World,
        seed: int,
        workers: int = 0,
        collate: Collate | None = None,
        shuffle: bool = True,
        share: float = 1.0,
        lengths: Sequence[float] | None = None,
    ) -> None:
        _check(dataset, batch_size, world)
        self._lengths = None if lengths is None else _as_lengths(lengths, dataset, shuffle=shuffle)
        if share < 1 and isinstance(dataset, order.OrderedDataset):
            dataset, share = dataset.part(seed, share), 1.0
        self.batch_size = batch_size
        self.samples_per_epoch = max(1, round(len(dataset) * share))
        self.tokens_per_sample = dataset.tokens_per_sample if isinstance(dataset, TokenDataset) else None
        self._members: order.Positions | None = None
        """The samples that are used, if they are only a share, and not shuffled."""
        if not shuffle and self.samples_per_epoch < len(dataset):
            places = np.arange(self.samples_per_epoch)
            self._members = np.sort(order.drawn(seed, places, len(dataset)))
        self.workers = workers
        self._world = world
        self._order_seed = seed if shuffle else None
        self._dataset = _SeededDataset(dataset, seed, collate or default_collate)

    def __len__(self) -> int:
        """The steps of an epoch, rounded up: its last batch goes on with samples of the next."""
        return math.ceil(self.samples_per_epoch / self.batch_size)

    def __iter__(self) -> NoReturn:
        raise BadInput(
            "a loader has no end and no position of its own: iterate with "
            "`for batch in trainer.steps(loader, epochs=...)`, which resumes where the run stopped"
        )

    def batches(self, start_sample: int, place: Any = None, *, stage: int = 0) -> Iterator[Any]:
        """This rank's share of each global batch from a global sample position on, without end.

        Args:
            stage: which pass through the data from the start this is. Each has its own order and
                augmentations, unless the dataset has its own order.
            place: what `place` returned for this position, for a dataset with its own order. One that is of
                other data (see `knows`) is ignored, and the position is found from the start.
        """
        if not isinstance(self._dataset.dataset, order.OrderedDataset):
            start_sample += stage * _EPOCHS * self.samples_per_epoch
        if self.knows(place):
            order.go_to(self._dataset.dataset, place)
        sampler = _Shares(self._order_from(start_sample), start_sample, self.batch_size, self._world)
        found = _batches(self._dataset, sampler, self.workers)
        return self._watched(found) if self.workers else found

    def _order_from(self, start: int) -> OrderAt:
        """The order of the samples, with a batch that begins at a position."""
        size = self.samples_per_epoch
        if self._members is not None:
            return functools.partial(order.in_sequence, self._members)
        if self._lengths is None or self._order_seed is None:
            return functools.partial(order.order_of, self._dataset.dataset, self._order_seed, size=size)
        return functools.partial(
            order.by_length, self._lengths, self._order_seed,
            batch_size=self.batch_size, size=size, start=start % self.batch_size,
        )  # fmt: skip

    def _watched(self, found: Generator[Any]) -> Iterator[Any]:
        """The batches; warns, once, if the loop changes what the workers have copies of."""
        began, said = chosen.settings(self._dataset.dataset), False
        with contextlib.closing(found):
            for batch in found:
                now = began if said else chosen.settings(self._dataset.dataset)
                changed = [name for name, value in began.items() if now.get(name, value) != value]
                if changed:
                    said = True
                    log.warning(
                        "the loop has changed the dataset's %s, but workers read from copies that were made "
                        "when the loop began: use workers=0, or a loop for each stage",
                        ", ".join(changed),
                    )  # fmt: skip
                yield batch

    def fingerprint(self) -> str:
        """Of which samples the dataset is made, see `chosen.fingerprint`, and of their lengths."""
        return chosen.fingerprint(self._dataset.dataset, self._lengths)

    def warn_of_set_epoch(self) -> None:
        """Warn if a dataset is to be told the epoch, which reaches no worker, and is lost on a resume."""
        if callable(getattr(self._dataset.dataset, "set_epoch", None)):
            log.warning(
                "the dataset has a set_epoch, but workers read ahead with copies of it, and a resumed run is "
                "within an epoch: random numbers differ by epoch without it. If it needs more, give "
                "it read(index, key), where key is a number of its own for each sample of each epoch"
            )

    def warn_of_repeats(self) -> None:
        """Warn if an epoch has fewer samples than a batch, so that a batch repeats samples."""
        if self.samples_per_epoch < self.batch_size:
            log.warning(
                "batch_size=%d is larger than an epoch of %s: every batch contains samples several times, "
                "and an epoch is less than a step; use batch_size=%d or less, or more data",
                self.batch_size, counted(self.samples_per_epoch, "sample"), self.samples_per_epoch,
            )  # fmt: skip

    def knows(self, place: Any) -> bool:
        """Whether a saved place can be of this data: streamed or not, and of as many sources, as it is."""
        return place is None or order.knows(self._dataset.dataset, place)

    def place(self, sample: int) -> Any:
        """What a dataset with its own order needs to find a sample's position again; else None."""
        return order.place_of(self._dataset.dataset, self._order_seed, sample)


def evaluation_batches(
    dataset: MapDataset, batch_size: int, world: World, collate: Collate | None = None, workers: int = 0
) -> Iterator[tuple[Any, int]]:
    """This rank's share of a dataset in order, each sample exactly once over all ranks.

    Every rank gets the same number of batches, since all ranks run a sharded model together: a rank for
    which the last global batch has no samples gets the first sample of that batch, which does not count.

    Args:
        batch_size: samples per batch over all ranks; the last batch is smaller.
        workers: processes that read samples; any number gives the same batches.

    Yields:
        The batch, and how many samples of it count: all or none.

    Raises:
        BadInput: as for `Loader`.
    """
    _check(dataset, batch_size, world)
    seeded = _SeededDataset(dataset, 0, collate or default_collate)
    share = batch_size // world.size
    begins = range(0, len(dataset), batch_size)
    own = [range(b + world.rank * share, min(b + (world.rank + 1) * share, len(dataset))) for b in begins]
    pairs = [[(0, i) for i in indices or [b]] for indices, b in zip(own, begins, strict=True)]
    for batch, indices in zip(_batches(seeded, pairs, min(workers, len(pairs))), own, strict=True):
        yield batch, len(indices)


def _batches(dataset: _SeededDataset, sampler: Iterable[list[Pair]], workers: int) -> Generator[Any]:
    loader = DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=_as_is,
        num_workers=workers,
        multiprocessing_context=_worker_context() if workers else None,
        worker_init_fn=_end_with_trainer,
        pin_memory=torch.cuda.is_available(),  # so that copies to the GPU overlap with its work
        generator=torch.Generator(),  # otherwise the iterator draws a seed from the global state
    )
    try:
        with warnings.catch_warnings():  # torch recommends a different start method, which can deadlock here
            warnings.filterwarnings("ignore", "Got pickle error")
            read = iter(loader)
    except (pickle.PicklingError, AttributeError, TypeError) as error:  # which one depends on Python
        raise BadInput(
            f"workers={workers}: the dataset or collate cannot be sent to other processes ({error}): define "
            "their classes and functions at the top level of a file, leave out what is open (a file, a "
            "connection) in __getstate__ and open it again where it is needed, or use workers=0"
        ) from error
    return _answers(read)


@dataclass(frozen=True)
class _Refused:
    """A BadInput from a worker. DataLoader would append its message to a worker's traceback."""

    error: StokerError


def _answers(read: Iterator[Any]) -> Generator[Any]:
    """The batches; before an error is raised, the workers are ended.

    Those that are still starting would otherwise not find what this process shares with them once it exits,
    and print a traceback below its message.
    """
    try:
        for batch in read:
            if isinstance(batch, _Refused):
                raise batch.error
            yield batch
    except Exception:
        getattr(read, "_shutdown_workers", lambda: None)()  # which reading without workers does not have
        raise


def _check(dataset: MapDataset, batch_size: int, world: World) -> None:
    _check_indexed(dataset)
    if len(dataset) == 0:
        raise BadInput("the dataset is empty")
    if batch_size < 1:
        raise BadInput(f"batch_size={batch_size}: must be at least 1")
    if batch_size % world.size:
        raise BadInput(
            f"batch_size={batch_size} is the total over {world.size} ranks: "
            f"make it a multiple of {world.size}"
        )


def _as_lengths(lengths: Sequence[float], dataset: MapDataset, *, shuffle: bool) -> NDArray[Any]:
    """The lengths as an array, (samples,). Raises BadInput."""
    found = np.asarray(lengths)
    if found.shape != (len(dataset),) or found.dtype.kind not in "iuf":
        raise BadInput(
            f"lengths must be {len(dataset)} numbers, one per sample of the dataset, not "
            f"{found.dtype} {found.shape}"
        )
    if not shuffle or isinstance(dataset, order.OrderedDataset):
        raise BadInput("lengths are for samples that are shuffled, but these have an order of their own")
    return found


def _check_indexed(dataset: object) -> None:
    """Raises BadInput for iterable datasets, whose samples cannot be found again by an index."""
    missing = [name for name in ("__len__", "__getitem__") if not hasattr(type(dataset), name)]
    if not missing and not isinstance(dataset, IterableDataset):
        return
    why = f"has no {' and no '.join(missing)}" if missing else "is an IterableDataset"
    raise BadInput(
        f"{type(dataset).__name__} {why}, but a loader reads samples by index, so that a run can resume at "
        "any position: give a dataset with __len__ and __getitem__, such as list(dataset) for a small one; "
        "or for endless data one that makes the sample of an index, with a length such as 10**12"
    )


def _worker_context() -> BaseContext:
    """Forkserver: a fork of this process, which has threads, can deadlock; a spawn imports torch again."""
    forkserver.start([__name__])
    return multiprocessing.get_context("forkserver")


def _end_with_trainer(worker: int) -> None:
    """End this worker when the training process is gone, killed or not, or tells it to; ignore signals.

    A scheduler signals workers too, and the training process needs them for its checkpoint. torch's own
    watchdog watches the parent by process id, but that is the forkserver, which lives as long as a worker
    does.
    """
    trainer = multiprocessing.parent_process()
    assert trainer is not None
    signal.pthread_sigmask(signal.SIG_BLOCK, signals.STATUS)

    def hear() -> None:
        while signal.sigwaitinfo(signals.STATUS).si_pid != trainer.pid:
            pass
        os._exit(0)

    def wait() -> None:
        trainer.join()
        os._exit(1)

    for watch in (hear, wait):
        threading.Thread(target=watch, name=f"{watch.__name__}-trainer", daemon=True).start()


def _as_is(batch: Any) -> Any:
    return batch


class _Shares(Sampler[list[Pair]]):
    """One rank's samples of each global batch, as (epoch, index) pairs."""

    def __init__(
        self,
        order_at: OrderAt,
        start: int,
        batch_size: int,
        world: World,
    ) -> None:
        self._order_at = order_at
        self._step = batch_size
        self._share = batch_size // world.size
        self._start = start + world.rank * self._share

    def __iter__(self) -> Iterator[list[Pair]]:
        ahead = max(1, _AHEAD // self._share)  # batches whose order is computed at once
        within = np.arange(self._share)
        position = self._start
        while True:
            begins = position + self._step * np.arange(ahead)
            positions = (begins[:, None] + within).ravel()
            epochs, indices = self._order_at(positions)
            pairs = list(zip(epochs.tolist(), indices.tolist(), strict=True))
            for begin in range(0, len(pairs), self._share):
                yield pairs[begin : begin + self._share]
            position += self._step * ahead


class _SeededDataset(Dataset[Any]):
    """Reads and joins the samples of a batch, each with its own randomness."""

    def __init__(self, dataset: MapDataset, seed: int, collate: Collate) -> None:
        self.dataset, self._seed, self._collate = dataset, seed, collate
        self._draws = not (isinstance(dataset, KeyedDataset) and collate is default_collate)
        self._own: list[generators.Salted] = []
        """The generators that the dataset and `collate` hold."""
        self._has_read = False

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, pair: Pair) -> Any:
        with self._random_state_kept():
            return self._read([pair])[0]

    def __getitems__(self, pairs: list[Pair]) -> Any:
        """The batch of these samples. DataLoader calls this instead of `__getitem__` for each sample."""
        try:
            return self._join(pairs)
        except StokerError as error:
            if get_worker_info() is None:
                raise
            return _Refused(error)

    def _join(self, pairs: list[Pair]) -> Any:
        with self._random_state_kept():
            samples = self._read(pairs)
            if self._draws:
                self._seed_all(int(fold(self._seed, *pairs[0], _COLLATE)[0]))
            return self._collate(samples)

    def _read(self, pairs: list[Pair]) -> list[Any]:
        epochs, indices = np.array(pairs).T
        keys = fold(self._seed, epochs, indices).tolist()
        samples = []
        for key, (_, index) in zip(keys, pairs, strict=True):
            try:
                sample = self._read_seeded(index, key)
                if not self._has_read and self._finds_others():  # made for the first sample, with other seeds
                    sample = self._read_seeded(index, key)
            except Exception as error:
                error.add_note(f"Raised for sample {index} of the dataset.")
                raise
            self._has_read = True
            samples.append(sample)
        return samples

    def _read_seeded(self, index: int, key: int) -> Any:
        if isinstance(self.dataset, KeyedDataset):
            generators.seed(self._own, key)
            return self.dataset.read(index, key)
        self._seed_all(key)
        return self.dataset[index]

    @contextmanager
    def _random_state_kept(self) -> Iterator[None]:
        """Restore the random state of the training process; in a worker nobody else uses it."""
        self._finds_others()
        if get_worker_info() is not None:
            yield
            return
        with generators.kept([*(generators.GLOBAL if self._draws else ()), *self._own]):
            yield

    def _finds_others(self) -> bool:
        """Look again for the generators that the dataset and `collate` hold; whether there are new ones."""
        before = {id(generator) for generator, _ in self._own}
        self._own = generators.of((self.dataset, self._collate))
        return any(id(generator) not in before for generator, _ in self._own)

    def _seed_all(self, key: int) -> None:
        generators.seed([*generators.GLOBAL, *self._own], key)
