from __future__ import annotations

import subprocess
from pathlib import Path

import orjson
import pytest
from stoker.reproduce import provenance


def _git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    done = subprocess.run(
        ["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    folder = tmp_path / "repository"
    folder.mkdir()
    _git(folder, "init", "-b", "main")
    (folder / "train.py").write_text("print(1)\n")
    _git(folder, "add", ".")
    _git(folder, "commit", "-m", "first")
    return folder


def test_a_clean_repository_is_its_commit(repository: Path) -> None:
    found = provenance.code_state(repository)
    assert found["commit"] == _git(repository, "rev-parse", "HEAD")
    assert found["branch"] == "main"
    assert found["dirty"] is False


def test_changes_are_kept_as_a_diff_and_new_files_named(repository: Path, tmp_path: Path) -> None:
    (repository / "train.py").write_text("print(2)\n")
    (repository / "new.py").write_text("x")
    target = tmp_path / "provenance"
    target.mkdir()
    code = provenance.code_state(repository)
    provenance.write(target, repository, code)
    assert code["dirty"] is True
    assert code["untracked"] == ["new.py"]
    assert "-print(1)\n+print(2)" in (target / "diff.patch").read_text()
    assert orjson.loads((target / "git.json").read_bytes())["commit"] == code["commit"]
    assert any(line.startswith("torch==") for line in (target / "packages.txt").read_text().splitlines())
    assert orjson.loads((target / "hardware.json").read_bytes())["cores"] >= 1


def test_credentials_in_the_remote_are_left_out(repository: Path) -> None:
    _git(repository, "remote", "add", "origin", "https://user:secret@example.com/a.git")
    assert provenance.code_state(repository)["remote"] == "https://example.com/a.git"


def test_outside_git_nothing_is_claimed(tmp_path: Path) -> None:
    assert provenance.code_state(tmp_path) == {}
