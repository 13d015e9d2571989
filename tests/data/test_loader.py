"""The loader: the same samples for every world, worker count and restart, and no draw from global state."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import random
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from stoker.data.loader import Loader, evaluation_batches
from stoker.errors import BadInput
from stoker.world import World
from torch.utils.data import DataLoader, IterableDataset, default_collate

Sample = dict[str, Any]


class Numbers:
    """`size` samples, each its own number."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> int:
        return index


class Augmented(Numbers):
    """Each sample with a draw from every generator."""

    tokens_per_sample = 12.5

    def __getitem__(self, index: int) -> Sample:  # type: ignore[override]
        drawn = [random.random(), float(np.random.rand()), float(torch.rand(()))]
        return {"index": index, "drawn": torch.tensor(drawn, dtype=torch.float64)}


class Jitter:
    """A transform with a generator of its own, beside one that it is given."""

    def __init__(self, given: random.Random) -> None:
        self.rng, self.given = np.random.default_rng(0), [given]

    def __call__(self) -> list[float]:
        return [self.rng.random(), self.given[0].random()]


class Own(Numbers):
    """Each sample with a draw from every generator that it holds."""

    def __init__(self, size: int, given: random.Random) -> None:
        super().__init__(size)
        self.legacy, self.of_torch = np.random.RandomState(0), torch.Generator()
        self.transforms = {"jitter": functools.partial(Jitter.__call__, Jitter(given))}

    def __getitem__(self, index: int) -> Sample:  # type: ignore[override]
        drawn = [
            *self.transforms["jitter"](),
            self.legacy.rand(),
            float(torch.rand((), generator=self.of_torch)),
        ]
        return {"index": index, "drawn": torch.tensor(drawn, dtype=torch.float64)}


def collate_with_noise(samples: list[int]) -> torch.Tensor:
    return torch.tensor(samples) + torch.rand(len(samples))


def loader(dataset: Numbers, batch_size: int = 4, world: World | None = None, **options: Any) -> Loader:
    return Loader(dataset, batch_size=batch_size, world=world or World(), seed=5, **options)


def take(batches: Iterator[Any], count: int) -> list[Any]:
    return list(islice(batches, count))


def flat(batches: list[Sample]) -> tuple[list[int], list[list[float]]]:
    return (
        [int(i) for batch in batches for i in batch["index"]],
        [row for batch in batches for row in batch["drawn"].tolist()],
    )


def states() -> tuple[Any, ...]:
    legacy: Any = np.random.get_state()
    return random.getstate(), legacy[1].tobytes(), legacy[2:], torch.get_rng_state().numpy().tobytes()


