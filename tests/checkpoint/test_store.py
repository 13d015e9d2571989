"""Saving beside the loop: what was there when it was asked for, on disk whole, or not at all."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import shards_run
import torch
from safetensors import safe_open
from stoker.checkpoint import manifest, planning, shards, store
from stoker.checkpoint.store import About, Saver
from stoker.errors import StokerError, Stopped
from stoker.status import INTERRUPTED
from torch.distributed.checkpoint import state_dict_loader
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

import ranks


def _tensors() -> dict[str, torch.Tensor]:
    return {
        "weight": torch.arange(12.0).reshape(3, 4), "step": torch.tensor(7.0),
        "half": torch.ones(5, dtype=torch.bfloat16), "count": torch.tensor([1, 2]),
        "images": torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last),
    }  # fmt: skip


def _load(path: Path) -> dict[str, torch.Tensor]:
    checkpoint = manifest.verify(path)
    found = {n: torch.empty(s, dtype=d) for n, (s, d) in store.shapes(checkpoint).items()}
    store.load_tensors(checkpoint, found)
    return found


def test_a_checkpoint_is_what_was_there_when_it_was_asked_for(tmp_path: Path) -> None:
    done: list[manifest.Checkpoint] = []
    saver = Saver(tmp_path, done=done.append)
    tensors = _tensors()
    expected = {name: t.clone() for name, t in tensors.items()}
    saver.save(tensors, {"lr": 0.1}, About(3, 24, {"loss": 1.5}))
    for tensor in tensors.values():
        tensor.zero_()
    saver.wait()
    assert [(c.step, c.samples, c.metrics) for c in done] == [(3, 24, {"loss": 1.5})]
    found = _load(manifest.folder(tmp_path, 3))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    assert store.load_values(done[0]) == {"lr": 0.1}


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_torch_itself_reads_the_shards(tmp_path: Path) -> None:
    saver = Saver(tmp_path)
    saver.save(_tensors(), {}, About(1, 8))
    saver.wait()
    into: dict[str, Any] = {name: torch.zeros_like(t) for name, t in _tensors().items()}
    reader = HuggingFaceStorageReader(str(manifest.folder(tmp_path, 1)))
    state_dict_loader.load(into, storage_reader=reader, no_dist=True)
    assert torch.equal(into["weight"], _tensors()["weight"])
    with safe_open(next(manifest.folder(tmp_path, 1).glob("*.safetensors")), "pt") as opened:
        assert torch.equal(opened.get_tensor("weight"), _tensors()["weight"])


def test_the_same_tensors_give_the_same_bytes_in_whatever_order(tmp_path: Path) -> None:
    tensors = _tensors()
    for step in range(1, 5):
        tensors = dict(sorted(tensors.items(), reverse=step % 2 == 0))
        saver = Saver(tmp_path)
        saver.save(tensors, {}, About(step, 8))
        saver.wait()
    found = [manifest.sums(path) for path in manifest.committed(tmp_path)]
    assert found == [found[0]] * 4


def test_what_fails_behind_a_checkpoint_does_not_cost_it(tmp_path: Path) -> None:
    def fail(checkpoint: manifest.Checkpoint) -> None:
        manifest.prune(tmp_path, 1)
        raise OSError(errno.ENOSPC, "No space left on device")

    Saver(tmp_path).save(_tensors(), {}, About(1, 8))
    saver = Saver(tmp_path, done=fail)
    saver.save(_tensors(), {}, About(2, 16))
    with pytest.raises(OSError, match="No space left"):
        saver.wait()
    found, _ = manifest.newest(tmp_path)
    assert found is not None
    assert found.step == 2


def test_told_to_stop_while_a_checkpoint_is_loaded_it_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def told(*args: Any) -> None:
        raise Stopped(INTERRUPTED)

    saver = Saver(tmp_path)
    saver.save(_tensors(), {}, About(1, 8))
    saver.wait()
    monkeypatch.setattr(HuggingFaceStorageReader, "read_data", told)
    with pytest.raises(Stopped) as raised:
        _load(manifest.folder(tmp_path, 1))
    assert raised.value.status == INTERRUPTED


def test_one_rank_told_to_stop_while_all_load_stops_them_all(tmp_path: Path) -> None:
    saver = Saver(tmp_path)
    saver.save(shards_run.whole(), {}, About(1, 8))
    saver.wait()
    found = ranks.run(shards_run.read_and_be_told, 2, tmp_path, manifest.folder(tmp_path, 1))
    assert found == [INTERRUPTED, INTERRUPTED]


@pytest.mark.parametrize("name", ["rank-00000-999.safetensors", "a.safetensors"])
def test_a_shard_that_is_not_in_the_manifest_is_not_loaded(tmp_path: Path, name: str) -> None:
    saver = Saver(tmp_path)
    saver.save(_tensors(), {}, About(1, 8))
    saver.wait()
    path = manifest.folder(tmp_path, 1)
    part = planning.Part("weight", (1, 0))
    (other := tmp_path / "other").mkdir()
    (stray,) = shards.write(other, 0, [part], {"weight": torch.full((2, 4), 7.0)})
    (other / stray.path).rename(path / name)
    assert torch.equal(_load(path)["weight"], _tensors()["weight"])


def test_where_weights_are_averaged_the_averages_are_exported(tmp_path: Path) -> None:
    saver = Saver(tmp_path)
    state = {
        "model.weight": torch.zeros(2),
        "model.count": torch.ones(1),
        "ema.weight": torch.full((2,), 5.0),
    }
    saver.save(state, {}, About(1, 8))
    saver.wait()
    file = store.export_model(manifest.verify(manifest.folder(tmp_path, 1)), tmp_path / "a.safetensors")
    with safe_open(file, "pt") as opened:
        assert sorted(opened.keys()) == ["count", "weight"]
        assert opened.get_tensor("weight").tolist() == [5.0, 5.0]


def test_many_tensors_are_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "_FILE", 1000)
    tensors = {f"t{n}": torch.full((100,), float(n)) for n in range(7)}
    saver = Saver(tmp_path)
    saver.save(tensors, {}, About(1, 8))
    saver.wait()
    path = manifest.folder(tmp_path, 1)
    assert len(list(path.glob("*.safetensors"))) == 4
    assert all(torch.equal(t, tensors[name]) for name, t in _load(path).items())


def test_one_is_on_its_way_and_the_next_waits(tmp_path: Path) -> None:
    go = threading.Event()
    saver = Saver(tmp_path, before=lambda: go.wait(60) and None)
    saver.save(_tensors(), {}, About(1, 8))
    second = threading.Thread(target=lambda: saver.save(_tensors(), {}, About(2, 16)))
    second.start()
    second.join(0.3)
    assert second.is_alive()
    assert manifest.committed(tmp_path) == []
    go.set()
    second.join()
    saver.wait()
    assert [path.name for path in manifest.committed(tmp_path)] == ["step-00000001", "step-00000002"]


def _no_room() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_what_cannot_be_written_is_said_by_the_next_call_and_leaves_nothing(tmp_path: Path) -> None:
    full = [True]
    saver = Saver(tmp_path, before=lambda: _no_room() if full[0] else None)
    saver.save(_tensors(), {}, About(1, 8))
    with pytest.raises(OSError, match="No space left"):
        saver.save(_tensors(), {}, About(2, 16))
    assert not saver.failed, "it is said once"
    assert list(tmp_path.iterdir()) == []
    full[0] = False
    saver.save(_tensors(), {}, About(3, 24))
    saver.wait()
    assert [path.name for path in manifest.committed(tmp_path)] == ["step-00000003"]


def test_memory_for_copies_is_taken_once(tmp_path: Path) -> None:
    saver = Saver(tmp_path)
    tensors = _tensors()
    places = []
    for step in (1, 2):
        saver.save(tensors, {}, About(step, step))
        saver.wait()
        places.append({name: t.data_ptr() for name, t in saver._buffers._buffers.items()})
    assert places[0] == places[1]
    saver.save({**tensors, "new": torch.ones(2)}, {}, About(3, 3))
    saver.wait()
    assert "new" in _load(manifest.folder(tmp_path, 3))


_watch: Callable[[str], None] | None = None
"""Called with the path of each event of Python's audit, while a test wants it."""


