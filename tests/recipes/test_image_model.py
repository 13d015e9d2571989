"""The image recipe's model: of a size, of a directory, or of a hub."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from stoker import BadInput
from stoker.data.augment import IMAGENET, Evaluate
from stoker.language import hub
from stoker.recipes import image, image_model, image_processor
from transformers import AutoImageProcessor, ViTConfig, ViTForImageClassification

import hub_server
from commands import Point
from hub_server import Hub
from servers import listening
from support import LONG


def built(reference: str) -> image_model.Classifier:
    return image_model.build(reference, classes=("cat", "dog"), new=image_processor.DIGITS)


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
        assert time.monotonic() - began < LONG


@pytest.mark.parametrize("model", ["org/two", "./nowhere"])
def test_a_model_that_is_not_there_is_refused_before_anything_is_started(served: Hub, model: str) -> None:
    with pytest.raises(
        BadInput, match=f"model {model} is (neither a local directory nor on|not a directory)"
    ):
        image.check_launch(image.Config(model=model))
    image.check_launch(image.Config(model="org/one"))
    image.check_launch(image.Config(model="resnet-50"))


HALF = (0.5, 0.5, 0.5)
OF_IMAGENET = {"image_mean": IMAGENET[0], "image_std": IMAGENET[1]}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            {"image_processor_type": "ViTImageProcessor", "size": {"height": 384, "width": 384},
             "image_mean": HALF, "image_std": HALF},
            (384, HALF, HALF),
        ),
        (
            {"feature_extractor_type": "ViTFeatureExtractor", "size": 224, "image_mean": HALF,
             "image_std": HALF},
            (224, HALF, HALF),
        ),
        ({"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 64}, **OF_IMAGENET},
         (64, *IMAGENET)),
        (
            {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 72},
             "crop_size": {"height": 64, "width": 64}, **OF_IMAGENET},
            (64, *IMAGENET),
        ),
        (
            {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32},
             "do_normalize": False},
            (32, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
        ),
        (
            {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32},
             "rescale_factor": 2 / 255, "image_mean": [1, 1, 1], "image_std": [1, 1, 1]},
            (32, HALF, HALF),
        ),
        (None, (48, *IMAGENET)),
    ],
)  # fmt: skip
def test_a_loaded_model_gets_images_as_it_was_trained_on(
    tmp_path: Path, settings: dict[str, Any] | None, expected: tuple[Any, ...]
) -> None:
    shape = ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=48, patch_size=16)
    ViTForImageClassification(shape).save_pretrained(tmp_path)
    if settings is not None:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    made = image_model.build(str(tmp_path), classes=("cat", "dog"), new=image_processor.DIGITS)
    assert dataclasses.astuple(made.processor) == expected


def test_an_image_processor_that_does_not_load_is_refused(saved: Path) -> None:
    (saved / "preprocessor_config.json").write_text('{"image_processor_type": "NoSuch"}')
    with pytest.raises(BadInput, match=r"preprocessor_config\.json cannot be used: "):
        built(str(saved))


GREY = image_processor.Processor(32, (0.5,), (0.5,))
ODD = image_processor.Processor(75, HALF, HALF)


@pytest.mark.parametrize("processor", [image_processor.DIGITS, image_processor.PHOTOS, ODD, GREY])
@pytest.mark.parametrize("size", [(768, 512), (331, 517), (40, 40), (2048, 301)])
def test_what_is_exported_makes_the_pixels_of_an_evaluation(
    tmp_path: Path, processor: image_processor.Processor, size: tuple[int, int]
) -> None:
    drawn = np.random.default_rng(0).integers(0, 255, (25, 30, 3), dtype=np.uint8)
    given = Image.fromarray(drawn).resize(size, Image.Resampling.BICUBIC)
    given = given if len(processor.mean) == 3 else given.convert("L")
    image_model.describe(image_model.build("resnet-tiny", classes=("a", "b"), new=processor), tmp_path)
    (theirs,) = AutoImageProcessor.from_pretrained(tmp_path)(given, return_tensors="np")["pixel_values"]
    ours = Evaluate(*dataclasses.astuple(processor))(given).numpy()
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert image_processor.of_model(tmp_path) == processor, "and whoever goes on with it does the same"


def test_a_size_that_a_model_does_not_take_is_refused_by_name(tmp_path: Path, saved: Path) -> None:
    shape = ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=48, patch_size=16)
    ViTForImageClassification(shape).save_pretrained(tmp_path / "vit")

    def sized(model: Path) -> int:
        made = image_model.build(str(model), classes=("cat", "dog"), new=image_processor.PHOTOS, size=64)
        return made.processor.size

    with pytest.raises(BadInput, match=r"^image_size=64: .*vit does not take images of this size \(Input"):
        sized(tmp_path / "vit")
    assert sized(saved) == 64
