"""The code of a run in a folder that was sent to its machine without git: git's record of it travels along.

Where the folder is sent from, the record is packed into a text that fits into an environment variable.
"""

from __future__ import annotations

import base64
import logging
import os
import zlib
from pathlib import Path
from typing import Any

import orjson
from stoker.reproduce import code
from stoker.reproduce.code import CodeOnDisk, LeftOut

log = logging.getLogger("stoker")

RECORD = "STOKER_SHIPPED_CODE"
"""The variable that has what `packed` returned."""
FOLDER = "STOKER_SHIPPED_TO"
"""The variable that names the folder on the machine that it was sent to."""

_UNSENT = "it was not sent with the folder"
_MOST = 48 * 2**10  # characters: Linux allows 128 KiB for a variable, and Ray passes on all of a job's in one


def packed(folder: Path, runs: Path) -> str:
    """What git says about a folder that is about to be sent; empty outside of git.

    It is about this folder alone, whatever else the repository has. If it is too long, it is without the
    differences from the commit, and then without the list of files, with a warning.

    Args:
        runs: the folder of the runs, which is not code.
    """
    found = code.find(folder, runs)
    if found.code.kind != "git":
        return ""
    root = Path(os.path.realpath(folder))
    inside = root.relative_to(found.code.root).as_posix()
    prefix = "" if inside == "." else f"{inside}/"

    def within(paths: tuple[str, ...]) -> list[str]:
        return [path.removeprefix(prefix) for path in paths if path.startswith(prefix)]

    known, untracked = found.code, within(found.code.untracked)
    diff = code.differences(root) if prefix else found.diff
    said: dict[str, Any] = {
        "commit": known.commit, "branch": known.branch, "remote": known.remote,
        "dirty": bool(diff or untracked or known.commit is None), "untracked": untracked,
        "paths": [path for path in within(found.paths) if not _is_missing(root, path)],  # not deleted ones
        "diff": diff.decode(errors="replace"),
    }  # fmt: skip
    if len(text := _text(said)) <= _MOST:
        return text
    if len(text := _text(said | {"diff": ""})) <= _MOST:
        log.warning(
            "%s has too many differences from its commit for them to be sent along: the run will record its "
            "files, but no diff.patch",
            folder,
        )
        return text
    log.warning(
        "%s has too many files for their list to be sent along: of its code the run will record the commit, "
        "and the modules that it imports",
        folder,
    )
    return _text(said | {"diff": "", "untracked": (), "paths": ()})


def _text(said: dict[str, Any]) -> str:
    return base64.b64encode(zlib.compress(orjson.dumps(said), 9)).decode()


def find(source: Path) -> CodeOnDisk | None:
    """The code of a script, or of a folder, that was sent here with a record; None for other code."""
    record, folder = os.environ.get(RECORD), os.environ.get(FOLDER)
    source = Path(os.path.realpath(source))
    if not record or not folder or not source.is_relative_to(root := Path(os.path.realpath(folder))):
        return None
    said = orjson.loads(zlib.decompress(base64.b64decode(record)))
    found = code.outside_of_git(source, root)
    here = {"kind": "git", "root": str(root), "cwd": found.code.cwd, "script": found.code.script}
    paths = frozenset(said.get("paths", ()))
    unsent = tuple(LeftOut(path, None, _UNSENT) for path in sorted(paths) if _is_missing(root, path))
    if found.code.script not in paths:
        paths |= frozenset(found.paths)
    return CodeOnDisk(
        code.from_json(said | here), tuple(sorted(paths)), said.get("diff", "").encode(), unsent
    )


def _is_missing(root: Path, path: str) -> bool:
    """Whether a listed file does not exist; False for a name that is not UTF-8, as its list says another."""
    return not os.path.lexists(root / path) and "\ufffd" not in path
