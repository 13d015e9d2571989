"""The code that a run was made from: which files, and how they were found.

In a git repository it is what git would commit if everything were added: tracked, modified and untracked
files that git does not ignore, including those of submodules and nested repositories. Outside git it is the
script and the modules that it imports from its folder or its package, found by parsing them: nothing is
imported.
"""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from stoker import machine, redaction

_MOST_DIFF = 16 * 2**20  # bytes of a diff to keep: the bundle contains the files themselves
_OF_A_FILE = re.compile(r"^(?=diff --git )", re.MULTILINE)
_DEEPEST = 8  # levels of nested repositories

Kind = Literal["git", "modules"]


@dataclass(frozen=True)
class File:
    """A file of the bundle, by its path relative to the root."""

    path: str
    bytes: int
    xxh3: str
    mode: str = "100644"
    """As in git: 100644, 100755, or 120000 for a symbolic link, whose content is its target."""


@dataclass(frozen=True)
class LeftOut:
    """A file of the code that is not in the bundle, and the reason."""

    path: str
    bytes: int | None
    """For a link, those of the file that it points to; None if unknown."""
    why: str


@dataclass(frozen=True)
class Code:
    """The contents of `code.json`."""

    kind: Kind
    root: str
    """The repository, or the folder of the script or of its outermost package, as an absolute path."""
    cwd: str | None = None
    """The working directory, relative to the root; None if it is outside."""
    script: str | None = None
    """The script that was run, relative to the root, if there is one."""
    commit: str | None = None
    branch: str | None = None
    remote: str | None = None
    dirty: bool = False
    untracked: tuple[str, ...] = ()
    files: tuple[File, ...] = ()
    bundle: str | None = None
    """The archive of the files, next to `code.json`."""
    bundle_xxh3: str | None = None
    left_out: tuple[LeftOut, ...] = ()
    redacted: tuple[str, ...] = ()
    """The files whose text differs from the one on disk, because secrets were removed."""


@dataclass(frozen=True)
class CodeOnDisk:
    """Code on disk, before any of it is read."""

    code: Code
    paths: tuple[str, ...]
    """Relative to the root, sorted."""
    diff: bytes = b""
    """The differences from the commit as text, without secrets."""
    unread: tuple[LeftOut, ...] = ()


def find(source: Path, runs: Path | None = None) -> CodeOnDisk:
    """The code of a script, or of the repository that contains a folder.

    Args:
        source: the script, or a folder.
        runs: the folder of the runs, which is not code, whatever git says.
    """
    source = Path(os.path.realpath(source))
    script = source if source.is_file() else None
    folder = source.parent if script else source
    top = _git(folder, "rev-parse", "--show-toplevel")
    if top is None:
        return outside_of_git(source, _import_folder(script) if script else folder)
    return _repository(Path(top.rstrip("\n")), script, _within(top.rstrip("\n"), runs))


def _repository(root: Path, script: Path | None, runs: str | None) -> CodeOnDisk:
    def outside_of_runs(paths: Iterable[str]) -> list[str]:
        return [path for path in paths if runs is None or not f"{path}/".startswith(runs)]

    with ThreadPoolExecutor(4) as threads:
        listing = threads.submit(_list, root)
        diff = threads.submit(differences, root)
        head = threads.submit(_git, root, "rev-parse", "HEAD", "--abbrev-ref", "HEAD")
        remote = threads.submit(_git, root, "config", "--get", "remote.origin.url")
    listed = listing.result()
    untracked = outside_of_runs(listed.untracked)
    paths = {*outside_of_runs(listed.tracked), *untracked}
    own = _within(root, script)
    if script and own and own.rstrip("/") not in paths:  # it is run even if git ignores it
        paths.update(_imported(script, root))
    commit, branch = (head.result() or "").split() or (None, None)
    address = (remote.result() or "").strip()
    code = Code(
        kind="git",
        root=str(root),
        cwd=_relative(Path.cwd(), root),
        script=_relative(script, root) if script else None,
        commit=commit,
        branch=branch,
        remote=_without_user(redaction.text(address)) or None,
        dirty=bool(diff.result() or untracked or commit is None),
        untracked=tuple(sorted(untracked)),
    )
    return CodeOnDisk(code, tuple(sorted(paths)), diff.result(), tuple(listed.unread))


def outside_of_git(source: Path, folder: Path) -> CodeOnDisk:
    """The code of a script in a folder: what it imports from there."""
    script = source if source.is_file() else None
    code = Code(
        kind="modules",
        root=str(folder),
        cwd=_relative(Path.cwd(), folder),
        script=_relative(script, folder) if script else None,
    )
    return CodeOnDisk(code, tuple(sorted(_imported(script, folder))) if script else ())


_COMPILED = "--exclude=__pycache__/"  # Python's own files, which change with every change of a source


@dataclass
class _Listing:
    """The files of a repository and of nested ones, relative to the outermost."""

    tracked: list[str] = field(default_factory=list)
    untracked: list[str] = field(default_factory=list)
    unread: list[LeftOut] = field(default_factory=list)


