"""A checkpoint that an earlier version wrote, on two ranks, is read by this one, on any number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import shards_run
import torch
from stoker.checkpoint import manifest, store

import ranks

FORMATS = sorted((Path(__file__).parent / "golden").iterdir())
NEWEST = manifest.folder(FORMATS[-1], 3)


@pytest.mark.parametrize("golden", FORMATS, ids=lambda folder: folder.name)
def test_it_is_verified_and_read_by_one_process(golden: Path) -> None:
    checkpoint = manifest.verify(manifest.folder(golden, 3))
    assert (checkpoint.step, checkpoint.samples, checkpoint.metrics) == (3, 24, {"loss": 0.5})
    assert store.load_values(checkpoint) == shards_run.VALUES
    expected = shards_run.whole()
    found = {name: torch.empty(s, dtype=d) for name, (s, d) in store.shapes(checkpoint).items()}
    store.load_tensors(checkpoint, found)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("golden", FORMATS, ids=lambda folder: folder.name)
@pytest.mark.parametrize("size", [2, 3])
def test_it_is_read_by_several_ranks(size: int, golden: Path, tmp_path: Path) -> None:
    for found in ranks.run(shards_run.read, size, tmp_path, manifest.folder(golden, 3)):
        for name, tensor in shards_run.whole().items():
            assert torch.equal(found[name], tensor), name


def test_it_is_known_of_which_the_checksums_can_be_compared() -> None:
    found = {golden.name: manifest.is_determined(manifest.folder(golden, 3)) for golden in FORMATS}
    assert found == {f"format-{number}": number >= 5 for number in range(2, 7)}


def _content(folder: Path) -> dict[str, Any]:
    """The bytes of every file."""
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_two_ranks_still_write_the_same(tmp_path: Path) -> None:
    """Else the format has changed: then its number in the manifest must, and the old one stays readable."""
    ranks.run(shards_run.write, 2, tmp_path, tmp_path / "new")
    assert _content(manifest.folder(tmp_path / "new", 3)) == _content(NEWEST)
