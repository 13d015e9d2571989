"""The image recipe on files as people have them: real processes, and what they say."""

from __future__ import annotations

import io
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from commands import Command

SHORT = ("image_size=16", "batch_size=8", "workers=0", "epochs=none", "max_steps=2", "checkpoint_every=2")


def _pngs(count: int) -> list[bytes]:
    drawn, found = random.Random(0), []
    for _ in range(count):
        held = io.BytesIO()
        Image.frombytes("RGB", (8, 8), bytes(drawn.randrange(256) for _ in range(192))).save(held, "png")
        found.append(held.getvalue())
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for n, image in enumerate(_pngs(40)):
        file = tmp_path / "data" / ("cat", "dog")[n % 2] / f"{n}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(image)
    return tmp_path / "data"


def test_a_run_says_what_its_images_are(stoker: Command, folder: Path) -> None:
    (folder / "cat" / "notes.txt").write_text("striped")
    done = stoker("train", "image", f"data={folder}", *SHORT)
    assert done.code == 0, done.err
    assert f"data: {folder}, 40 images, 2 classes, the largest," in done.err
    assert "left out: 1 file (1 .txt)" in done.err


def test_parquet_columns_are_chosen_by_keys(stoker: Command, tmp_path: Path) -> None:
    file = tmp_path / "cifar.parquet"
    pq.write_table(pa.table({"img": _pngs(40), "fine_label": [n % 2 for n in range(40)]}), file)
    refused = stoker("train", "image", f"data={file}", *SHORT)
    assert refused.code == 2
    assert "no column 'label': set label_column=" in refused.err
    done = stoker("train", "image", f"data={file}", "image_column=img", "label_column=fine_label", *SHORT)
    assert done.code == 0, done.err


@pytest.mark.parametrize("workers", ["0", "2"])
def test_an_image_that_is_no_image_is_named_last(stoker: Command, folder: Path, workers: str) -> None:
    """No traceback of a worker follows the message that says what to do."""
    for file in folder.rglob("*.png"):
        file.write_bytes(b"nothing of the kind")
    done = stoker("train", "image", f"data={folder}", *SHORT, f"workers={workers}")
    assert done.code == 2, done.err
    assert "is not a readable image" in done.err.splitlines()[-1]
    assert "Traceback" not in done.err
