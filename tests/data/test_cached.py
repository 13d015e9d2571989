from __future__ import annotations

from pathlib import Path

import pytest
from stoker.data import cached


def test_what_an_earlier_version_has_cached_is_found_again() -> None:
    assert cached.name("a", 1, None, (2.5, "é"), {"b": True}) == "4c56b8b4d397657e5ca51f2b878dadaf"
    assert cached.name("a") != cached.name("a", "")


def _fill(made: Path) -> None:
    made.mkdir()
    for name in ("a", "b"):
        (made / name).write_text(name)


def _read(folder: Path) -> str:
    return "".join((folder / name).read_text() for name in ("a", "b"))


def test_a_folder_that_lacks_a_file_is_made_again(tmp_path: Path) -> None:
    """As where what is old is removed from a cache, file by file."""
    target = tmp_path / "kept"
    for _ in range(2):
        assert cached.opened(target, _fill, _read) == "ab"
        (target / "b").unlink()
    assert cached.opened(target, _fill, _read) == "ab"


def test_what_can_never_be_opened_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        cached.opened(tmp_path / "kept", _fill, lambda made: (made / "c").read_text())
