"""What is brought to an object store, and from there, without one that fails."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from stoker import disk, object_store, storage
from stoker.checkpoint import manifest
from stoker.errors import BadInput
from stoker.run import artifacts, finding, journal, lease, mirror, opening, stretches, uploader
from stoker.run.directory import RunDirectory
from stoker.run.mirror import Mirror
from stoker.tracking import ledger
from stoker.tracking.feed import Feed
from stoker.tracking.ledger import Ledger

from support import LONG

Machine = Callable[[str], tuple[RunDirectory, lease.Lease]]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A run's working copy on a machine of this name."""

    def on(name: str) -> tuple[RunDirectory, lease.Lease]:
        monkeypatch.setenv("STOKER_CACHE", str(tmp_path / name))
        folder = object_store.working_copy(f"file://{tmp_path / 'store'}")
        run = RunDirectory(folder / "experiment" / "a")
        run.make_folders()
        found = lease.of(run.path)
        assert found is not None
        return run, found

    return on


def _begun(machine: Machine) -> tuple[RunDirectory, lease.Lease]:
    """A run that machine one trains."""
    run, held = machine("one")
    held.take()
    held.note_here()
    run.create({})
    return run, held


def _mirror(run: RunDirectory) -> Mirror:
    found = mirror.of(run)
    assert found is not None
    return found


def test_an_artifact_that_was_made_anew_goes_there_though_its_size_is_the_same(
    machine: Machine, tmp_path: Path
) -> None:
    run, _ = _begun(machine)
    model = run.artifacts / "model.safetensors"
    for content in (b"old weights", b"new weights"):
        model.write_bytes(content)
        _mirror(run).push()
    assert (tmp_path / "store/experiment/a/artifacts/model.safetensors").read_bytes() == b"new weights"


ASKS = """
import sys, time
from types import SimpleNamespace
from stoker.run import uploader

def sleep(seconds):
    if seconds != uploader.LAST_WORDS:
        return time.sleep(seconds)
    print("waits", flush=True)
    sys.stdin.readline()

uploader.time = SimpleNamespace(**vars(time) | {"sleep": sleep})
sys.exit(uploader.main())
"""
"""An uploader that waits for last words until its standard input is closed, however long that takes."""


