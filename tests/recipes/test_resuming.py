"""Runs of new models that are resumed with other data, whose tokens or classes are not those they learned."""

from __future__ import annotations

import json
import random
from pathlib import Path

from PIL import Image
from safetensors.torch import load_file, save_file

import families
from commands import Command
from support import loaded

SMALL = ("precision=fp32", "batch_size=8", "epochs=none", "checkpoint_every=2")
NARROW = ("layers=1", "width=32", "vocab_size=300", "max_length=32")


def _sentences(words: str, count: int = 60) -> list[str]:
    drawn = random.Random(words)
    return [" ".join(drawn.choices(words.split(), k=6)) for _ in range(count)]


def _documents(file: Path, sentences: list[str]) -> Path:
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in sentences))
    return file


def _labelled(file: Path, sentences: list[str], classes: str) -> Path:
    first, second = classes.split()
    rows = [f"{text},{first if number % 2 else second}" for number, text in enumerate(sentences)]
    file.write_text("\n".join(["text,label", *rows]) + "\n")
    return file


def test_a_language_model_keeps_the_tokens_it_has_learned(stoker: Command, tmp_path: Path) -> None:
    file = _documents(tmp_path / "said.jsonl", _sentences("forge anvil tongs quench iron"))
    size = ("model=tiny", "vocab_size=300", "sequence_length=32", "generate_tokens=4")
    begun = stoker("train", "llm", f"data={file}", *size, *SMALL, "max_steps=4", "--name", "run")
    assert begun.code == 0, begun.err
    _documents(file, _sentences("oven flour yeast crust dough"))
    refused = stoker("resume", "run", "max_steps=8")
    assert refused.code == 2, refused.err
    assert "the tokenizer is not the one" in refused.err
    own = tmp_path / "runs" / "llm" / "run" / "artifacts" / "shape"
    assert f"tokenizer={own}" in refused.err
    resumed = stoker("resume", "run", "max_steps=8", f"tokenizer={own}")
    assert resumed.code == 0, resumed.err
    assert list(loaded(own.parents[1]).points["loss"].items())[-1][0] == 8


def test_frozen_weights_are_those_that_adapters_were_trained_on(stoker: Command, tmp_path: Path) -> None:
    data = _documents(tmp_path / "said.jsonl", _sentences("forge anvil tongs quench iron"))
    model = families.with_tokenizer(families.save(tmp_path / "model", "llama"))
    size = ("sequence_length=32", "generate_tokens=4", "lora.rank=2")
    given = ("train", "llm", f"data={data}", f"model={model}", *size, *SMALL, "max_steps=4", "--name", "run")
    begun = stoker(*given)
    assert begun.code == 0, begun.err
    for file in model.glob("*.safetensors"):
        weights = {name: tensor + 1 for name, tensor in load_file(file).items()}
        save_file(weights, file, {"format": "pt"})
    resumed = stoker("resume", "run", "max_steps=8")
    assert resumed.code == 2, resumed.err
    assert "the weights of model= have changed" in resumed.err


def test_a_text_classifier_keeps_its_tokens_and_classes(stoker: Command, tmp_path: Path) -> None:
    file = _labelled(tmp_path / "said.csv", _sentences("forge anvil tongs quench iron"), "smith baker")
    given = ("train", "text", f"data={file}", *NARROW, *SMALL, "max_steps=4", "--name", "run")
    begun = stoker(*given)
    assert begun.code == 0, begun.err
    _labelled(file, _sentences("forge anvil tongs quench iron"), "smith sailor")
    refused = stoker("resume", "run", "max_steps=8")
    assert refused.code == 2, refused.err
    assert "has other classes than the run was trained on (now sailor, smith)" in refused.err
    _labelled(file, _sentences("oven flour yeast crust dough"), "smith baker")
    refused = stoker("resume", "run", "max_steps=8")
    assert refused.code == 2, refused.err
    assert "the tokenizer is not the one" in refused.err
    resumed = stoker(
        "resume", "run", "max_steps=8", f"tokenizer={tmp_path / 'runs/text/run/artifacts/shape'}"
    )
    assert resumed.code == 0, resumed.err


def test_an_image_classifier_keeps_its_classes(stoker: Command, tmp_path: Path) -> None:
    images, drawn = tmp_path / "images", random.Random(0)
    for kind in ("cat", "dog"):
        (images / kind).mkdir(parents=True)
        for number in range(16):
            pixels = bytes(drawn.randrange(256) for _ in range(8 * 8 * 3))
            Image.frombytes("RGB", (8, 8), pixels).save(images / kind / f"{number}.png")
    size = ("image_size=16", "workers=0", "eval_every=4")
    begun = stoker("train", "image", f"data={images}", *size, *SMALL, "max_steps=4", "--name", "run")
    assert begun.code == 0, begun.err
    (images / "dog").rename(images / "bird")
    refused = stoker("resume", "run", "max_steps=8")
    assert refused.code == 2, refused.err
    assert "has other classes than the run was trained on (now bird, cat)" in refused.err