def _audit(event: str, args: tuple[Any, ...]) -> None:
    if _watch is not None and event.startswith(("open", "os.")) and args and isinstance(args[0], str | Path):
        _watch(str(args[0]))


def test_a_run_that_is_deleted_during_a_save_is_said_to_be_gone_whatever_is_left_of_it(
    tmp_path: Path,
) -> None:
    """`rm -r`, and `mv` to another disk, remove the run's own directory last."""
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    checkpoints = tmp_path / "run" / "checkpoints"
    saver = Saver(checkpoints, before=lambda: shutil.rmtree(checkpoints))
    saver.save(_tensors(), {}, About(5, 40))
    with pytest.raises(StokerError, match="run is gone: it was moved or deleted during training"):
        saver.wait()


def test_a_run_that_is_moved_at_any_moment_of_a_save_is_said_to_be_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sys.addaudithook(_audit)  # it cannot be removed
    said: dict[Path, str] = {}
    for moment in itertools.count(1):
        run, seen = tmp_path / f"run-{moment}", itertools.count(1)
        (run / "checkpoints").mkdir(parents=True)

        def move(path: str, run: Path = run, seen: Iterator[int] = seen, moment: int = moment) -> None:
            if path.startswith(str(run)) and next(seen) == moment:
                run.rename(f"{run}-moved")

        with monkeypatch.context() as patch:
            patch.setattr(sys.modules[__name__], "_watch", move)
            saver = Saver(run / "checkpoints", done=lambda made: None)
            saver.save(_tensors(), {}, About(5, 40))
            try:
                saver.wait()
            except (OSError, StokerError) as error:
                said[run] = str(error)
        if run.exists():  # there was no such moment any more
            break
        assert run in said, moment
    assert len(said) > 5
    for run, text in said.items():
        assert text.startswith(f"{run} is gone: it was moved or deleted during training"), text
