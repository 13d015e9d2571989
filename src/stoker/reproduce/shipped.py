"""The code of a run in a folder that was sent to its machine without git: git's record of it travels along.

Where the folder is sent from, the record is packed into a text that fits into an environment variable.
"""

from __future__ import annotations

import base64
import dataclasses
import logging
import os
import zlib
from pathlib import Path
from typing import Any

import orjson
from stoker.reproduce import code
from stoker.reproduce.code import Code, Found

log = logging.getLogger("stoker")

RECORD = "STOKER_SHIPPED_CODE"
"""The variable that has what `packed` returned."""
FOLDER = "STOKER_SHIPPED_TO"
"""The variable that names the folder on the machine that it was sent to."""

_MOST = 48 * 2**10  # characters: Linux allows 128 KiB for a variable, and Ray passes on all of a job's in one


def packed(folder: Path, runs: Path) -> str:
    """What git says about a folder that is about to be sent; empty outside of git.

    If it is too long, it is without the differences from the commit, and then without the list of files.

    Args:
        runs: the folder of the runs, which is not code.
    """
    found = code.find(folder, runs)
    if found.code.kind != "git":
        return ""
    inside = Path(os.path.realpath(folder)).relative_to(found.code.root).as_posix()
    prefix = "" if inside == "." else f"{inside}/"

    def within(paths: tuple[str, ...]) -> list[str]:
        return [path.removeprefix(prefix) for path in paths if path.startswith(prefix)]

    known = found.code
    said: dict[str, Any] = {
        "commit": known.commit, "branch": known.branch, "remote": known.remote, "dirty": known.dirty,
        "untracked": within(known.untracked), "paths": within(found.paths),
        "diff": found.diff.decode(errors="replace"),
    }  # fmt: skip
    for less in ({}, {"diff": ""}):
        if len(text := _text(said | less)) <= _MOST:
            return text
    log.warning(
        "%s has too many files for their list to be sent along: of its code the run will record the commit, "
        "and the modules that it imports",
        folder,
    )
    return _text(said | {"diff": "", "untracked": (), "paths": ()})


def _text(said: dict[str, Any]) -> str:
    return base64.b64encode(zlib.compress(orjson.dumps(said), 9)).decode()


def find(source: Path) -> Found | None:
    """The code of a script, or of a folder, that was sent here with a record; None for other code."""
    record, folder = os.environ.get(RECORD), os.environ.get(FOLDER)
    source = Path(os.path.realpath(source))
    if not record or not folder or not source.is_relative_to(root := Path(os.path.realpath(folder))):
        return None
    said = orjson.loads(zlib.decompress(base64.b64decode(record)))
    paths, diff = frozenset(said.pop("paths")), said.pop("diff").encode()
    found = code.outside_of_git(source, root)
    if found.code.script not in paths:
        paths |= frozenset(found.paths)
    described = Code(
        **{**said, "untracked": tuple(said["untracked"])},
        kind="git", root=str(root), cwd=found.code.cwd, script=found.code.script,
    )  # fmt: skip
    return dataclasses.replace(found, code=described, paths=tuple(sorted(paths)), diff=diff)