def _list(root: Path, prefix: str = "", depth: int = 0) -> _Listing:
    """The files that git lists, including those in submodules and nested repositories."""
    with ThreadPoolExecutor(2) as threads:
        cached = threads.submit(_git, root, "ls-files", "-z", "--cached")
        others = threads.submit(_git, root, "ls-files", "-z", "--others", "--exclude-standard", _COMPILED)
    found = _Listing()
    for listed, into in ((cached.result(), found.tracked), (others.result(), found.untracked)):
        for name in dict.fromkeys((listed or "").split("\0")):  # an unmerged file is listed three times
            path = root / name
            if name and (path.is_symlink() or not path.is_dir()):
                into.append(prefix + name)
            elif name and depth < _DEEPEST and (path / ".git").exists():
                inner = _list(path, f"{prefix}{name.rstrip('/')}/", depth + 1)
                into.extend(inner.tracked)
                found.untracked.extend(inner.untracked)
                found.unread.extend(inner.unread)
            elif name:
                found.unread.append(
                    LeftOut(prefix + name.rstrip("/"), None, "a repository that is not checked out")
                )
    return found


def differences(folder: Path) -> bytes:
    """The differences from the commit within a folder of a repository, without secrets.

    Their paths are relative to the folder. Empty if there are none, or no commit.
    """
    options = ("--relative", "--no-color", "--no-ext-diff", "--no-textconv")
    said = _git(folder, "-c", "core.quotepath=off", "diff", "HEAD", *options) or ""
    if len(said) > _MOST_DIFF:
        more = len(said) - _MOST_DIFF
        said = f"{said[:_MOST_DIFF]}\n... and {more:,} more characters: code.tar.gz has the files\n"
    return "".join(map(_without_secrets, _OF_A_FILE.split(said))).encode("utf-8", "surrogateescape")


def _without_secrets(changes: str) -> str:
    """The differences in one file, redacted by the same rules as that file in the bundle."""
    named = changes.partition("\n")[0].rstrip('"')  # `diff --git a/train.py b/train.py`
    return redaction.text(changes, code=redaction.is_code(named))


def _imported(script: Path, folder: Path) -> Iterator[str]:
    """A script and all modules that it imports, directly or indirectly, from its own folder or package."""
    seen: set[Path] = set()
    top = _import_folder(script)
    parts = script.parent.relative_to(top).parts
    package = parts[0] if parts else None  # not its neighbours, which can be all that is installed
    within = (parent for parent in script.parents if parent != top and parent.is_relative_to(top))
    ahead = [script, *(parent / "__init__.py" for parent in within)]
    while ahead:
        file = ahead.pop()
        if file in seen or not file.is_relative_to(folder):
            continue
        seen.add(file)
        yield str(file.relative_to(folder))
        ahead += _imports(file, script.parent, top, package)


def _import_folder(script: Path) -> Path:
    """The folder that a script's outermost package is in, or else its own folder."""
    return next(parent for parent in script.parents if not (parent / "__init__.py").is_file())


def _imports(file: Path, folder: Path, top: Path, package: str | None) -> Iterator[Path]:
    """The files that a module's import statements refer to, including those in functions.

    They are those below a folder, and those of a package in another folder.
    """
    try:
        parsed = ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError):  # an extension module, or not valid in this version of Python
        return
    for node in ast.walk(parsed):
        if isinstance(node, ast.Import):
            named = [(alias.name.split("."), folder) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = file.parents[node.level - 1] if node.level else folder
            parts = node.module.split(".") if node.module else []
            named = [([*parts, alias.name], base) for alias in node.names]
        else:
            continue
        for parts, base in named:
            yield from _files_of(parts, base)
            if base == folder and parts[0] == package:
                yield from _files_of(parts, top)


def _files_of(parts: list[str], base: Path) -> Iterator[Path]:
    """The packages along a dotted name, and the module itself if it is one."""
    place = base
    for part in parts:
        place = place / part
        if place.with_name(f"{part}.py").is_file():
            yield place.with_name(f"{part}.py")
        if not place.is_dir():
            yield from place.parent.glob(f"{part}.*.so")  # compiled
            return
        if (place / "__init__.py").is_file():
            yield place / "__init__.py"


def _within(root: Path | str, path: Path | None) -> str | None:
    """A path relative to a root, with a trailing slash; None if it is the root, or not inside it."""
    relative = _relative(Path(os.path.realpath(path)), Path(root)) if path is not None else None
    return f"{relative}/" if relative not in (None, ".") else None


def _relative(path: Path, root: Path) -> str | None:
    path = Path(os.path.realpath(path))
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else None


def _without_user(address: str) -> str:
    """An HTTP address without the user, which can be a token."""
    scheme, separator, rest = address.partition("://")
    host, slash, path = rest.partition("/")
    if not separator or scheme == "ssh":
        return address
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"


def _git(folder: Path, *arguments: str) -> str | None:
    return machine.output(["git", "--no-optional-locks", "-C", str(folder), *arguments])


def module_file(folder: Path, module: str) -> Path | None:
    """The source file of a module of a package in a folder; None if it is not there."""
    place = folder.joinpath(*module.split("."))
    files = (place / "__init__.py", place.with_name(f"{place.name}.py"))
    return next((file for file in files if file.is_file()), None)


def from_json(said: dict[str, Any]) -> Code:
    """The contents of `code.json`, as written. Raises TypeError or KeyError for anything else."""
    parts = {key: value for key, value in said.items() if key in Code.__dataclass_fields__}
    for key, kind in (("files", File), ("left_out", LeftOut)):
        parts[key] = tuple(kind(**item) for item in said.get(key, ()))
    for key in ("untracked", "redacted"):
        parts[key] = tuple(said.get(key, ()))
    return Code(**parts)
