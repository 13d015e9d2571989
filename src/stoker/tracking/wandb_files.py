"""Reads the `.wandb` files that W&B writes for an offline run.

W&B has no public reader for them. After a header of seven bytes they are in LevelDB's log format (blocks of
32 KiB; a record consists of checksum, length, kind and content, and may span blocks), and each record is a
W&B protocol buffer. If the writer was killed, a file may end within a record; it is read up to that record.
https://github.com/google/leveldb/blob/main/doc/log_format.md
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_FILE_HEADER = 7
_BLOCK = 32 * 1024
_RECORD_HEADER = 7
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


def of_run(folder: Path, run: str) -> list[Path]:
    """The files of the run with this id, in the order of their creation."""
    return sorted(folder.glob(f"wandb/*run-*-{run}/run-{run}.wandb"))


def records(file: Path) -> Iterator[Any]:
    """The complete records of a file, as `wandb_internal_pb2.Record`."""
    from google.protobuf.message import DecodeError
    from wandb.proto import wandb_internal_pb2

    for content in _contents(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        try:
            record.ParseFromString(content)
        except DecodeError:
            return
        yield record


def history(file: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file: a number, a text, or a description of a media item, by key."""
    for record in records(file):
        if record.WhichOneof("record_type") == "history":
            row: dict[str, Any] = {}
            for item in record.history.item:
                name, *inside = item.nested_key or [item.key]
                value = json.loads(item.value_json)  # reads NaN and Infinity too
                if inside:
                    row.setdefault(name, {})["/".join(inside)] = value
                else:
                    row[name] = value
            yield row


def _contents(data: bytes) -> Iterator[bytes]:
    position, parts = _FILE_HEADER, b""
    while position + _RECORD_HEADER <= len(data):
        left = _BLOCK - position % _BLOCK
        if left < _RECORD_HEADER:  # too short for a record: padding
            position += left
            continue
        length = int.from_bytes(data[position + 4 : position + 6], "little")
        kind = data[position + 6]
        content = data[position + _RECORD_HEADER : position + _RECORD_HEADER + length]
        if kind not in (_FULL, _FIRST, _MIDDLE, _LAST) or len(content) < length:
            return
        position += _RECORD_HEADER + length
        parts = content if kind in (_FULL, _FIRST) else parts + content
        if kind in (_FULL, _LAST):
            yield parts
