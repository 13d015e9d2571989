"""The image recipe's model: of a size, of a directory, or of a hub."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from stoker import BadInput
from stoker.language import hub
from stoker.recipes import image, image_model

import hub_server
from commands import Point
from hub_server import Hub
from servers import listening


def built(reference: str) -> image_model.Classifier:
    return image_model.build(reference, classes=("cat", "dog"), channels=1, size=32)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    built("resnet-tiny").model.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.fixture
def served(point_at: Point, saved: Path) -> Iterator[Hub]:
    """A hub with one classifier, `org/one`."""
    with hub_server.serving() as made:
        made.models["org/one"] = {file.name: file.read_bytes() for file in saved.iterdir()}
        point_at(made.url)
        yield made


def test_a_model_of_the_hub_serves_where_the_hub_says_nothing_any_more(
    served: Hub, saved: Path, point_at: Point, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = built("org/one").model
    assert first.config.name_or_path == "org/one"
    for name, tensor in built(str(saved)).model.state_dict().items():
        assert torch.equal(tensor, first.state_dict()[name])
    monkeypatch.setattr(hub, "_ANSWER", 0.3)  # seconds
    with listening(None) as address:
        point_at(f"http://{address}")
        began = time.monotonic()
        built("org/one")
        with pytest.raises(
            BadInput, match=r"resnet-51 .*the hub cannot be reached.*did you mean 'resnet-50'"
        ):
            image.check_launch(image.Config(model="resnet-51"))
        assert time.monotonic() - began < 5


@pytest.mark.parametrize("model", ["org/two", "./nowhere"])
def test_a_model_that_is_not_there_is_refused_before_anything_is_started(served: Hub, model: str) -> None:
    with pytest.raises(
        BadInput, match=f"model {model} is (neither a local directory nor on|not a directory)"
    ):
        image.check_launch(image.Config(model=model))
    image.check_launch(image.Config(model="org/one"))
    image.check_launch(image.Config(model="resnet-50"))
