"""Remembers, in the user's cache, which contents contain nothing that looks like a secret.

Scanning for secrets costs several times as much as reading and hashing, and most files of a repository have
not changed since the last start. Only digests are kept. The values of secret variables are not covered:
they are searched for in every file each time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Set as AbstractSet
from pathlib import Path

import xxhash
from stoker import redaction, storage

_MOST = 500_000  # digests, of 16 bytes each
_SIZE = 16


def digest(path: str, data: bytes) -> bytes:
    """The digest of a content, together with the file's extension, which decides how it is scanned."""
    return xxhash.xxh3_128_digest(data, seed=int(redaction.is_code(path)))


def known() -> frozenset[bytes]:
    """The digests of contents that were scanned, by the rules of this version."""
    try:
        content = _file().read_bytes()
    except OSError:
        return frozenset()
    rules = redaction.rules()
    if not content.startswith(rules) or (len(content) - len(rules)) % _SIZE:
        return frozenset()
    return frozenset(content[at : at + _SIZE] for at in range(len(rules), len(content), _SIZE))


def remember(before: AbstractSet[bytes], fresh: AbstractSet[bytes]) -> None:
    """Add digests; if there are too many, forget the old ones."""
    if not fresh:
        return
    kept = fresh if len(before) + len(fresh) > _MOST else before | fresh
    with contextlib.suppress(OSError):
        _file().parent.mkdir(parents=True, exist_ok=True)
        storage.write_atomically(_file(), redaction.rules() + b"".join(kept))


def _file() -> Path:
    return storage.cache_folder() / "without-secrets"
