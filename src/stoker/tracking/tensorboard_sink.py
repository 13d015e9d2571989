"""The TensorBoard sink: event files in the run's own directory, under `tensorboard/`.

Event files are append-only, and TensorBoard would show a repeated point twice. So the mark holds the size of
each file after the last recorded batch: whatever a killed follower wrote after it is cut off, and written
again. This does not need torch.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson
from stoker import storage
from stoker.run import media
from stoker.run.directory import RunDirectory
from stoker.tracking import sink
from stoker.tracking.sink import Batch, Ending, SinkRun
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import HistogramProto, Summary
from tensorboard.plugins.hparams import summary_v2 as hparams
from tensorboard.plugins.text import metadata as texts
from tensorboard.summary.writer.event_file_writer import EventFileWriter
from tensorboard.util import tensor_util

_FLUSH_SECONDS = 3600  # effectively never: batches are flushed explicitly
_LARGEST_SHOWN_TABLE = 100  # rows
_CONFIG = "stoker/config"


class TensorBoardSink:
    """A run in TensorBoard: scalars, images, histograms, texts, hparams.

    Tags, notes, artifacts and the final status are written as texts.
    """

    def __init__(self, directory: RunDirectory) -> None:
        self._directory = directory
        self._folder = directory.path / "tensorboard"
        self._record = directory.record()
        self._writer: EventFileWriter | None = None
        self._lines = 0

    def open(self, known: str | None, started: float, mark: Any, edition: str) -> SinkRun:
        """Truncate the files of earlier followers to their recorded sizes, and begin a new file."""
        run = f"{self._record['uid']}-{edition}" if edition else self._record["uid"]
        if edition and known != run:
            self._put_aside(edition)
        self._folder.mkdir(exist_ok=True)
        sizes = dict((mark or {}).get("sizes", {})) if known is not None else {}
        self._lines = (mark or {}).get("lines", 0) if known is not None else 0
        for file in self._files():
            if file.name in sizes:
                os.truncate(file, min(sizes[file.name], file.stat().st_size))
            else:
                file.unlink()
        self._writer = EventFileWriter(str(self._folder), flush_secs=_FLUSH_SECONDS)
        if not sizes:
            self._write_config(started)
        return SinkRun(run, str(self._folder))

    def ship(self, batch: Batch) -> Any:
        """Write a batch and flush it; returns the mark, with the size of each file."""
        for point in batch.points:
            value = Summary.Value(tag=point.metric, simple_value=point.value)
            self._add(value, point.step, point.time)
        for event in batch.media:
            value = self._shown(event)
            if value is not None:
                self._add(value, event["step"], event["time"])
        for name, text in _texts(batch):
            self._add_text(name, text)
        return self._flushed()

    def conclude(self, ending: Ending) -> None:
        """Write the run's final status as a text."""
        self._add_text("stoker/status", ending.status, ending.time)
        self._flushed()

    def close(self) -> None:
        if self._writer is not None:
            writer, self._writer = self._writer, None
            writer.close()

    def _put_aside(self, edition: str) -> None:
        """Rename the folder of the replaced files, once, to a name that TensorBoard still shows."""
        aside = self._folder.with_name(f"tensorboard.replaced_by.{edition}")
        if self._folder.is_dir() and not aside.exists():
            self._folder.rename(aside)

    def _flushed(self) -> dict[str, Any]:
        self._open_writer.flush()
        for file in self._files():
            storage.sync_file(file)  # the mark, which is stored next, must not be ahead of it
        return {"sizes": {file.name: file.stat().st_size for file in self._files()}, "lines": self._lines}

    @property
    def _open_writer(self) -> EventFileWriter:
        assert self._writer is not None, "open comes first"
        return self._writer

    def _files(self) -> list[Path]:
        return sorted(self._folder.glob("events.out.tfevents.*"))

    def _add(self, value: Any, step: int, time: float) -> None:
        event = Event(wall_time=time, step=step, summary=Summary(value=[value]))
        self._open_writer.add_event(event)

    def _add_text(self, name: str, text: str, time: float | None = None) -> None:
        """Write a text without a step; a running number takes its place."""
        self._lines += 1
        self._add(_text(name, text), self._lines, time or self._directory.record_file.stat().st_mtime)

    def _write_config(self, started: float) -> None:
        """Write the config as hyperparameters, and as a table for reading."""
        config = self._record["config"]
        shown = {key: v if isinstance(v, str | bool | int | float) else str(v) for key, v in config.items()}
        for value in hparams.hparams_pb(shown, start_time_secs=started).value:
            self._add(value, 0, started)
        rows = [f"|{key}|{_cell(value)}|" for key, value in config.items()]
        code = self._record.get("code") or {}
        rows += [f"|git commit|{code['commit']}|"] if code.get("commit") else []
        self._add(_text(_CONFIG, "\n".join(["|key|value|", "|-|-|", *rows])), 0, started)

    def _shown(self, event: Mapping[str, Any]) -> Any:
        """The TensorBoard value for a media event; None if its file is missing."""
        name, about = sink.key(event), event["about"]
        if event["kind"] == "histogram":
            return _histogram(name, about)
        file = self._directory.path / event["file"]["path"]
        with contextlib.suppress(FileNotFoundError):
            content = file.read_bytes()
            if event["kind"] == "text":
                return _text(name, content.decode())
            if event["kind"] == "table":
                return _text(name, _markdown(content))
            if file.suffix == ".png":
                return _image(name, content)
            return _text(name, f"A Plotly figure: {file}")
        return None


