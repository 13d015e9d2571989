"""The pieces of the text recipe: its shapes, its batches, its numbers."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.metrics import accuracy_score, f1_score
from stoker import BadInput, recipes
from stoker.data import order, text_rows
from stoker.data.labelled import Text, Texts
from stoker.engine.metrics import Totals
from stoker.engine.random_state import seed_everything
from stoker.language import hub
from stoker.recipes import text, text_model, text_shape

import hub_server
from commands import Point
from hub_server import Hub
from servers import listening
from support import LONG

WORDS = ("forge", "coal", "iron", "spark", "bellows", "anvil")


def texts_of(count: int, seed: int = 0) -> Texts:
    """Of very unequal lengths, with three labels."""
    drawn = np.random.default_rng(seed)
    made = [
        Text(" ".join(drawn.choice(WORDS, int(drawn.integers(1, 90)))), "abc"[n % 3], str(n))
        for n in range(count)
    ]
    return Texts(made, made[: count // 5], made[: count // 5], "some")


def small(texts: Texts, **changed: object) -> text_model.Classifier:
    seed_everything(3)
    given = {
        "shape": text_shape.shape("bert-tiny", width=32), "dropout": 0.1, "tokenizer": None,
        "vocab_size": 300, "max_length": 64, **changed,
    }  # fmt: skip
    return text_model.build("bert-tiny", texts, **given)  # type: ignore[arg-type]


def rows_of(texts: Texts, made: text_model.Classifier, batch_size: int) -> text_rows.Rows:
    return text_rows.tokenise(
        texts, classes=made.classes, tokenizer=made.tokenizer, max_length=64, batch_size=batch_size,
        fingerprint=made.encoding,
    )  # fmt: skip


@pytest.fixture(scope="module")
def texts() -> Texts:
    return texts_of(120)


@pytest.fixture(scope="module")
def made(texts: Texts) -> text_model.Classifier:
    return small(texts)


def test_texts_that_are_cut_off_are_counted(texts: Texts, made: text_model.Classifier) -> None:
    whole = [len(made.tokenizer(text.text)["input_ids"]) for text in texts.train]
    found = rows_of(texts, made, 8).train
    assert 0 < found.truncated < len(whole)
    assert found.truncated == sum(length > 64 for length in whole)
    slowly = SlowTokenizer(made.tokenizer)
    _, truncated = text_rows._encoded(texts.train, slowly, 64)
    assert truncated == found.truncated


class SlowTokenizer:
    """One written in Python, which does not say what it cuts off."""

    is_fast = False

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __call__(self, texts: list[str], **how: Any) -> dict[str, Any]:
        return {"input_ids": self._tokenizer(texts, **how)["input_ids"]}


def test_it_is_shipped_with_a_meaning_for_each_of_its_keys() -> None:
    from stoker.meanings import meanings_of

    recipe = recipes.load("text")
    assert recipe.config is text.Config
    meanings = meanings_of(text.Config)
    assert all(meanings.get(name) for name in text.Config.__annotations__)


def test_a_shape_is_that_of_its_size_but_for_what_is_given() -> None:
    assert text_shape.shape("bert-tiny") == text_shape.Shape(2, 128, 2, 512)
    assert text_shape.shape("bert-medium", layers=1) == text_shape.Shape(1, 512, 8, 2048)
    for width in (1, 32, 96, 200, 257):
        assert width % text_shape.shape("bert-tiny", width=width).heads == 0
    with pytest.raises(BadInput, match="heads=3 does not divide the width 32 evenly: use one of 1, 2, 4"):
        text_shape.shape("bert-tiny", width=32, heads=3)


def test_flops_are_those_of_the_products_of_an_encoder(made: text_model.Classifier) -> None:
    made.model.train()
    before = made.model.config._attn_implementation
    layers, width, tokens = 2, 32, 64
    products = 2 * tokens * width * width * 12  # query, key, value, output: 4; feed-forward: 2 of 4 times
    attention = 2 * 2 * tokens * tokens * width
    head = 2 * width * width + 2 * width * 3
    assert text_model.size(made, tokens)["flops"] == layers * (products + attention) + head
    assert made.model.training
    assert made.model.config._attn_implementation == before
    assert text_model.size(made, tokens)["parameters"] == sum(p.numel() for p in made.model.parameters())


def test_padding_changes_no_result(texts: Texts, made: text_model.Classifier) -> None:
    rows = rows_of(texts, made, batch_size=8).train
    chosen = [rows[index] for index in (0, 30, 60, len(rows) - 1)]
    assert len({len(tokens) for tokens, _ in chosen}) == 4
    made.model.eval()
    pad_id = made.tokenizer.pad_token_id
    with torch.no_grad():
        together = made.model(**text_model.inputs(text_rows.collate(chosen, pad_id=pad_id))).logits
        for row, logits in zip(chosen, together, strict=True):
            alone = made.model(**text_model.inputs(text_rows.collate([row], pad_id=pad_id))).logits[0]
            torch.testing.assert_close(alone, logits, atol=1e-5, rtol=1e-5)


def test_a_text_is_tokenised_as_the_exported_tokenizer_does(
    texts: Texts, made: text_model.Classifier
) -> None:
    rows = rows_of(texts, made, batch_size=8).train
    expected = sorted(
        (
            tuple(made.tokenizer(text.text, truncation=True, max_length=64)["input_ids"]),
            "abc".index(text.label),
        )
        for text in texts.train
    )
    assert sorted((tuple(tokens.tolist()), label) for tokens, label in map(rows.__getitem__, range(120))) == (
        expected
    )
    assert all(tokens[0] == made.tokenizer.cls_token_id for tokens, _ in expected)
    lengths = [len(rows[index][0]) for index in range(120)]
    assert lengths == sorted(lengths)
    assert max(lengths) == 64


@pytest.mark.parametrize("batch_size", [1, 7, 8, 200])
def test_each_epoch_has_every_text_once_in_an_order_that_is_the_positions_alone(
    batch_size: int, texts: Texts, made: text_model.Classifier
) -> None:
    rows = rows_of(texts, made, batch_size).train
    positions = np.arange(3 * len(rows))
    epochs, indices = rows.order(5, positions)
    assert epochs.tolist() == (positions // len(rows)).tolist()
    for epoch in range(3):
        assert sorted(indices[epochs == epoch]) == list(range(len(rows)))
    some = np.random.default_rng(0).permutation(positions)[:50]
    assert rows.order(5, some)[1].tolist() == indices[some].tolist()
    assert rows.order(6, positions)[1].tolist() != indices.tolist()


def test_a_share_of_the_texts_is_the_same_in_every_epoch_and_part_of_a_larger_one(
    texts: Texts, made: text_model.Classifier
) -> None:
    rows = rows_of(texts, made, batch_size=8).train
    third, half = rows.part(5, 0.3), rows.part(5, 0.5)
    assert (len(third), len(half)) == (36, 60)
    epochs, indices = third.order(5, np.arange(72))
    taken = [sorted(indices[epochs == epoch].tolist()) for epoch in range(2)]
    assert taken[0] == taken[1]
    assert len(set(taken[0])) == 36
    assert {*taken[0]} < {*half.order(5, np.arange(60))[1].tolist()}


def test_texts_of_a_batch_have_similar_lengths_and_batches_come_in_no_order_of_length(
    made: text_model.Classifier,
) -> None:
    rows = rows_of(texts_of(2000), made, batch_size=16).train
    lengths = np.array([len(rows[index][0]) for index in range(len(rows))])

    def padded(indices: np.ndarray) -> np.ndarray:
        return lengths[indices].reshape(-1, 16).max(axis=1)

    positions = np.arange(2000)
    grouped = padded(rows.order(1, positions)[1])
    shuffled = padded(order.order(1, 2000, positions)[1])
    real = lengths.sum() / 16
    assert grouped.sum() - real < 0.25 * (shuffled.sum() - real)
    assert abs(np.corrcoef(np.arange(len(grouped)), grouped)[0, 1]) < 0.3


def test_accuracy_and_macro_f1_are_those_of_scikit_learn() -> None:
    drawn = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(50, 5, generator=drawn), torch.randint(0, 3, (50,), generator=drawn)
    logits[:, 4] = -100.0  # a class that is neither there nor found
    totals = Totals()
    for part in (slice(0, 20), slice(20, 50)):
        output = type("Output", (), {"logits": logits[part]})
        totals.add(text_model.metrics(output, {"labels": labels[part]}))
    found = text_model.measured(totals.over_ranks(), "abcde")
    guessed = logits.argmax(dim=1)
    assert found.metrics["accuracy"] == pytest.approx(accuracy_score(labels, guessed))
    assert found.metrics["macro_f1"] == pytest.approx(f1_score(labels, guessed, average="macro"))
    expected = torch.nn.functional.cross_entropy(logits, labels)
    assert found.metrics["loss"] == pytest.approx(float(expected), rel=1e-5)
    assert [row[0] for row in found.by_class] == list("abcde")


def save(made: text_model.Classifier, folder: Path, **labels: dict[int, str]) -> Path:
    made.model.config.update(labels)
    made.model.save_pretrained(folder)
    made.tokenizer.save_pretrained(folder)
    return folder


def test_a_model_that_knows_the_classes_in_another_order_keeps_its_last_layer(tmp_path: Path) -> None:
    texts = texts_of(30)
    saved = small(texts)
    folder = save(saved, tmp_path / "model", id2label={0: "c", 1: "a", 2: "b"})
    loaded = text_model.build(
        str(folder), texts, shape=None, dropout=0.1, tokenizer=None, vocab_size=300, max_length=64
    )
    assert loaded.classes == ("c", "a", "b")
    torch.testing.assert_close(loaded.model.classifier.weight, saved.model.classifier.weight)
    assert loaded.encoding == saved.encoding


def test_a_model_of_other_classes_gets_a_new_last_layer_and_keeps_the_rest(tmp_path: Path) -> None:
    saved = small(texts_of(30))
    folder = save(saved, tmp_path / "model")
    two = Texts([Text(t, label, t) for t, label in (("x", "n"), ("y", "p"))], [], [], "two")
    loaded = text_model.build(
        str(folder), two, shape=None, dropout=0.1, tokenizer=None, vocab_size=300, max_length=64
    )
    assert loaded.model.classifier.weight.shape == (2, 32)
    assert loaded.config.id2label == {0: "n", 1: "p"}
    name = "bert.encoder.layer.1.output.dense.weight"
    torch.testing.assert_close(loaded.model.state_dict()[name], saved.model.state_dict()[name])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"parallel": "pipeline"}, "parallel=ddp or fsdp"),
        ({"width": 32, "heads": 5}, "heads=5 does not divide"),
        ({"model": "bert-tinny"}, "did you mean 'bert-tiny'"),
        ({"model": "MODEL", "layers": 2}, "layers=2 is for new models"),
        ({"model": "LLAMA"}, "has no config.json"),
        ({"data": "nowhere.csv"}, "does not exist"),
        ({"tokenizer": "./nowhere"}, r"tokenizer \./nowhere is not a directory"),
        ({"model": "MODEL", "tokenizer": "LLAMA"}, r"has no tokenizer\.json"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_started(
    given: dict[str, str], said: str, tmp_path: Path
) -> None:
    (tmp_path / "llama").mkdir()
    places = {"MODEL": str(save(small(texts_of(30)), tmp_path / "model")), "LLAMA": str(tmp_path / "llama")}
    config = text.Config(**{key: places.get(str(value), value) for key, value in given.items()})  # type: ignore[arg-type]
    with pytest.raises(BadInput, match=said):
        text.check_launch(config)


@pytest.fixture
def served(point_at: Point, tmp_path: Path) -> Iterator[Hub]:
    """A hub with one classifier, as `org/one` and, of weights in a pickle alone, `org/pickled`."""
    folder = save(small(texts_of(30)), tmp_path / "one")
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    torch.save(load_file(folder / "model.safetensors"), tmp_path / "pickle")
    with hub_server.serving() as made:
        made.models["org/one"] = files
        made.models["org/pickled"] = {
            **{name: content for name, content in files.items() if name != "model.safetensors"},
            "pytorch_model.bin": (tmp_path / "pickle").read_bytes(),
        }
        point_at(made.url)
        yield made


def of_the_hub(name: str) -> text_model.Classifier:
    return text_model.build(
        name, texts_of(30), shape=None, dropout=0.1, tokenizer=None, vocab_size=300, max_length=64
    )


def test_a_model_of_the_hub_serves_where_the_hub_says_nothing_any_more(
    served: Hub, point_at: Point, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = of_the_hub("org/one")
    assert first.model.config.name_or_path == "org/one"
    pickled = of_the_hub("org/pickled").model.state_dict()
    monkeypatch.setattr(hub, "_ANSWER", 0.3)  # seconds
    with listening(None) as address:
        point_at(f"http://{address}")
        began = time.monotonic()
        again = of_the_hub("org/one")
        assert time.monotonic() - began < LONG
        with pytest.raises(BadInput, match=r"model org/two .*the hub cannot be reached"):
            of_the_hub("org/two")
    for name, tensor in first.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name])
        assert torch.equal(tensor, pickled[name])


@pytest.mark.filterwarnings("ignore")  # the hub's client warns too
def test_weights_of_the_hub_that_find_no_room_are_said_as_that(served: Hub) -> None:
    text_model.check("org/one")  # which has its config brought
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(served.models["org/one"]["model.safetensors"]) // 2, hard))
    try:
        with pytest.raises(BadInput, match=r"cannot be stored in .*cache \(.*File too large.*HF_HOME"):
            of_the_hub("org/one")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_more_tokens_than_a_model_has_positions_are_refused(tmp_path: Path) -> None:
    folder = save(small(texts_of(30)), tmp_path / "model")
    with pytest.raises(BadInput, match="max_length=513 is more than the 512 positions"):
        text_model.build(
            str(folder), texts_of(30), shape=None, dropout=0.1, tokenizer=None, vocab_size=300, max_length=513
        )
