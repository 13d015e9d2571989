"""The image recipe from end to end: what it exports, in plain transformers and as a model to go on with."""

from __future__ import annotations

import base64
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from stoker import exports
from stoker.cli import sharing
from stoker.data import images
from stoker.integrations import mlflow as served
from transformers import pipeline

from commands import Command
from support import loaded

CLASSES = "abcdefghijkl"
Squares = list[tuple[Image.Image, str]]
TRAIN = ("train", "image", "precision=fp32", "workers=0")


@pytest.fixture(scope="module")
def squares() -> Squares:
    """Noise with a white square, whose place is the class."""
    drawn, made = np.random.default_rng(0), []
    for number in range(len(CLASSES) * 20):
        row, column = divmod(number % len(CLASSES), 4)
        pixels = drawn.integers(0, 60, (32, 32, 3), dtype=np.uint8)
        pixels[row * 10 : row * 10 + 10, column * 8 : column * 8 + 8] = 255
        made.append((Image.fromarray(pixels), CLASSES[number % len(CLASSES)]))
    return made


def as_folders(squares: Squares, folder: Path) -> Path:
    for number, (image, label) in enumerate(squares):
        (folder / label).mkdir(parents=True, exist_ok=True)
        image.save(folder / label / f"{number}.png")
    return folder


def as_parquet(squares: Squares, file: Path) -> Path:
    """Of a hub dataset, which numbers its classes in an order of its own."""
    kinds = {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(reversed(CLASSES)))}
    columns = {"image": [image for image, _ in squares], "label": [label for _, label in squares]}
    datasets.Dataset.from_dict(columns, features=datasets.Features(kinds)).to_parquet(file)
    return file


@pytest.mark.soak(small=False)
def test_a_model_goes_on_with_its_own_classes_whatever_their_order_in_the_data(
    stoker: Command, squares: Squares, tmp_path: Path
) -> None:
    folder, file = (
        as_folders(squares, tmp_path / "squares"),
        as_parquet(squares, tmp_path / "squares.parquet"),
    )
    first = stoker(
        *TRAIN, f"data={folder}", "epochs=20", "batch_size=32", "eval_every=20ep", "image_size=32",
        "flip=false", "--name", "first",
    )  # fmt: skip
    assert first.code == 0, first.err
    known = loaded(tmp_path / "runs/image/first").newest()
    assert known["test_accuracy"] > 0.8
    model = f"model={tmp_path / 'runs/image/first/artifacts/model'}"
    second = stoker(*TRAIN, f"data={file}", model, "max_steps=1", "lr=1e-9", "test=0.4", "--name", "second")
    assert second.code == 0, second.err
    assert loaded(tmp_path / "runs/image/second").newest()["test_accuracy"] > 0.8
    assert "last layer" not in second.err
    (folder / "l").rename(folder / "z")
    third = stoker(*TRAIN, f"data={folder}", model, "max_steps=1", "--name", "third")
    assert third.code == 0, third.err
    assert "stoker: warning: the last layer is new: the model's was for other classes (a, b, c" in third.err
    assert "LOAD REPORT" not in third.err


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("here") / "runs"


@pytest.fixture
def digits(stoker: Command, runs: Path) -> Path:
    """A run that is trained once for this module."""
    run = runs / "image" / "digits"
    if not (run / "artifacts" / "report.html").exists():
        done = stoker(*TRAIN, "epochs=1", "--name", "digits", "--runs", str(runs))
        assert done.code == 0, done.err
    return run


def test_a_pipeline_of_transformers_has_the_accuracy_of_the_test(digits: Path) -> None:
    classify = pipeline("image-classification", model=str(digits / "artifacts" / "model"))
    source = images.read("digits")
    numbers = images.split(source, validation=0.1, test=0.1).test.tolist()
    found = classify([images.picture(source, number) for number in numbers], batch_size=64, top_k=1)
    right = [best["label"] == str(source.labels[n]) for n, (best,) in zip(numbers, found, strict=True)]
    assert sum(right) / len(right) == pytest.approx(loaded(digits).newest()["test_accuracy"])


def test_it_is_shared_with_the_card_of_a_classifier(digits: Path, tmp_path: Path) -> None:
    seen = loaded(digits)
    (tmp_path / "made").mkdir()
    made = exports.make(seen, tmp_path / "made")
    folder = sharing.prepare(seen, made, tmp_path / "merged", name="org/digits", merge=False, base=None)
    card = (folder / "README.md").read_text()
    splits = images.split(images.read("digits"), validation=0.1, test=0.1)
    train, val, test = (f"{len(of):,}" for of in (splits.train, splits.validation, splits.test))
    for said in (
        "pipeline_tag: image-classification", "An image classifier, trained with stoker",
        'classify = pipeline("image-classification", model="org/digits")', "| accuracy on the test set |",
        f"## Data\n\n- digits\n- {train} images for training, {val} for validation, {test} for testing\n"
        "- 10 classes: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9\n- fingerprint of the content: `",
    ):  # fmt: skip
        assert said in card, said


def test_mlflow_labels_images_in_every_form_that_transformers_takes(digits: Path, tmp_path: Path) -> None:
    found = served._load_pyfunc(str(digits / "artifacts" / "model"))
    image = images.picture(images.read("digits"), 0)
    image.save(tmp_path / "digit.png")
    content = (tmp_path / "digit.png").read_bytes()
    forms = [image, np.asarray(image), str(tmp_path / "digit.png"), tmp_path / "digit.png", content,
             base64.b64encode(content).decode()]  # fmt: skip
    answers = found.predict(forms)
    assert len(answers) == len(forms)
    assert len(set(answers)) == 1
    assert answers[0] in "0123456789"
    assert found.predict(pd.DataFrame({"image": forms[2:]})) == answers[2:]
    for one in forms:
        assert found.predict(one) == answers[:1]
    assert found.predict(np.stack([np.asarray(image.convert("RGB"))] * 2)) == answers[:2]
