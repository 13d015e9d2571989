"""Loaded classifiers: whose outputs stand for which classes, and what their files must have."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from stoker import BadInput
from stoker.engine.random_state import seed_everything
from stoker.recipes import classifiers
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

TINY = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
KINDS = {
    "resnet": (ResNetForImageClassification, ResNetConfig,
               {"embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1], "layer_type": "basic"}),
    "vit": (ViTForImageClassification, ViTConfig, {**TINY, "image_size": 32, "patch_size": 16}),
    "bert": (BertForSequenceClassification, BertConfig, {**TINY, "vocab_size": 50}),
}  # fmt: skip
HEADS = {"resnet": "classifier.1.weight", "vit": "classifier.weight", "bert": "classifier.weight"}
AUTO = {
    "resnet": AutoModelForImageClassification, "vit": AutoModelForImageClassification,
    "bert": AutoModelForSequenceClassification,
}  # fmt: skip


def saved(kind: str, folder: Path, names: Mapping[int, str] | None, **changed: object) -> PreTrainedModel:
    made, config, shape = KINDS[kind]
    labels = {"id2label": names} if names else {"num_labels": 3}
    named: PretrainedConfig = config(**shape, **labels, **changed)
    seed_everything(1)
    model = made(named)
    model.save_pretrained(folder)
    return model


def loaded(kind: str, folder: Path, *classes: str) -> classifiers.Loaded:
    return classifiers.load(AUTO[kind], "theirs", folder, classes)


def heads(kind: str, *models: PreTrainedModel) -> list[torch.Tensor]:
    return [model.state_dict()[HEADS[kind]] for model in models]


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_classes_in_another_order_keep_the_order_of_the_model(kind: str, tmp_path: Path) -> None:
    before = saved(kind, tmp_path, {0: "c", 1: "a", 2: "b"}, problem_type="multi_label_classification")
    found = loaded(kind, tmp_path, "a", "b", "c")
    assert found.classes == ("c", "a", "b")
    assert found.model.config.id2label == {0: "c", 1: "a", 2: "b"}
    assert found.said == ""
    assert found.model.config.problem_type == "single_label_classification", "as it is trained"
    for name, tensor in before.state_dict().items():
        torch.testing.assert_close(found.model.state_dict()[name], tensor)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("classes", "said"),
    [
        (("x", "y", "z"),
         "the last layer is new: the model's was for other classes (a, b, c) than the data's (x, y, z)"),
        (("a", "b", "c", "d"), "the last layer is new: 3 -> 4 classes"),
    ],
)  # fmt: skip
def test_other_classes_get_a_new_last_layer_and_that_is_said(
    kind: str, classes: tuple[str, ...], said: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = saved(kind, tmp_path, dict(enumerate("abc")))
    found = loaded(kind, tmp_path, *classes)
    assert (found.classes, found.said) == (classes, said)
    old, new = heads(kind, before, found.model)
    assert len(new) == len(classes)
    assert new[: len(old)].ne(old).all()
    assert 0 < new.abs().mean() < 1
    for name, tensor in before.state_dict().items():
        if not name.startswith("classifier."):
            torch.testing.assert_close(found.model.state_dict()[name], tensor)
    assert "LOAD REPORT" not in "".join(capfd.readouterr()), "transformers' report tells nobody anything"


@pytest.mark.parametrize("kind", KINDS)
def test_classes_without_names_are_those_of_the_data(kind: str, tmp_path: Path) -> None:
    before = saved(kind, tmp_path, None)
    found = loaded(kind, tmp_path, "a", "b", "c")
    assert found.said.endswith("taken for the data's, in order: LABEL_0 = a, LABEL_1 = b, LABEL_2 = c")
    assert torch.equal(*heads(kind, before, found.model))


@pytest.mark.parametrize(
    ("theirs", "data", "classes", "said"),
    [
        (("Positive", "Negative"), ("negative", "positive "), ("positive ", "negative"), ""),
        (("No", "Yes"), ("0", "1"), ("0", "1"), "data's classes have no names, so they are taken for the "
         "model's, in order: No = 0, Yes = 1"),
        (tuple("abcdefghijkl"), tuple(sorted(map(str, range(12)))), tuple(map(str, range(12))),
         "a = 0, b = 1, c = 2, d = 3, e = 4, f = 5, g = 6, h = 7 and 4 more"),
        (("LABEL_0", "LABEL_1"), ("0", "1"), ("0", "1"), "in order: LABEL_0 = 0, LABEL_1 = 1"),
        (("1", "0"), ("0", "1"), ("1", "0"), ""),
    ],
)  # fmt: skip
def test_a_last_layer_is_kept_for_classes_that_are_spelled_differently_or_numbered(
    theirs: tuple[str, ...], data: tuple[str, ...], classes: tuple[str, ...], said: str, tmp_path: Path
) -> None:
    before = saved("bert", tmp_path, dict(enumerate(theirs)))
    found = loaded("bert", tmp_path, *data)
    assert found.classes == classes
    assert found.said.endswith(said)
    assert bool(found.said) == bool(said)
    assert torch.equal(*heads("bert", before, found.model))


@pytest.mark.parametrize(
    ("theirs", "data"), [(("A", "a"), ("a", "b")), (("x", "y"), ("1", "2")), (("x", "x"), ("a", "b"))]
)
def test_a_last_layer_is_new_if_it_is_not_plain_which_class_is_which(
    theirs: tuple[str, ...], data: tuple[str, ...], tmp_path: Path
) -> None:
    before = saved("bert", tmp_path, dict(enumerate(theirs)))
    found = loaded("bert", tmp_path, *data)
    assert found.classes == data
    assert "the last layer is new" in found.said
    assert not torch.equal(*heads("bert", before, found.model))


@pytest.mark.parametrize("kind", KINDS)
def test_files_that_lack_weights_below_the_last_layer_are_refused(kind: str, tmp_path: Path) -> None:
    saved(kind, tmp_path, dict(enumerate("abc")))
    file = tmp_path / "model.safetensors"
    save_file({f"module.{name}": t for name, t in load_file(file).items()}, file, {"format": "pt"})
    with pytest.raises(BadInput, match=rf"theirs cannot be loaded: .* lack \d+ of .*tensors.*: {kind}\.\w+"):
        loaded(kind, tmp_path, "a", "b", "c")


def test_a_language_model_becomes_a_classifier_without_its_pooler(tmp_path: Path) -> None:
    before = BertForMaskedLM(BertConfig(**TINY, vocab_size=50))
    before.save_pretrained(tmp_path)
    found = loaded("bert", tmp_path, "a", "b")
    assert found.said == "the last layer is new: 2 classes"
    name = "bert.encoder.layer.0.output.dense.weight"
    assert torch.equal(found.model.state_dict()[name], before.state_dict()[name])
    assert np.isfinite(found.model.bert.pooler.dense.weight.detach().numpy()).all()