@pytest.mark.parametrize("size", [2, 4])
def test_the_global_batches_are_the_same_for_every_world(size: int) -> None:
    alone = take(loader(Numbers(11), batch_size=8).batches(0), 6)
    shares = [
        take(loader(Numbers(11), batch_size=8, world=World(rank, size)).batches(0), 6) for rank in range(size)
    ]
    together = [torch.cat(parts) for parts in zip(*shares, strict=True)]
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize(("samples", "warned"), [(7, True), (8, False)])
def test_a_dataset_smaller_than_a_batch_is_warned_of(
    samples: int, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    Loader(list(range(samples)), batch_size=8, world=World(), seed=0).warn_of_repeats()
    assert ("batch_size=8 is larger than an epoch of 7 samples" in caplog.text) == warned


def test_each_epoch_holds_each_sample_once_and_a_batch_may_span_two() -> None:
    seen = torch.cat(take(loader(Numbers(10)).batches(0), 5)).tolist()
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert seen[:10] != seen[10:]


def test_workers_and_restarts_change_no_sample_and_no_augmentation() -> None:
    here = flat(take(loader(Augmented(10)).batches(0), 8))
    worked = flat(take(loader(Augmented(10), workers=2).batches(0), 8))
    resumed = flat(take(loader(Augmented(10)).batches(12), 5))
    resumed_worked = flat(take(loader(Augmented(10), workers=1).batches(12), 5))
    assert worked == here
    assert resumed == resumed_worked == (here[0][12:], here[1][12:])
    assert len({tuple(drawn) for drawn in here[1]}) == 32  # another draw in each epoch


def test_generators_that_a_dataset_holds_are_seeded_for_each_sample_and_left_as_they_were() -> None:
    given = random.Random(3)
    before = given.getstate()
    dataset = Own(20, given)
    whole = flat(take(loader(dataset).batches(0), 11))
    assert flat(take(loader(dataset).batches(0), 11)) == whole
    assert given.getstate() == before
    assert dataset.legacy.rand() == np.random.RandomState(0).rand()
    for workers in (0, 2):
        again = loader(Own(20, random.Random(4)), workers=workers)
        assert flat(take(again.batches(12), 8)) == tuple(part[12:] for part in whole)
    _, drawn = whole
    assert all(len({row[at] for row in drawn}) == len(drawn) for at in range(4))  # the second epoch's too


class Lazy(Numbers):
    """Makes its generators when it reads its first sample, as each worker then does for itself."""

    rng: np.random.Generator | None = None

    def __getitem__(self, index: int) -> Sample:  # type: ignore[override]
        if self.rng is None:
            self.rng = np.random.default_rng()
        return {"index": index, "drawn": torch.tensor([self.rng.random(), random.random()])}


class ReadWithOwn(Lazy):
    """Is given a key, but draws from a generator that it holds."""

    def read(self, index: int, key: int) -> Sample:
        return self[index]


@pytest.mark.parametrize("kind", [Lazy, ReadWithOwn])
def test_a_generator_made_for_the_first_sample_gives_what_it_gives_after_a_restart(kind: type[Lazy]) -> None:
    before = random.getstate()
    _, drawn = flat(take(loader(kind(20), collate=collate_plainly).batches(0), 8))
    assert len({row[0] for row in drawn}) == 32
    for workers in (0, 1):
        again = loader(kind(20), collate=collate_plainly, workers=workers).batches(12)
        assert [row[0] for row in flat(take(again, 5))[1]] == [row[0] for row in drawn[12:]]
    assert random.getstate() == before


class Holding(Numbers):
    """Each sample with a draw from each of some functions, and from the global generators."""

    def __init__(self, *held: Any, draws: Any) -> None:
        super().__init__(20)
        self.held, self.draws = held, draws

    def __getitem__(self, index: int) -> Sample:  # type: ignore[override]
        drawn = [*(draw() for draw in self.draws), random.random(), float(np.random.rand())]
        return {"index": index, "drawn": torch.tensor(drawn, dtype=torch.float64)}


def test_generators_of_a_kind_give_different_numbers_than_each_other_and_the_global_one() -> None:
    of_numpy = [np.random.RandomState(1).rand for _ in range(2)]
    of_python = [random.Random(1).random for _ in range(2)]
    _, drawn = flat(take(loader(Holding(draws=[*of_numpy, *of_python])).batches(0), 5))
    assert len({number for row in drawn for number in row}) == 20 * 6


def test_a_transform_that_is_set_between_batches_is_seeded_as_one_that_was_there_before() -> None:
    late = Holding(draws=[])
    late.held = (Jitter(random.Random(1)),)
    batches = loader(late).batches(0)
    next(batches)
    late.draws = [np.random.default_rng(1).random, random.Random(1).random]
    whole = flat(take(batches, 3))
    early = Holding(draws=[np.random.default_rng(2).random, random.Random(2).random])
    assert flat(take(loader(early).batches(8), 2)) == (whole[0][4:], whole[1][4:])


@dataclass(slots=True)
class Slotted:
    rng: random.Random
    unset: int = field(init=False)


class Nested(Numbers):
    """Holds generators behind more data than is looked at."""

    def __init__(self) -> None:
        super().__init__(20)
        self.boxes = [[{"box": [1, 2]} for _ in range(60)] for _ in range(200)]
        self.by_number = dict(enumerate(self.boxes))
        self.slotted, self.deep = Slotted(random.Random()), [[[{"rng": random.Random()}]]]

    def __getitem__(self, index: int) -> Sample:  # type: ignore[override]
        drawn = [self.slotted.rng.random(), self.deep[0][0][0]["rng"].random()]
        return {"index": index, "drawn": torch.tensor(drawn)}


def test_generators_are_found_in_slots_and_beside_a_lot_of_nested_data() -> None:
    indices, drawn = flat(take(loader(Nested()).batches(0), 5))
    assert flat(take(loader(Nested()).batches(8), 3)) == (indices[8:], drawn[8:])


class Unconnected:
    """What raises for everything that is asked of it."""

    __slots__ = ()

    @property
    def __class__(self) -> Any:
        raise RuntimeError("not connected")

    @property
    def __dict__(self) -> Any:
        raise RuntimeError("not connected")

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError("not connected")


class Unread(Mapping[str, Any]):
    """A mapping whose values are read from a file."""

    def __getitem__(self, key: str) -> Any:
        raise FileNotFoundError(key)

    def __iter__(self) -> Iterator[str]:
        return iter("abc")

    def __len__(self) -> int:
        return 3


def test_what_a_dataset_holds_is_not_read_and_need_not_be_seedable() -> None:
    held = [Unconnected(), Unread(), random.SystemRandom()]
    for rng in (random.Random(), np.random.RandomState(np.random.PCG64(1))):
        drawn = flat(take(loader(Holding(*held, draws=[rng.random])).batches(0), 2))
        assert flat(take(loader(Holding(*held, draws=[rng.random])).batches(0), 2)) == drawn


def test_a_dataset_that_is_told_the_epoch_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    class Told(Numbers):
        def set_epoch(self, epoch: int) -> None: ...

    for dataset in (Numbers(8), Told(8)):
        loader(dataset).warn_of_set_epoch()
    assert [text.startswith("the dataset has a set_epoch") for text in caplog.messages] == [True]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_dataset_that_is_changed_while_workers_have_copies_is_warned_of(
    workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = Numbers(8)
    dataset.level, dataset._reads = 0, 0  # type: ignore[attr-defined]
    with contextlib.closing(loader(dataset, workers=workers).batches(0)) as batches:
        for step in range(4):
            next(batches)
            dataset._reads += 1  # type: ignore[attr-defined]
            dataset.level = step // 2  # type: ignore[attr-defined]
    said = "the loop has changed the dataset's level, but workers read from copies"
    assert caplog.text.count(said) == workers


def test_an_augmentation_does_not_depend_on_the_world() -> None:
    whole = flat(take(loader(Augmented(10)).batches(0), 3))
    first = flat(take(loader(Augmented(10), world=World(0, 2)).batches(0), 3))
    assert first[1][:2] == whole[1][:2]
    assert first[1][2:4] == whole[1][4:6]


@pytest.mark.parametrize("start", [0, 3, 8, 1000])
def test_resuming_at_any_sample_gives_the_tail(start: int) -> None:
    stream = torch.cat(take(loader(Numbers(7), batch_size=1).batches(0), start + 12))
    tail = torch.cat(take(loader(Numbers(7)).batches(start), 3))
    assert torch.equal(tail, stream[start:])


def test_resuming_far_away_reads_nothing_before_it() -> None:
    assert len(next(loader(Numbers(10**9)).batches(10**15))) == 4


@pytest.mark.parametrize("workers", [0, 2])
def test_loading_leaves_the_global_random_state_alone(workers: int) -> None:
    before = states()
    take(loader(Augmented(10), workers=workers).batches(0), 3)
    list(evaluation_batches(Augmented(10), 4, World()))
    assert states() == before


def test_the_global_random_state_does_not_reach_the_samples() -> None:
    first = flat(take(loader(Augmented(10)).batches(0), 3))
    torch.manual_seed(123)
    random.seed(4)
    np.random.seed(4)
    assert flat(take(loader(Augmented(10)).batches(0), 3)) == first


def test_a_random_collate_function_repeats_too() -> None:
    whole = take(loader(Numbers(10), collate=collate_with_noise).batches(0), 3)
    tail = take(loader(Numbers(10), collate=collate_with_noise).batches(4), 2)
    assert torch.equal(whole[1], tail[0])
    assert torch.equal(whole[2], tail[1])


def test_without_shuffling_samples_come_in_order() -> None:
    seen = torch.cat(take(loader(Numbers(5), shuffle=False).batches(2), 3)).tolist()
    assert seen == [2, 3, 4, 0, 1, 2, 3, 4, 0, 1, 2, 3]


def test_a_loader_says_what_an_epoch_is() -> None:
    counted = loader(Augmented(10))
    assert (counted.samples_per_epoch, counted.batch_size, counted.tokens_per_sample) == (10, 4, 12.5)
    assert loader(Numbers(3)).tokens_per_sample is None


@pytest.mark.parametrize(
    ("size", "batch_size", "ranks", "message"),
    [
        (0, 4, 1, "the dataset is empty"),
        (4, 0, 1, "batch_size=0: must be at least 1"),
        (4, 3, 2, "batch_size=3 is the total over 2 ranks: make it a multiple of 2"),
    ],
)
def test_what_cannot_be_loaded_is_refused(size: int, batch_size: int, ranks: int, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        loader(Numbers(size), batch_size=batch_size, world=World(0, ranks))


LENGTHS = [7 * n % 41 for n in range(40)]


def _by_length(world: World, **how: Any) -> Loader:
    return Loader(Numbers(40), batch_size=4, world=world, seed=1, lengths=LENGTHS, **how)


def test_batches_by_length_are_the_same_for_every_world_and_from_any_position() -> None:
    alone = [batch.tolist() for batch in islice(_by_length(World()).batches(0), 30)]
    of_ranks = [islice(_by_length(World(rank, 2)).batches(0), 30) for rank in range(2)]
    joined = [[*a.tolist(), *b.tolist()] for a, b in zip(*of_ranks, strict=True)]
    resumed = [batch.tolist() for batch in islice(_by_length(World(), workers=1).batches(4 * 13), 17)]
    assert alone == joined
    assert resumed == alone[13:]
    assert sorted(i for batch in alone[:10] for i in batch) == list(range(40))
    spread = [max(LENGTHS[i] for i in batch) - min(LENGTHS[i] for i in batch) for batch in alone[:10]]
    assert max(spread) < 8
    assert alone[:10] != alone[10:20]


@pytest.mark.parametrize(("stage", "share"), [(0, 1.0), (1, 1.0), (3, 0.6)])
def test_a_stage_by_length_has_all_samples_in_its_batches(stage: int, share: float) -> None:
    loader = Loader(Numbers(40), batch_size=3, world=World(), seed=1, lengths=LENGTHS, share=share)
    found = [i for batch in islice(loader.batches(0, stage=stage), 8) for i in batch.tolist()]
    assert len(set(found)) == 24


@pytest.mark.parametrize(
    ("lengths", "how", "said"),
    [
        ([1] * 39, {}, r"lengths must be 40 numbers, one per sample of the dataset, not int64 \(39,\)"),
        (["a"] * 40, {}, "lengths must be 40 numbers"),
        ([1] * 40, {"shuffle": False}, "lengths are for samples that are shuffled"),
    ],
)  # fmt: skip
def test_lengths_that_cannot_be_used_are_refused(lengths: Any, how: dict[str, Any], said: str) -> None:
    with pytest.raises(BadInput, match=said):
        Loader(Numbers(40), batch_size=4, world=World(), seed=1, lengths=lengths, **how)


def test_other_lengths_are_other_samples_for_the_ranks() -> None:
    loaders = [
        Loader(Numbers(3), batch_size=1, world=World(), seed=1, lengths=lengths)
        for lengths in (None, [1, 2, 3], [1, 2, 3], [3, 2, 1])
    ]
    none, first, same, other = (loader.fingerprint() for loader in loaders)
    assert first == same
    assert len({none, first, other}) == 3


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("samples", [1, 8, 13])
def test_evaluation_takes_each_sample_once_over_all_ranks(size: int, samples: int) -> None:
    world = [World(rank, size) for rank in range(size)]
    batches = [list(evaluation_batches(Numbers(samples), 4, w, workers=samples % 2)) for w in world]
    seen = [[i for batch, counts in rank if counts for i in batch.tolist()] for rank in batches]
    assert sorted(i for rank in seen for i in rank) == list(range(samples))
    assert all(rank == sorted(rank) for rank in seen)
    assert len({len(rank) for rank in batches}) == 1, "a sharded model is run by all ranks together"


class Keyed(Numbers):
    """Samples that are told their randomness."""

    def read(self, index: int, key: int) -> Sample:
        return {"index": index, "drawn": torch.tensor([key % 2**53], dtype=torch.float64)}


def collate_plainly(samples: list[Sample]) -> Any:
    return default_collate(samples)


@pytest.mark.parametrize("collate", [None, collate_plainly])
def test_a_dataset_that_takes_a_key_gets_one_of_its_own_for_every_epoch_and_sample(collate: Any) -> None:
    before = states()
    indices, drawn = flat(take(loader(Keyed(10), collate=collate).batches(0), 5))
    assert len({row[0] for row in drawn}) == 20
    later = flat(take(loader(Keyed(10), collate=collate, workers=1).batches(12), 2))
    assert later == (indices[12:], drawn[12:])
    assert states() == before


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_share_is_the_same_samples_in_every_epoch_and_part_of_a_larger_share(shuffle: bool) -> None:
    def of(share: float, epochs: int) -> list[int]:
        some = loader(Numbers(100), batch_size=10, share=share, shuffle=shuffle)
        assert some.samples_per_epoch == round(100 * share)
        return [int(i) for batch in take(some.batches(0), round(10 * share) * epochs) for i in batch]

    third, half, whole = set(of(0.3, 1)), set(of(0.5, 1)), set(of(1.0, 1))
    assert len(third) == 30
    assert third < half < whole
    assert sorted(of(0.3, 4)) == sorted([*third] * 4)
    assert sorted(third) != list(range(30)), "drawn, whether it is shuffled or not"
    assert (of(0.3, 1) == sorted(third)) != shuffle


def test_an_augmentation_does_not_depend_on_the_share() -> None:
    few = take(loader(Augmented(20), batch_size=10, share=0.5).batches(0), 1)
    all_of_them = take(loader(Augmented(20), batch_size=10).batches(0), 2)
    drawn = dict(zip(*map(tuple, flat(all_of_them)), strict=True))
    assert all(drawn[index] == row for index, row in zip(*flat(few), strict=True))


class Unreadable(Numbers):
    def __getitem__(self, index: int) -> int:
        raise BadInput(f"sample {index} cannot be read")


@pytest.mark.parametrize("workers", [0, 2])
def test_what_a_worker_cannot_read_is_said_as_by_the_process_that_trains(workers: int) -> None:
    batches = loader(Unreadable(8), shuffle=False, workers=workers).batches(0)
    with pytest.raises(BadInput) as refused:
        next(batches)
    assert str(refused.value) == "sample 0 cannot be read"


@pytest.mark.parametrize("dataset", ["Unreadable", "Broken"])
def test_no_worker_is_still_starting_when_an_error_is_raised(dataset: str) -> None:
    """It would print a traceback below the message of the process that trains, once that has ended."""
    before = set(multiprocessing.active_children())
    batches = loader(globals()[dataset](8), shuffle=False, workers=2).batches(0)
    with pytest.raises((BadInput, ZeroDivisionError)) as raised:
        take(batches, 2)
    assert raised.tb is not None
    assert set(multiprocessing.active_children()) <= before


class Broken(Numbers):
    """One of its samples raises."""

    def __getitem__(self, index: int) -> int:
        if index == 3:
            raise ZeroDivisionError("no such number")
        return super().__getitem__(index)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_says_which_sample_it_was_raised_for(workers: int) -> None:
    with pytest.raises(ZeroDivisionError) as raised:
        take(loader(Broken(8), workers=workers).batches(0), 2)
    assert "Raised for sample 3 of the dataset" in "".join(traceback.format_exception(raised.value))


def test_what_cannot_be_handed_to_workers_is_told_where_to_stand() -> None:
    class Local(Numbers):
        pass

    with pytest.raises(
        BadInput, match=r"^workers=2: .*Local.* at the top level of a file, .*, or use workers=0$"
    ):
        loader(Local(8), workers=2).batches(0)
    assert next(loader(Local(8), workers=0, shuffle=False).batches(0)).tolist() == [0, 1, 2, 3]


class Flowing(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(8))


class FlowingOfKnownLength(Flowing):
    def __len__(self) -> int:
        return 8


@pytest.mark.parametrize(
    ("dataset", "said"),
    [
        (Flowing(), "Flowing has no __len__, but"),
        (FlowingOfKnownLength(), "FlowingOfKnownLength is an IterableDataset, but"),
        (DataLoader([1, 2]), "DataLoader has no __getitem__, but"),  # type: ignore[arg-type]
        (iter([1, 2]), "list_iterator has no __len__ and no __getitem__, but"),
    ],
)
def test_what_is_not_read_by_index_is_refused_with_what_to_give(dataset: Any, said: str) -> None:
    with pytest.raises(BadInput, match=f"^{said} .*: give a dataset with __len__ and __getitem__"):
        loader(dataset)
    with pytest.raises(BadInput, match=f"^{said} "):
        next(evaluation_batches(dataset, 4, World()))
