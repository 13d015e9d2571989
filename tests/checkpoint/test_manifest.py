from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import orjson
import pytest
from stoker.checkpoint import manifest
from stoker.object_store import Unreachable


def _save(checkpoints: Path, step: int, content: bytes = b"weights") -> Path:
    path = manifest.folder(checkpoints, step)
    manifest.begin(path)
    file = path / "shard.safetensors"
    file.write_bytes(content)
    manifest.commit(path, [manifest.File.of(file)], step=step, samples=step * 8, world_size=1)
    return path


def test_the_newest_valid_one_is_found(tmp_path: Path) -> None:
    for step in (20, 100, 40):
        _save(tmp_path, step)
    found, passed_over = manifest.newest(tmp_path)
    assert found is not None
    assert (found.step, found.samples) == (100, 800)
    assert passed_over == []


def _no_manifest(path: Path) -> None:
    (path / manifest.NAME).unlink()


def _torn_manifest(path: Path) -> None:
    file = path / manifest.NAME
    file.write_bytes(file.read_bytes()[:-10])


def _rewritten(path: Path, **said: object) -> None:
    """What a program could have written: with the checksum that goes with it."""
    content = {**orjson.loads((path / manifest.NAME).read_bytes()), **said}
    content["xxh3"] = manifest._checksum(content)
    (path / manifest.NAME).write_bytes(orjson.dumps(content))


def _file_elsewhere(path: Path) -> None:
    _rewritten(path, files=[{"path": "../shard.safetensors", "size": 7, "xxh3": "0"}])


def _of_another_step(path: Path) -> None:
    _rewritten(path, step=60)


def _without_files(path: Path) -> None:
    _rewritten(path, files=[])


def _without_metrics(path: Path) -> None:
    _rewritten(path, metrics=None)


def _empty(path: Path) -> None:
    for file in path.iterdir():
        file.unlink()


def _missing_shard(path: Path) -> None:
    (path / "shard.safetensors").unlink()


def _truncated_shard(path: Path) -> None:
    (path / "shard.safetensors").write_bytes(b"weigh")


def _flipped_bit(path: Path) -> None:
    (path / "shard.safetensors").write_bytes(b"weighus")


def _other_format(path: Path) -> None:
    (path / manifest.NAME).write_bytes(orjson.dumps({"format": 99}))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (_file_elsewhere, "outside its directory"), (_of_another_step, "is for step 60"),
        (_without_files, "has no files"), (_without_metrics, "has no metrics"), (_empty, "no manifest"),
        (_no_manifest, "no manifest"), (_torn_manifest, "cannot be read"), (_missing_shard, "is missing"),
        (_truncated_shard, "has 5 bytes, not 7"), (_flipped_bit, "checksum"), (_other_format, "format"),
    ],
)  # fmt: skip
def test_a_damaged_one_is_passed_over_with_the_reason(tmp_path: Path, damage, reason: str) -> None:  # type: ignore[no-untyped-def]
    _save(tmp_path, 20)
    damage(_save(tmp_path, 40))
    found, passed_over = manifest.newest(tmp_path)
    assert found is not None
    assert found.step == 20
    assert len(passed_over) == 1
    assert passed_over[0].startswith("step-00000040: ")
    assert reason in passed_over[0]


def test_no_flipped_bit_of_a_manifest_goes_unseen(tmp_path: Path) -> None:
    path = _save(tmp_path, 40)
    file = path / manifest.NAME
    content, whole = file.read_bytes(), manifest.read(path)
    for bit in range(8 * len(content)):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        file.write_bytes(flipped)
        try:
            assert manifest.read(path) == whole, bit  # of what means nothing, such as a space
        except manifest.InvalidCheckpoint:
            continue


def test_of_a_link_only_the_link_is_removed(tmp_path: Path) -> None:
    path = _save(tmp_path / "elsewhere", 40)
    (tmp_path / "here").mkdir()
    link = tmp_path / "here" / path.name
    link.symlink_to(path)
    assert manifest.verify(link).step == 40
    manifest.remove(link)
    assert not link.is_symlink()
    assert manifest.verify(path).step == 40


def _unreachable(path: Path, listed: object) -> None:
    raise Unreachable("s3://bucket: no answer")


def _gone(path: Path) -> None:
    shutil.rmtree(path)


@pytest.mark.parametrize("lose", [_missing_shard, _torn_manifest, _no_manifest, _gone])
def test_one_that_only_the_store_may_have_is_not_passed_over_while_it_is_away(
    tmp_path: Path, lose: Callable[[Path], None]
) -> None:
    _save(tmp_path, 20)
    lose(_save(tmp_path, 40))
    with pytest.raises(Unreachable, match=r"step 40 .* no answer.*Start the run again when"):
        manifest.newest(tmp_path, _unreachable, saved={20, 40})
    found, _ = manifest.newest(tmp_path, _unreachable, saved={20, 40}, but={40})
    assert found is not None
    assert found.step == 20


def test_one_whose_saving_did_not_finish_is_passed_over_though_the_store_is_away(tmp_path: Path) -> None:
    _save(tmp_path, 20)
    _no_manifest(_save(tmp_path, 40))
    found, passed_over = manifest.newest(tmp_path, _unreachable, saved={20})
    assert found is not None
    assert found.step == 20
    assert passed_over == [
        "step-00000040: it has no manifest: saving it did not finish; "
        "its object store cannot be reached (s3://bucket: no answer)"
    ]


def test_one_that_is_void_is_not_mended(tmp_path: Path) -> None:
    _save(tmp_path, 20)
    manifest.void(_save(tmp_path, 40))
    found, passed_over = manifest.newest(tmp_path, lambda path, listed: pytest.fail("it is void"))
    assert found is not None
    assert found.step == 20
    assert "is void" in passed_over[0]


def test_nothing_is_found_where_nothing_is(tmp_path: Path) -> None:
    assert manifest.newest(tmp_path / "none") == (None, [])


def test_pruning_keeps_the_newest_and_drops_unfinished_ones_before_them(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40):
        _save(tmp_path, step)
    _no_manifest(_save(tmp_path, 35))
    _no_manifest(_save(tmp_path, 25))
    manifest.prune(tmp_path, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000030", "step-00000040"]


def test_some_are_kept_for_good(tmp_path: Path) -> None:
    for step in range(10, 100, 10):
        _save(tmp_path, step)
    manifest.prune(tmp_path, keep=1, also=manifest.folder(tmp_path, 20), every=40)
    assert [manifest.step_of(path) for path in manifest.committed(tmp_path)] == [20, 40, 80, 90]


def test_what_another_machine_saved_meanwhile_makes_nothing_old(tmp_path: Path) -> None:
    for step in (10, 20):
        _save(tmp_path, step)
    manifest.prune(tmp_path, keep=2, ours=lambda: (_save(tmp_path, 30), None)[1])
    assert [manifest.step_of(path) for path in manifest.committed(tmp_path)] == [10, 20, 30]


def test_a_step_saved_again_replaces_what_was_left_there(tmp_path: Path) -> None:
    _flipped_bit(_save(tmp_path, 10))
    _save(tmp_path, 10)
    found, _ = manifest.newest(tmp_path)
    assert found is not None