def _texts(batch: Batch) -> list[tuple[str, str]]:
    """The parts of a batch that are written as texts, by name."""
    said = [(f"stoker/params/{name}", str(value)) for name, value in batch.params.items()]
    said += [(f"stoker/tags/{name}", value or "(removed)") for name, value in batch.tags.items()]
    said += [("stoker/notes", "\n\n".join(batch.notes))] if batch.notes else []
    for name, event in batch.artifacts.items():
        files = "\n".join(f"|{f['path']}|{f['size']}|`{f['sha256']}`|" for f in event["files"])
        said.append((f"stoker/artifacts/{name}", f"|file|bytes|SHA-256|\n|-|-|-|\n{files}"))
    return said


def _text(name: str, text: str) -> Any:
    return Summary.Value(
        tag=name,
        metadata=texts.create_summary_metadata(display_name=name, description=""),
        tensor=tensor_util.make_tensor_proto([text.encode()]),
    )


def _image(name: str, png: bytes) -> Any:
    from PIL import Image

    with Image.open(io.BytesIO(png)) as picture:
        width, height, channels = picture.width, picture.height, len(picture.getbands())
    image = Summary.Image(height=height, width=width, colorspace=channels, encoded_image_string=png)
    return Summary.Value(tag=name, image=image)


def _histogram(name: str, about: Mapping[str, Any]) -> Any:
    """A histogram in TensorBoard's older format: upper edges and counts of the buckets."""
    edges, counts = about["edges"], about["counts"]
    centres = [(low + high) / 2 for low, high in itertools.pairwise(edges)]
    proto = HistogramProto(
        min=edges[0], max=edges[-1], num=sum(counts),
        sum=sum(c * n for c, n in zip(centres, counts, strict=True)),
        sum_squares=sum(c * c * n for c, n in zip(centres, counts, strict=True)),
        bucket_limit=edges[1:], bucket=counts,
    )  # fmt: skip
    return Summary.Value(tag=name, histo=proto)


def _markdown(parquet: bytes) -> str:
    columns, rows = media.read_table(parquet)
    shown = [f"|{'|'.join(_cell(cell) for cell in row)}|" for row in rows[:_LARGEST_SHOWN_TABLE]]
    lines = [f"|{'|'.join(map(_cell, columns))}|", "|" + "-|" * len(columns), *shown]
    more = len(rows) - len(shown)
    return "\n".join([*lines, f"\n{more:,} more rows" if more else ""])


def _cell(value: Any) -> str:
    text = value if isinstance(value, str) else orjson.dumps(value, default=str).decode()
    return text.replace("|", "\\|").replace("\n", "<br>")
