"""What a dataset says of the samples that it is made of, and of what it is set to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import subset_run
import torch
from stoker import BadInput
from stoker.data import chosen
from torch.utils.data import ConcatDataset, Subset, TensorDataset

import ranks


def _numbers(count: int = 9) -> TensorDataset:
    return TensorDataset(torch.arange(count))


def test_subsets_are_told_apart_by_their_indices() -> None:
    data = _numbers()
    made: list[Any] = [
        data, _numbers(8), Subset(data, [0, 1, 2]), Subset(data, [0, 2, 1]),
        Subset(Subset(data, [3, 4, 5]), [0, 1]), Subset(Subset(data, [5, 4, 3]), [0, 1]),
        ConcatDataset([data, Subset(data, [1])]), ConcatDataset([data, Subset(data, [2])]),
    ]  # fmt: skip
    assert len({chosen.fingerprint(one) for one in made}) == len(made)


def test_the_same_indices_are_the_same_subset_whatever_they_are_kept_in() -> None:
    indices: list[Any] = [[2, 0, 5], (2, 0, 5), np.array([2, 0, 5], np.int32), torch.tensor([2, 0, 5])]
    assert len({chosen.fingerprint(Subset(_numbers(), one)) for one in indices}) == 1
    assert chosen.fingerprint(Subset(_numbers(), ["a"])) != chosen.fingerprint(Subset(_numbers(), ["b"]))  # type: ignore[list-item]


def test_a_selection_of_datasets_is_told_apart() -> None:
    data = datasets.Dataset.from_dict({"x": list(range(9))})
    shuffled = [data.shuffle(seed=seed) for seed in (1, 1, 2)]
    first, same, other = map(chosen.fingerprint, shuffled)
    assert first == same != other


class _Grown:
    def __init__(self) -> None:
        self.level, self.name, self.scale, self._reads = 0, "a", 1.5, 0
        self.inner = TensorDataset(torch.arange(3))
        self.transform = _Crop()

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> int:
        return index


class _Crop:
    def __init__(self) -> None:
        self.size = 8


def test_settings_are_public_numbers_and_texts_also_of_what_is_inside() -> None:
    assert chosen.settings(Subset(_Grown(), [0])) == {  # type: ignore[arg-type]
        "dataset.level": 0, "dataset.name": "a", "dataset.scale": 1.5, "dataset.transform.size": 8,
    }  # fmt: skip


class _Lazy:
    def __getattribute__(self, name: str) -> Any:
        raise OSError(f"opened for {name}")


class _Holder(_Crop):
    def __init__(self) -> None:
        super().__init__()
        self.opened_later = _Lazy()

    def __len__(self) -> int:
        return 3

    def __getattr__(self, name: str) -> Any:
        raise OSError(f"opened for {name}")


def test_a_dataset_is_looked_at_without_its_own_code() -> None:
    assert chosen.settings(_Holder()) == {"size": 8}
    assert chosen.fingerprint(_Holder()) == chosen.fingerprint(_Holder())


def test_ranks_that_draw_other_subsets_are_refused(tmp_path: Path) -> None:
    assert ranks.run(subset_run.train, 2, tmp_path, tmp_path / "seeded", seeded=True) == [4, 4]
    with pytest.raises(AssertionError) as raised:
        ranks.run(subset_run.train, 2, tmp_path, tmp_path / "drawn", seeded=False)
    assert isinstance(raised.value.__cause__, BadInput)
    assert "the ranks have different samples for this loop" in str(raised.value.__cause__)