def test_what_other_ranks_of_a_run_that_was_killed_say_last_goes_there(
    machine: Machine, tmp_path: Path
) -> None:
    run, _ = _begun(machine)
    started = {"type": "attempt_started", "time": 1.0, "pid": 1, "host": "one", "world": 2, "step": 0}
    (run.journal / "attempt-0001.rank-0.jsonl").write_text(json.dumps(started) + "\n")
    process = subprocess.Popen(
        [sys.executable, "-c", ASKS, str(run.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"waits\n"
    (run.logs / "rank-1.log").write_text("stopped at once\n")
    process.communicate(timeout=LONG)
    assert process.returncode == 0
    assert (tmp_path / "store/experiment/a/logs/rank-1.log").read_text() == "stopped at once\n"


def test_an_artifact_goes_there_whatever_its_files_are_called(machine: Machine, tmp_path: Path) -> None:
    run, _ = _begun(machine)
    names = {".gitattributes", ".config/settings", "store.json", "attempt.lock", "sinks/a", "weights.tmp"}
    made = tmp_path / "made"
    for name in names:
        (made / name).parent.mkdir(parents=True, exist_ok=True)
        (made / name).write_text(name)
    artifacts.bring_in(run, made, "model")
    storage.unfinished(run.artifacts / "other").write_text("half of it")
    unfinished = storage.unfinished(run.artifacts / "folder")
    unfinished.mkdir()
    (unfinished / "a").write_text("half of it")
    _mirror(run).push()
    there = tmp_path / "store/experiment/a/artifacts"
    found = {file.relative_to(there).as_posix() for file in storage.files_under(there)}
    assert found == {f"model/{name}" for name in names}


def test_what_is_the_same_is_not_sent_again(machine: Machine, tmp_path: Path) -> None:
    run, _ = _begun(machine)
    (run.artifacts / "model").write_bytes(b"weights")
    _mirror(run).push()
    there = tmp_path / "store/experiment/a/artifacts/model"
    before = there.stat().st_mtime_ns
    _mirror(run).push()
    assert there.stat().st_mtime_ns == before


def test_an_old_artifact_does_not_replace_what_another_machine_made(machine: Machine, tmp_path: Path) -> None:
    first, held = _begun(machine)
    (first.artifacts / "model").write_bytes(b"first")
    _mirror(first).push()
    held.release()

    second, other = machine("two")
    assert not other.take()
    _mirror(second).fetch(newer_there=True, artifacts=True)
    other.note_here()
    assert (second.artifacts / "model").read_bytes() == b"first"
    (second.artifacts / "model").write_bytes(b"other")
    _mirror(second).push()
    other.release()

    _, again = machine("one")
    assert not again.take()
    _mirror(first).fetch(newer_there=True)
    again.note_here()
    assert (first.artifacts / "model").read_bytes() == b"other"
    _mirror(first).push()
    assert (tmp_path / "store/experiment/a/artifacts/model").read_bytes() == b"other"


def _save(run: RunDirectory, content: bytes, step: int = 1) -> Path:
    path = manifest.folder(run.checkpoints, step)
    manifest.begin(path)
    shard = path / "shard"
    shard.write_bytes(content)
    manifest.commit(path, [manifest.File.of(shard)], step=step, samples=8, world_size=1)
    return path


def test_a_manifest_brings_nothing_from_outside_of_its_folder(machine: Machine, tmp_path: Path) -> None:
    run, _ = _begun(machine)
    saved = _save(run, b"weights")
    _mirror(run).push()
    there = tmp_path / "store/experiment/a"
    (there / "evil").write_bytes(b"evil")
    changed = json.loads((saved / manifest.NAME).read_bytes())
    changed["files"][0]["path"] = "../../evil"
    changed["xxh3"] = manifest._checksum(changed)
    (there / "checkpoints/step-00000001/manifest.json").write_text(json.dumps(changed))
    (saved / "shard").unlink()
    with pytest.raises(manifest.InvalidCheckpoint, match=r"in its object store, .* outside its directory"):
        manifest.mended(saved, _mirror(run).fetch_checkpoint)
    assert not (run.path / "evil").exists()


def test_one_that_is_damaged_is_mended(machine: Machine) -> None:
    run, _ = _begun(machine)
    saved = _save(run, b"weights")
    _mirror(run).push()
    for name in ("shard", manifest.NAME):
        (saved / name).write_bytes(b"{")
    assert manifest.mended(saved, _mirror(run).fetch_checkpoint).files == {"shard"}
    assert (saved / "shard").read_bytes() == b"weights"


def test_one_that_was_lost_here_stays_in_the_store_and_is_fetched_unless_it_is_void(
    machine: Machine, tmp_path: Path
) -> None:
    run, _ = _begun(machine)
    _, writer = journal.start_attempt(run.journal)
    for step in (1, 2, 3):
        _save(run, b"weights", step)
        writer.append("checkpoint", step=step)
    _mirror(run).push()
    shutil.rmtree(manifest.folder(run.checkpoints, 1))  # an old one
    shutil.rmtree(manifest.folder(run.checkpoints, 3))
    _mirror(run).push()
    there = tmp_path / "store/experiment/a/checkpoints"
    assert [path.parent.name[-1] for path in sorted(there.glob("*/manifest.json"))] == ["2", "3"]
    found, passed_over = manifest.newest(run.checkpoints, _mirror(run).fetch_checkpoint, saved={1, 2, 3, 4})
    assert found is not None
    assert (found.step, passed_over) == (3, [])

    shutil.rmtree(found.path)
    writer.append("resumed", step=2, passed_over=[])
    writer.close()
    _mirror(run).push()
    assert [path.parent.name[-1] for path in sorted(there.glob("*/manifest.json"))] == ["2"]


@pytest.mark.parametrize("cut", [lambda content: content[:-10], lambda content: b"{}"], ids=["half", "empty"])
def test_a_manifest_that_is_cut_off_in_the_store_is_not_taken_over(
    machine: Machine, tmp_path: Path, cut: Callable[[bytes], bytes]
) -> None:
    run, _ = _begun(machine)
    saved = _save(run, b"weights")
    _mirror(run).push()
    whole = (saved / manifest.NAME).read_bytes()
    (tmp_path / "store/experiment/a/checkpoints/step-00000001/manifest.json").write_bytes(cut(whole))
    (saved / "shard").unlink()
    found, passed_over = manifest.newest(run.checkpoints, _mirror(run).fetch_checkpoint)
    assert found is None
    assert passed_over[0].startswith("step-00000001: shard is missing; in its object store, its manifest ")
    assert (saved / manifest.NAME).read_bytes() == whole


def test_a_manifest_that_is_cut_off_here_replaces_none_in_the_store(machine: Machine, tmp_path: Path) -> None:
    run, _ = _begun(machine)
    saved = _save(run, b"weights")
    _mirror(run).push()
    whole = (saved / manifest.NAME).read_bytes()
    (saved / manifest.NAME).write_bytes(whole[:-10])
    _mirror(run).push()
    there = tmp_path / "store/experiment/a/checkpoints/step-00000001/manifest.json"
    assert there.read_bytes() == whole


def test_what_was_written_here_alone_is_void_where_another_machine_went_on(machine: Machine) -> None:
    first, held = _begun(machine)
    (first.journal / "attempt-0001.rank-0.jsonl").write_bytes(b'{"of": 1}\n')
    _mirror(first).push()
    (first.journal / "attempt-0001.rank-0.jsonl").write_bytes(b'{"of": 1}\n{"not": "brought there"}\n')
    (first.journal / "attempt-0002.rank-0.jsonl").write_bytes(b'{"of": "one"}\n')
    (first.journal / "attempt-0003.rank-0.jsonl").write_bytes(b'{"of": "one"}\n')
    (first.journal / "control-1.jsonl").write_bytes(b'{"tags": {}}\n')
    held.release()

    second, other = machine("two")
    assert not other.take()
    _mirror(second).fetch(newer_there=True)
    other.note_here()
    (second.journal / "attempt-0002.rank-0.jsonl").write_bytes(b'{"of": "two"}\n')
    _mirror(second).push()
    other.release()

    machine("one")
    _mirror(first).fetch()
    found = {file.name: file.read_text() for file in first.journal.glob("*.jsonl")}
    assert found == {
        "attempt-0001.rank-0.jsonl": '{"of": 1}\n{"not": "brought there"}\n',
        "attempt-0002.rank-0.jsonl": '{"of": "two"}\n',
        "control-1.jsonl": '{"tags": {}}\n',
    }


def test_a_sink_reads_anew_what_another_machine_wrote_under_a_name_that_it_has_read(machine: Machine) -> None:
    first, held = _begun(machine)
    (first.journal / "attempt-0001.rank-0.jsonl").write_bytes(b'{"of": "both"}\n')
    _mirror(first).push()
    (first.journal / "attempt-0002.rank-0.jsonl").write_bytes(b'{"of": "one, which no store had"}\n')
    of_sink = ledger.file_of(first, "mlflow")
    Ledger(run="1", offsets=journal.sizes(first.journal)).save(of_sink)
    held.release()

    second, other = machine("two")
    other.take()
    _mirror(second).fetch(newer_there=True)
    other.note_here()
    (second.journal / "attempt-0002.rank-0.jsonl").write_bytes(
        b'{"type": "note", "time": 1, "text": "two"}\n'
    )
    _mirror(second).push()
    other.release()

    machine("one")
    _mirror(first).fetch()
    batch = Feed(first.journal, ledger.load(of_sink).cursor).take()
    assert batch.notes == ["two"]


def test_a_fetch_that_failed_is_made_up_for_at_the_next_start(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, held = _begun(machine)
    (first.journal / "attempt-0001.rank-0.jsonl").write_bytes(b'{"of": 1}\n')
    _mirror(first).push()
    held.release()
    second, _ = machine("two")
    other = opening.lease_of(second)
    assert other is not None
    (second.journal / "attempt-0002.rank-0.jsonl").write_bytes(b'{"of": "two"}\n')
    _mirror(second).push()
    other.release()

    machine("one")
    (first.journal / "attempt-0002.rank-0.jsonl").write_bytes(b'{"of": "one, which no store had"}\n')
    with monkeypatch.context() as failing:
        failing.setattr(stretches, "read", _unanswered)
        with pytest.raises(object_store.Unreachable):
            opening.lease_of(first)
    (first.journal / "attempt-0003.rank-0.jsonl").write_bytes(b'{"of": "one"}\n')
    with pytest.raises(mirror.Lost):
        _mirror(first).push()
    again = opening.lease_of(first)
    assert again is not None
    assert (first.journal / "attempt-0002.rank-0.jsonl").read_bytes() == b'{"of": "two"}\n'
    assert not (first.journal / "attempt-0003.rank-0.jsonl").exists()


def _unanswered(*args: object) -> bytes:
    raise object_store.Unreachable("it does not answer")


def test_a_journal_that_differs_from_the_one_in_the_store_is_not_appended_to_it(
    machine: Machine, tmp_path: Path
) -> None:
    run, _ = _begun(machine)
    file = run.journal / "attempt-0001.rank-0.jsonl"
    file.write_bytes(b'{"of": "one"}\n')
    _mirror(run).push()
    for stale in (b'{"of": "two"}\n{"more": 1}\n', b'{"of'):  # longer and shorter than what is there
        file.write_bytes(stale.replace(b"of", b"by"))
        with pytest.raises(mirror.Lost, match="another machine trained this run"):
            _mirror(run).push()
    assert _read(tmp_path / f"store/experiment/a/journal/{file.name}") == '{"of": "one"}\n'


def test_who_only_removes_something_of_a_run_is_not_the_last_to_have_trained_it(machine: Machine) -> None:
    first, held = _begun(machine)
    _mirror(first).push()
    held.release()
    second, _ = machine("two")
    with opening.kept_from_training(second):
        pass
    assert _mirror(second).taken_elsewhere()

    _, again = machine("one")
    (first.journal / "attempt-0002.rank-0.jsonl").write_bytes(b'{"of": "one"}\n')
    _mirror(first).push()
    assert again.take()


def _replaced(machine: Machine) -> RunDirectory:
    """A run that machine one trained, and machine two deleted and began anew under the same name."""
    first, held = _trained(machine, "one")
    held.release()
    second, _ = machine("two")
    _mirror(second).fetch()
    mirror.remove(second)
    _, other = _trained(machine, "two")
    other.release()
    machine("one")
    return first


def _trained(machine: Machine, name: str) -> tuple[RunDirectory, lease.Lease]:
    run, _ = machine(name)
    held = opening.lease_of(run)
    assert held is not None
    run.create({"uid": f"of-{name}"})
    (run.journal / "attempt-0001.rank-0.jsonl").write_text(json.dumps({"of": name}) + "\n")
    _save(run, name.encode())
    _mirror(run).push()
    return run, held


def test_a_new_run_of_the_same_name_is_not_mixed_with_what_is_here_of_the_old_one(machine: Machine) -> None:
    run = _replaced(machine)
    with pytest.raises(mirror.Lost):
        _mirror(run).push()
    assert opening.lease_of(run) is not None
    assert run.record()["uid"] == "of-two"
    assert (run.journal / "attempt-0001.rank-0.jsonl").read_text() == '{"of": "two"}\n'
    assert not (run.checkpoints / "step-00000001" / "shard").exists()
    aside = run.path.parent.parent / ".set-aside/experiment/a-of-one"
    assert (aside / "journal/attempt-0001.rank-0.jsonl").read_text() == '{"of": "one"}\n'
    assert (aside / "checkpoints/step-00000001/shard").read_bytes() == b"one"


def test_who_only_looks_sees_the_new_run_too(machine: Machine) -> None:
    run = _replaced(machine)
    assert [found.record()["uid"] for found in finding.every(run.path.parent.parent)] == ["of-two"]


def test_a_run_that_another_machine_deleted_is_listed_no_longer_and_comes_back_only_if_asked(
    machine: Machine, tmp_path: Path
) -> None:
    run, held = _trained(machine, "one")
    held.release()
    second, _ = machine("two")
    _mirror(second).fetch()
    mirror.remove(second)
    machine("one")
    runs = run.path.parent.parent
    assert finding.every(runs) == []
    with pytest.raises(BadInput, match="no run 'experiment/a'"):
        finding.find(runs, "experiment/a")
    with pytest.raises(mirror.Lost, match="deleted by another machine"):
        _mirror(run).push()
    assert finding.find(runs, "a", deleted=True).path == run.path
    mirror.restore(run)
    _mirror(run).push()
    assert finding.find(runs, "experiment/a").path == run.path
    assert (tmp_path / "store/experiment/a/checkpoints/step-00000001/manifest.json").exists()


def test_a_run_is_found_by_its_experiment_and_id_where_there_is_no_copy_of_it(machine: Machine) -> None:
    _trained(machine, "one")
    other, _ = machine("three")
    shutil.rmtree(other.path)
    runs = other.path.parent.parent
    assert finding.find(runs, "experiment/a").path == other.path
    shutil.rmtree(other.path)
    (found,) = finding.meant(runs, "experiment/a", lambda: finding.every(runs))
    assert found.path == other.path


def test_a_checkpoint_that_is_deleted_while_it_is_uploaded_gets_there(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each upload takes longer than the checkpoint is kept."""
    run, _ = _begun(machine)
    there = tmp_path / "store/experiment/a/checkpoints"
    _save(run, b"weights", 1)
    put, step = object_store.Store.put, 1

    def slow(store: object_store.Store, key: str, file: Path) -> None:
        nonlocal step
        if key.endswith("shard"):
            shutil.rmtree(manifest.folder(run.checkpoints, step))
            step += 1
            _save(run, b"weights", step)
        put(store, key, file)

    monkeypatch.setattr(object_store.Store, "put", slow)
    for newest in (1, 2, 3):
        copy = _mirror(run)
        copy.push()
        assert copy.newest == newest
    folders = {path.name: sorted(file.name for file in path.iterdir()) for path in there.iterdir()}
    assert {name: files for name, files in folders.items() if files} == {
        "step-00000003": ["manifest.json", "shard"]
    }
    assert not (run.path / "uploading").exists()


def test_it_is_said_once_that_the_store_falls_behind(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(uploader, "BEHIND_FOR", 0.0)
    monkeypatch.setattr(uploader, "spawn", lambda run: None)
    run, _ = _begun(machine)
    uploads = uploader.Uploads(run, _mirror(run))
    for step in range(1, 9):
        path = _save(run, b"weights", step)
        uploads.look_after()
        assert ("no checkpoint yet, and 3 were made since" in caplog.text) == (step >= 3)
        shutil.rmtree(path)
    assert caplog.text.count("slower than checkpoints are made") == 1


def test_a_store_that_is_away_for_hours_does_not_end_the_uploader(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = _begun(machine)
    copy = _mirror(run)
    there, tries, pauses = copy.push, 0, []

    def push() -> None:
        nonlocal tries
        tries += 1
        if tries <= 1100:
            raise OSError("no route to the store")
        there()

    monkeypatch.setattr(copy, "push", push)
    monkeypatch.setattr(uploader, "PATIENCE", LONG)
    monkeypatch.setattr(uploader, "_pause", lambda run, seconds, alive: pauses.append(seconds))
    assert uploader.upload(run, copy)
    assert (len(pauses), pauses[0], pauses[-1]) == (1100, 4.0, uploader.LONGEST_BACKOFF)


def test_a_checkpoint_is_removed_there_too(machine: Machine, tmp_path: Path) -> None:
    run, _ = _begun(machine)
    there = tmp_path / "store/experiment/a/checkpoints/step-00000001"
    there.mkdir(parents=True)
    for name in ("manifest.json", "shard"):
        (there / name).write_bytes(b"{}")
    _mirror(run).remove_checkpoint("step-00000001")
    assert not any(file.is_file() for file in there.rglob("*"))


def test_a_long_journal_is_few_objects_and_whole_at_any_time(machine: Machine, tmp_path: Path) -> None:
    run, _ = _begun(machine)
    there = tmp_path / "store/experiment/a/journal/attempt-0001.rank-0.jsonl"
    file = run.journal / there.name
    for line in range(200):
        with file.open("a") as journal:
            journal.write(f'{{"line": {line}}}\n' * (1 + line % 3))
        _mirror(run).push()
        assert _read(there) == file.read_text()
    assert len(list(there.iterdir())) <= 10

    other, _ = machine("two")
    _mirror(other).fetch()
    assert (other.journal / there.name).read_text() == file.read_text()


def test_a_stretch_that_was_joined_and_is_there_still_is_read_once(machine: Machine, tmp_path: Path) -> None:
    """The uploader was killed between the writing of the longer one and the deleting of the others."""
    run, _ = _begun(machine)
    file = run.journal / "attempt-0001.rank-0.jsonl"
    file.write_text("0123456789")
    _mirror(run).push()
    (tmp_path / f"store/experiment/a/journal/{file.name}/000000000000004").write_text("45")
    other, _ = machine("two")
    _mirror(other).fetch()
    assert (other.journal / file.name).read_text() == "0123456789"
    file.write_text("0123456789ab")
    _mirror(run).push()
    _mirror(other).fetch()
    assert (other.journal / file.name).read_text() == "0123456789ab"


def test_a_stretch_that_is_joined_after_it_was_listed_is_read_in_the_longer_one(
    machine: Machine, tmp_path: Path
) -> None:
    run, _ = _begun(machine)
    file = run.journal / "attempt-0001.rank-0.jsonl"
    file.write_text("0123456789")
    _mirror(run).push()
    other, _ = machine("two")
    _mirror(other).fetch()
    file.write_text("0123456789ab")
    _mirror(run).push()
    store = object_store.Store(f"file://{tmp_path / 'store'}", "")
    listed = {key.removeprefix("experiment/a/"): stored for key, stored in store.objects().items()}
    assert f"journal/{file.name}/000000000000010" in listed
    file.write_text("0123456789ab" * 2)
    _mirror(run).push()
    assert not (tmp_path / f"store/experiment/a/journal/{file.name}/000000000000010").exists()
    Mirror(other, store, listed).fetch()
    assert (other.journal / file.name).read_text() == "0123456789ab" * 2


def test_a_backlog_of_a_journal_goes_there_in_stretches_that_are_not_too_long(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stretches, "_LONGEST", 100)
    run, _ = _begun(machine)
    there = tmp_path / "store/experiment/a/journal/attempt-0001.rank-0.jsonl"
    file = run.journal / there.name
    for lines in (3, 30, 5, 1, 1, 40):
        with file.open("a") as journal:
            journal.write('{"line": 0}\n' * lines)
        _mirror(run).push()
        assert _read(there) == file.read_text()
    sizes = [stretch.stat().st_size for stretch in there.iterdir()]
    assert max(sizes) <= 100
    assert len(sizes) <= 15

    other, _ = machine("two")
    _mirror(other).fetch()
    assert (other.journal / there.name).read_text() == file.read_text()


def _read(stretches: Path) -> str:
    content = ""
    for stretch in sorted(stretches.iterdir()):
        assert int(stretch.name) == len(content)
        content += stretch.read_text()
    return content


def test_a_journal_is_on_the_disk_before_it_is_in_the_store(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = _begun(machine)
    file = run.journal / "attempt-0001.rank-0.jsonl"
    file.write_bytes(b"{}\n")
    disk.bring()  # else its thread may be what fails, which says so to a later test
    monkeypatch.setattr(os, "fsync", _broken)
    with pytest.raises(OSError, match="Input/output"):
        stretches.push(object_store.Store(f"file://{tmp_path / 'store'}", ""), "x", "journal", file, [], {})
    assert not (tmp_path / "store" / "x").exists()


def _broken(descriptor: int) -> None:
    raise OSError(errno.EIO, "Input/output error")
