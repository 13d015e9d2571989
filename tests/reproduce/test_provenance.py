from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import time
import uuid
from pathlib import Path

import orjson
import pytest
import xxhash
from stoker import redaction, storage
from stoker.errors import BadInput
from stoker.reproduce import bundle, code, inputs, packages, place, provenance, shipped
from stoker.reproduce.code import Code, CodeOnDisk, File


def _git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "protocol.file.allow=always"]
    done = subprocess.run(
        ["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def _repository(folder: Path, files: dict[str, str]) -> Path:
    folder.mkdir(parents=True)
    _git(folder, "init", "-b", "main")
    _write(folder, files)
    _git(folder, "add", ".")
    _git(folder, "commit", "-m", "first")
    return folder


def _write(folder: Path, files: dict[str, str]) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    return _repository(tmp_path / "repository", {"train.py": "print(1)\n", "gone.py": "x = 1\n"})


def _record(tmp_path: Path, source: Path, runs: Path | None = None) -> tuple[Path, Code]:
    """Record into a folder; returns it, and what can be read of it again."""
    target = tmp_path / "provenance"
    target.mkdir(exist_ok=True)
    provenance.write(target, provenance.gather(source, runs), tmp_path / "store")
    return target, provenance.read_code(target)


def _paths(found: Code) -> list[str]:
    return [file.path for file in found.files]


def test_a_clean_repository_is_its_commit(repository: Path, tmp_path: Path) -> None:
    target, found = _record(tmp_path, repository)
    assert found.kind == "git"
    assert found.commit == _git(repository, "rev-parse", "HEAD")
    assert found.branch == "main"
    assert found.dirty is False
    assert _paths(found) == ["gone.py", "train.py"]
    assert not (target / provenance.DIFF).exists()


def test_the_bundle_has_changed_and_new_files_and_none_that_is_ignored_or_gone(
    repository: Path, tmp_path: Path
) -> None:
    _write(repository, {"train.py": "print(2)\n", "new.py": "x", "ignored.py": "y", "inner/deep.py": "z"})
    (repository / "gone.py").unlink()
    (repository / ".gitignore").write_text("ignored.py\n")
    (repository / "run.sh").write_text("#!/bin/sh\n")
    (repository / "run.sh").chmod(0o755)
    (repository / "link").symlink_to("train.py")
    target, found = _record(tmp_path, repository)
    assert found.dirty is True
    assert found.untracked == (".gitignore", "inner/deep.py", "link", "new.py", "run.sh")
    assert _paths(found) == [".gitignore", "inner/deep.py", "link", "new.py", "run.sh", "train.py"]
    assert "-print(1)\n+print(2)" in (target / provenance.DIFF).read_text()
    there = provenance.extract(target, tmp_path / "again")
    assert there == found
    for file in found.files:
        again = tmp_path / "again" / file.path
        assert again.read_bytes() == (repository / file.path).read_bytes()
        assert bool(again.lstat().st_mode & 0o100) == (file.mode == "100755" or again.is_symlink())
        if not again.is_symlink():
            assert xxhash.xxh3_128_hexdigest(again.read_bytes()) == file.xxh3
    assert (tmp_path / "again" / "link").readlink() == Path("train.py")


def test_a_link_out_of_the_repository_is_linked_again_unless_what_it_leads_to_has_changed(
    repository: Path, tmp_path: Path
) -> None:
    outside = tmp_path / "outside.txt"
    outside.write_text("words\n")
    (repository / "vocab.txt").symlink_to(outside)
    (repository / "folder").symlink_to(tmp_path)
    target, found = _record(tmp_path, repository)
    assert [(left.path, left.bytes) for left in found.left_out] == [("folder", None), ("vocab.txt", 6)]
    there = place.materialise(target, tmp_path / "again", str(repository))
    ends = time.time() + 1
    assert inputs.Linking(there, tmp_path, repository, ends, ends).left_out() == []
    assert (tmp_path / "again/vocab.txt").read_text() == "words\n"
    outside.write_text("other words\n")
    there = place.materialise(target, tmp_path / "later", str(repository))
    assert inputs.Linking(there, tmp_path, repository, ends, ends).left_out() == ["vocab.txt"]
    outside.write_text("xords\n")
    began = time.time() - 60
    assert "vocab.txt" in inputs.Linking(there, tmp_path, repository, began, ends).left_out()
    assert not (tmp_path / "later/vocab.txt").exists()


def test_files_over_the_limits_are_named(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (repository / "weights.bin").write_bytes(bytes(bundle.MOST_OF_A_FILE + 1))
    monkeypatch.setattr(bundle, "MOST_IN_ALL", 5_000)
    _write(repository, {"large.py": "#" * 4_990, "outside.py": "x"})
    (repository / "etc").symlink_to("/etc")
    _, found = _record(tmp_path, repository)
    assert [(left.path, left.bytes, left.why) for left in found.left_out] == [
        ("etc", None, "a link out of repository to /etc"),
        ("large.py", 4_990, "over the total limit of 64 MiB"),
        ("weights.bin", bundle.MOST_OF_A_FILE + 1, "larger than 1 MiB"),
    ]
    assert _paths(found) == ["gone.py", "outside.py", "train.py"]


def test_submodules_and_repositories_within_have_their_files_in_the_bundle(
    repository: Path, tmp_path: Path
) -> None:
    other = _repository(tmp_path / "other", {"library.py": "x = 1\n"})
    _git(repository, "submodule", "add", str(other), "sub")
    _repository(repository / "nested", {"own.py": "y = 1\n"})
    _write(repository, {"sub/untracked.py": "z"})
    _, found = _record(tmp_path, repository)
    assert {"sub/library.py", "sub/untracked.py", "nested/own.py"} <= set(_paths(found))
    assert {"sub/untracked.py", "nested/own.py"} <= set(found.untracked)


def test_runs_within_the_repository_are_no_code(repository: Path, tmp_path: Path) -> None:
    _write(repository, {"runs/llm/a/notes.py": "x"})
    _, found = _record(tmp_path, repository, runs=repository / "runs")
    assert found.dirty is False
    assert found.untracked == ()
    assert _paths(found) == ["gone.py", "train.py"]


def test_a_script_that_git_ignores_is_in_the_bundle_with_what_it_imports(
    repository: Path, tmp_path: Path
) -> None:
    (repository / ".gitignore").write_text("scratch/\n")
    _write(
        repository, {"scratch/mine.py": "import helper\n", "scratch/helper.py": "", "scratch/other.py": ""}
    )
    _, found = _record(tmp_path, repository / "scratch" / "mine.py")
    assert found.script == "scratch/mine.py"
    assert {"scratch/mine.py", "scratch/helper.py"} <= set(_paths(found))
    assert "scratch/other.py" not in _paths(found)


def test_a_repository_without_a_commit_is_recorded(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    folder.mkdir()
    _git(folder, "init", "-b", "main")
    _write(folder, {"train.py": "x"})
    _, found = _record(tmp_path, folder)
    assert (found.commit, found.dirty, _paths(found)) == (None, True, ["train.py"])


def test_credentials_in_the_remote_are_left_out(repository: Path) -> None:
    for address in ("https://user:secret@example.com/a.git", "https://ghp_token@example.com/a.git"):
        _git(repository, "config", "remote.origin.url", address)
        assert code.find(repository).code.remote == "https://example.com/a.git"
    _git(repository, "config", "remote.origin.url", "git@example.com:a.git")
    assert code.find(repository).code.remote == "git@example.com:a.git"


def test_outside_of_git_the_script_and_what_it_imports_from_its_folder_is_recorded(tmp_path: Path) -> None:
    folder = tmp_path / "plain"
    _write(folder, {
        "train.py": "import json, direct\nfrom package import part\nfrom package.sub import deep as d\n",
        "direct.py": "def late():\n    import lazily\n",
        "lazily.py": "",
        "package/__init__.py": "",
        "package/part.py": "from . import sibling\nfrom .sub.deep import x\n",
        "package/sibling.py": "",
        "package/sub/deep.py": "from ..missing import x\n",
        "package/unused.py": "",
        "unused.py": "",
        "json.py": "",
    })  # fmt: skip
    _, found = _record(tmp_path, folder / "train.py")
    assert (found.kind, found.root, found.script) == ("modules", str(folder), "train.py")
    assert _paths(found) == [
        "direct.py", "json.py", "lazily.py", "package/__init__.py", "package/part.py", "package/sibling.py",
        "package/sub/deep.py", "train.py",
    ]  # fmt: skip


def test_outside_of_git_a_folder_has_no_code_of_its_own(tmp_path: Path) -> None:
    target, found = _record(tmp_path, tmp_path)
    assert (found.kind, found.files, found.bundle) == ("modules", (), None)
    with pytest.raises(BadInput, match="the code of this run was not recorded"):
        provenance.extract(target, tmp_path / "again")


def test_runs_of_the_same_code_share_one_bundle(repository: Path, tmp_path: Path) -> None:
    places = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        provenance.write(tmp_path / name, provenance.gather(repository), tmp_path / "store")
        places.append((tmp_path / name / bundle.NAME).stat().st_ino)
    assert places[0] == places[1]
    assert len(list((tmp_path / "store").glob("*/*"))) == 1


def _damage(archive: Path) -> None:
    """Another bit in the middle, in the same file: all links of it have it."""
    content = bytearray(archive.read_bytes())
    content[len(content) // 2] ^= 1
    archive.chmod(0o644)
    archive.write_bytes(content)


def test_a_damaged_bundle_in_the_store_is_not_linked_but_made_anew(repository: Path, tmp_path: Path) -> None:
    first, _ = _record(tmp_path, repository)
    _damage(first / bundle.NAME)
    second = tmp_path / "second"
    second.mkdir()
    provenance.write(second, provenance.gather(repository), tmp_path / "store")
    provenance.extract(second, tmp_path / "again")
    assert (tmp_path / "again/train.py").read_text() == "print(1)\n"


def test_a_bundle_that_was_damaged_when_it_was_recorded_is_named(repository: Path, tmp_path: Path) -> None:
    target, found = _record(tmp_path, repository)
    _write(repository, {"train.py": "print(2)\n"})
    (tmp_path / "other").mkdir()
    archive = _record(tmp_path / "other", repository)[0] / bundle.NAME
    with pytest.raises(BadInput, match=r"damaged.*train\.py in it"):
        bundle.unpack(archive, tmp_path / "again", storage.xxh3(archive), found.files)
    _damage(target / bundle.NAME)
    with pytest.raises(BadInput, match="was already damaged when it was recorded"):
        bundle.unpack(
            target / bundle.NAME, tmp_path / "again", storage.xxh3(target / bundle.NAME), found.files
        )
    assert not (tmp_path / "again").exists()


def test_what_was_looked_through_once_is_not_again_unless_a_value_is_in_it(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STOKER_CACHE", str(tmp_path / "cache"))
    _write(repository, {"plain.yaml": "x: secretly-this-value\n", "code.py": 'password = "hunter2hunter2"\n'})
    first = provenance.gather(repository)
    looked_at: list[str] = []
    content = redaction.content

    def noting(path: str, data: bytes) -> bytes | None:
        looked_at.append(path)
        return content(path, data)

    monkeypatch.setattr(redaction, "content", noting)
    assert provenance.gather(repository) == first
    assert looked_at == ["code.py"]
    assert first.contents["code.py"] == b'password = "[REDACTED]"\n'
    monkeypatch.setenv("MY_SERVICE_TOKEN", "secretly-this-value")
    assert provenance.gather(repository).contents["plain.yaml"] == b"x: [REDACTED]\n"


def test_what_is_removed_from_the_diff_is_removed_from_the_bundle(repository: Path, tmp_path: Path) -> None:
    _write(repository, {
        "train.py": "print(1)\n# password: SECRETcomment99aa\nconnect(password='Tr0ub4dor$3cretZ')\n",
        "gone.py": "password = other_password2\n",
    })  # fmt: skip
    target, found = _record(tmp_path, repository)
    provenance.extract(target, tmp_path / "again")
    removed = "# password: [REDACTED]\n{}connect(password='[REDACTED]')\n"
    assert (tmp_path / "again" / "train.py").read_text() == "print(1)\n" + removed.format("")
    diff = (target / provenance.DIFF).read_text()
    assert "+" + removed.format("+") in diff
    assert "+password = other_password2\n" in diff
    assert found.redacted == ("train.py",)


def test_a_new_file_that_is_one_of_secrets_is_left_out_and_one_that_git_has_is_not(
    repository: Path, tmp_path: Path
) -> None:
    _write(repository, {"tracked.env": "LR=1\n"})
    _git(repository, "add", "tracked.env")
    names = [".env", ".env.local", "deploy/id_rsa", "key.pem"]
    _write(repository, dict.fromkeys(names, "x = 1\n") | {"environment.yaml": "x: 1\n"})
    _, found = _record(tmp_path, repository)
    assert _paths(found) == ["environment.yaml", "gone.py", "tracked.env", "train.py"]
    assert [one.path for one in found.left_out] == names
    assert {(one.bytes, one.why) for one in found.left_out} == {
        (6, "not in git, and its name suggests secrets")
    }


def test_a_damaged_bundle_is_named_and_not_unpacked(repository: Path, tmp_path: Path) -> None:
    target, _ = _record(tmp_path, repository)
    archive = target / bundle.NAME
    content = bytearray(archive.read_bytes())
    content[len(content) // 2] ^= 1
    archive.unlink()
    archive.write_bytes(content)
    with pytest.raises(BadInput, match=r"code\.tar\.gz is damaged"):
        provenance.extract(target, tmp_path / "again")
    archive.unlink()
    with pytest.raises(BadInput, match=r"cannot be read: .*code\.tar\.gz"):
        provenance.extract(target, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_an_archive_that_leads_out_of_the_folder_is_refused(repository: Path, tmp_path: Path) -> None:
    target, found = _record(tmp_path, repository)
    archive = target / bundle.NAME
    archive.unlink()
    with tarfile.open(archive, "w:gz") as members:
        members.add(repository / "train.py", "../outside.py")
    outside = File("../outside.py", 9, storage.xxh3(repository / "train.py"))
    with pytest.raises(BadInput, match="cannot be unpacked"):
        bundle.unpack(archive, tmp_path / "again", storage.xxh3(archive), [outside])
    assert not (tmp_path / "outside.py").exists()
    assert found.bundle == bundle.NAME


def test_a_run_without_a_record_of_its_code_says_so(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="was not recorded"):
        provenance.read_code(tmp_path)
    (tmp_path / provenance.CODE).write_text('{"kind": "git"}')
    with pytest.raises(BadInput, match="cannot be read"):
        provenance.read_code(tmp_path)


@pytest.mark.soak(small=False)
def test_the_lock_is_one_that_pip_takes(repository: Path, tmp_path: Path) -> None:
    target, _ = _record(tmp_path, repository)
    lock = target / provenance.REQUIREMENTS
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", "--dry-run", "--no-deps", "--no-index", "-r", str(lock)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = [line for line in lock.read_text().splitlines() if "content sha256:" in line]
    names = [line.partition("==")[0].lower().replace("_", "-") for line in lines]
    assert "torch" in names
    assert names == sorted(names)
    assert packages.versions(lock.read_text())["orjson"]


def test_the_hash_of_a_package_is_of_what_is_the_same_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hashes(place: str, module: str) -> str | None:
        folder = tmp_path / place / "thing-1.0.dist-info"
        folder.mkdir(parents=True)
        (folder / "METADATA").write_text("Name: thing\nVersion: 1.0\n\nName: of no matter\n")
        (folder / "RECORD").write_text(
            f"../../../bin/thing,sha256={place},1\nthing.py,sha256={module},1\n"
            f"thing-1.0.dist-info/INSTALLER,sha256={place},1\nthing-1.0.dist-info/RECORD,,\n"
        )
        monkeypatch.setattr(sys, "path", [str(tmp_path / place)])
        return packages.installed()[0].content

    monkeypatch.setenv("STOKER_CACHE", str(tmp_path / "cache"))
    assert hashes("one", "a") == hashes("two", "a")
    assert hashes("three", "b") != hashes("four", "a")


def test_a_package_is_read_again_only_if_it_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "place" / "thing.dist-info"
    folder.mkdir(parents=True)
    monkeypatch.setattr(sys, "path", [str(folder.parent)])
    monkeypatch.setenv("STOKER_CACHE", str(tmp_path / "cache"))

    def locked() -> str:
        return packages.lock(packages.installed())

    (folder / "METADATA").write_text("Name: thing\nVersion: 1.0\n")
    (folder / "RECORD").write_text("thing.py,sha256=a,1\n")
    first = locked()
    assert "thing==1.0" in first
    with monkeypatch.context() as patched:
        patched.setattr(packages, "_package", lambda folder: pytest.fail("it is read again"))
        assert locked() == first
    (folder / "METADATA").write_text("Name: thing\nVersion: 2.0.1\n")
    second = locked()
    assert "thing==2.0.1" in second
    (folder / "RECORD").write_text("thing.py,sha256=other,1\n")
    assert "thing==2.0.1" in locked() != second
    (folder / "direct_url.json").write_text('{"url": "https://me:hunter22@h/thing.whl"}')
    (folder / "RECORD").write_text("thing.py,sha256=another,1\n")
    assert "thing @ https://me:[REDACTED]@h/thing.whl" in locked()
    assert "hunter22" not in (tmp_path / "cache" / "packages.json").read_text()


def test_what_was_not_installed_from_an_index_stands_with_its_origin() -> None:
    found = packages.lock([
        packages.Package("a", "1.0", "abc", {"url": "https://h/a.whl", "archive_info": {}}),
        packages.Package("b", "1.0", None, {
            "url": "https://me:hunter22@h/b.git", "vcs_info": {"vcs": "git", "commit_id": "c0ffee"},
        }),
        packages.Package("c", "2.0", "abc", {"url": "file:///no/where", "dir_info": {"editable": True}}),
        packages.Package("torch", "2.13.0+cu130", "abc", {}),
    ]).splitlines()[1:]  # fmt: skip
    assert found == [
        "--extra-index-url https://download.pytorch.org/whl/cu130",
        "a @ https://h/a.whl  # content sha256:abc",
        "b @ git+https://me:[REDACTED]@h/b.git@c0ffee",
        "# c==2.0 from /no/where",
        "torch==2.13.0+cu130  # content sha256:abc",
    ]


def test_the_environment_has_the_machine_the_interpreter_and_what_counts(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("HF_TOKEN", "planted-in-a-test")
    monkeypatch.setenv("UNRELATED", "x")
    target, _ = _record(tmp_path, repository)
    found = orjson.loads((target / provenance.ENVIRONMENT).read_bytes())
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["cores"] >= 1
    assert found["torch"]["version"].startswith("2.")
    assert found["variables"]["OMP_NUM_THREADS"] == "3"
    assert found["variables"]["HF_TOKEN"] == "[REDACTED]"
    assert "UNRELATED" not in found["variables"]


def test_what_cannot_be_recorded_is_warned_of_and_no_error(
    repository: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    target, store = tmp_path / "provenance", tmp_path / "store"
    target.mkdir()
    store.write_text("a file where a folder should be")
    said = provenance.record(target, repository, tmp_path / "runs", store)
    assert "the code of the run was not recorded" in caplog.text
    assert said["commit"]
    assert (target / provenance.ENVIRONMENT).is_file()
    assert provenance.summary_of(target) == {}


def test_a_file_whose_name_is_not_utf8_is_left_out_by_name(repository: Path, tmp_path: Path) -> None:
    (Path(os.fsdecode(os.fsencode(repository) + b"/caf\xe9.py"))).write_text("x")
    _, found = _record(tmp_path, repository)
    assert [(left.path, left.why) for left in found.left_out] == [("caf\ufffd.py", "its name is not UTF-8")]


def test_a_package_whose_sources_are_on_the_path_is_none_that_pip_could_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.egg-info").mkdir()
    (tmp_path / "mine.egg-info" / "PKG-INFO").write_text("Metadata-Version: 2.4\nName: mine\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    lines = packages.lock(packages.installed()).splitlines()
    assert [line for line in lines if "mine==1.0" in line] == [f"# mine==1.0 from {tmp_path}"]


def test_what_a_package_brings_for_itself_is_not_in_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    brought = tmp_path / "site-packages" / "big" / "thirdparty"
    (brought / "small-1.0.dist-info").mkdir(parents=True)
    (brought / "small-1.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.4\nName: small\nVersion: 1.0\n"
    )
    monkeypatch.syspath_prepend(brought)
    assert "small==1.0" not in packages.lock(packages.installed())


def test_code_that_was_sent_without_git_is_described_by_what_git_said_there(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _write(repository, {"part/run.py": "import near\n", "part/near.py": "", "part/data/x.txt": "1\n"})
    _write(repository, {"part/gone.py": "", "part/ignored.txt": "", "part/.gitignore": "ignored.txt\n"})
    _git(repository, "add", "--force", ".")
    _git(repository, "commit", "-m", "second")
    _write(repository, {"part/data/x.txt": "2\n", "part/.env": "A=1\n", "part/new.txt": ""})
    (repository / "part" / "gone.py").unlink()
    record = shipped.packed(repository / "part", tmp_path / "runs")
    monkeypatch.setattr(shipped, "_MOST", 0)
    short = shipped.packed(repository / "part", tmp_path / "runs")
    assert "too many files" in caplog.text
    assert shipped.packed(tmp_path, tmp_path / "runs") == "", "outside of git"

    there = tmp_path / "there"
    shutil.copytree(repository / "part", there)
    (there / "ignored.txt").unlink()  # as Ray leaves out
    _write(there, {"written/by_a_run.txt": ""})
    monkeypatch.setenv(shipped.FOLDER, str(there))
    monkeypatch.setenv(shipped.RECORD, record)
    target, found = _record(tmp_path, there / "run.py")
    assert (found.kind, found.root, found.script, found.branch) == ("git", str(there), "run.py", "main")
    assert found.commit == _git(repository, "rev-parse", "HEAD")
    assert found.dirty
    assert found.untracked == (".env", "new.txt")
    assert _paths(found) == [".gitignore", "data/x.txt", "near.py", "new.txt", "run.py"]
    assert [(left.path, left.why) for left in found.left_out] == [
        ("ignored.txt", "it was not sent with the folder"),
        (".env", "not in git, and its name suggests secrets"),
    ]
    assert b"+2" in (target / "diff.patch").read_bytes()

    monkeypatch.setenv(shipped.RECORD, short)
    found = provenance.gather(there / "run.py").code
    assert found.commit == _git(repository, "rev-parse", "HEAD")
    assert _paths(found) == ["near.py", "run.py"]
    elsewhere = provenance.gather(repository / "train.py").code
    assert elsewhere.root == str(repository), "other code is not what was sent"


def test_of_a_folder_that_was_sent_nothing_is_told_of_the_rest_of_its_repository(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    part, runs = repository / "part", tmp_path / "runs"
    _write(part, {"run.py": "x = 1\n"})
    _git(repository, "add", ".")
    _git(repository, "commit", "-m", "second")
    _write(repository, {"train.py": "private\n", "new.py": ""})
    monkeypatch.setenv(shipped.FOLDER, str(part))

    def told() -> CodeOnDisk:
        monkeypatch.setenv(shipped.RECORD, shipped.packed(part, runs))
        found = shipped.find(part / "run.py")
        assert found is not None
        return found

    clean = told()
    assert (clean.code.dirty, clean.code.untracked, clean.diff) == (False, (), b"")
    (part / "run.py").write_text("x = 2\n")
    changed = told()
    assert changed.code.dirty
    assert changed.diff.startswith(b"diff --git a/run.py b/run.py\n")
    assert b"private" not in changed.diff

    (part / "run.py").write_text("\n".join(uuid.uuid4().hex for _ in range(3000)))
    assert told().diff == b""
    assert "too many differences from its commit" in caplog.text


def test_what_another_version_said_of_the_code_that_it_sent_is_understood(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write(tmp_path, {"run.py": ""})
    monkeypatch.setenv(shipped.FOLDER, str(tmp_path))
    monkeypatch.setenv(shipped.RECORD, shipped._text({"commit": "abc", "since": "a later version"}))
    found = provenance.gather(tmp_path / "run.py").code
    assert (found.commit, _paths(found)) == ("abc", ["run.py"])
