"""Scaled rotary embeddings: the model that transformers makes of the same settings, wherever it is loaded."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from stoker import BadInput, exports
from stoker.language import building, rope, saved_adapters
from stoker.language.rope import RopeScaling
from transformers import AutoConfig, AutoModelForCausalLM

import families
from commands import Command
from support import loaded

SHORT = 32  # positions before they are scaled
FAR = {"gemma3": "full_attention"}
MORE: dict[str, dict[str, Any]] = {"gemma3": {"layer_types": ["sliding_attention", "full_attention"] * 2}}


def _by_transformers(folder: Path, family: str, kind: str) -> Any:
    """A model whose config was changed as transformers' documentation has it."""
    config = AutoConfig.from_pretrained(folder)
    own = config.rope_parameters[FAR[family]] if family in FAR else config.rope_parameters
    own |= {"rope_type": kind, "factor": 4.0}
    if kind == "yarn":
        own["original_max_position_embeddings"] = SHORT
    config.max_position_embeddings = 4 * SHORT
    return AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32)


@pytest.mark.parametrize("kind", ["yarn", "linear"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
@torch.no_grad()
def test_a_scaled_model_is_the_one_that_transformers_makes(
    tmp_path: Path, family: str, kind: Literal["yarn", "linear"]
) -> None:
    folder = families.save(tmp_path / "model", family, max_position_embeddings=SHORT, **MORE.get(family, {}))
    language = building.build(
        str(folder), tokenizer=None, sequence_length=3 * SHORT, rope_scaling=RopeScaling(factor=4, type=kind)
    )
    language.load(language.model, torch.device("cpu"), "")
    ids = torch.randint(2, families.VOCABULARY, (1, 3 * SHORT), generator=torch.Generator().manual_seed(3))
    ours = language.model.eval()(input_ids=ids).logits  # (1, seq, vocabulary)
    theirs, unscaled = (
        made.eval()(input_ids=ids).logits
        for made in (
            _by_transformers(folder, family, kind),
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        )
    )
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert (ours - unscaled).abs().max() > 1e-3
    assert building.positions(language.config) == 4 * SHORT


@pytest.mark.parametrize(
    ("family", "said"),
    [
        ("gpt2", "has no rotary position embeddings"),
        ("phi3-long", r"positions already \(longrope"),
    ],
)
def test_what_cannot_be_scaled_is_refused(family: str, said: str) -> None:
    with pytest.raises(BadInput, match=said):
        rope.scale(families.config(family), RopeScaling(factor=2), "it")


def test_a_scaling_type_needs_a_factor() -> None:
    with pytest.raises(ValueError, match=r"rope_scaling.type=linear without rope_scaling.factor"):
        RopeScaling(type="linear")


LOADED_BY_OTHERS = """
import json, sys
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

card = open("pushed/README.md").read()
line = next(line for line in card.splitlines() if line.startswith("model = "))
exec(line)
text = AutoTokenizer.from_pretrained("./pushed")("a b c " * 20, return_tensors="pt")
made = model.generate(**text, max_new_tokens=8, do_sample=False)
print(json.dumps(made[0, text["input_ids"].shape[1] :].tolist()))
"""


@pytest.mark.soak(small=False)
def test_a_model_trained_on_longer_texts_is_scaled_wherever_it_is_read(
    stoker: Command, tmp_path: Path
) -> None:
    """Whole, as an adapter, merged, asked, evaluated and pushed."""
    base = families.save(tmp_path / "base", "llama", max_position_embeddings=SHORT)
    lines = [json.dumps({"text": f"{n}: " + "a b c " * (8 + n % 9)}) for n in range(40)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n")
    common = (
        "train", "llm", "data=a.jsonl", "validation_data=a.jsonl", "test=0", "batch_size=2", "max_steps=2",
        "sequence_length=96", "generate_tokens=0",
    )  # fmt: skip
    refused = stoker(*common, f"model={base}")
    assert refused.code == 2
    assert "is more than the 32 positions of" in refused.err
    assert "rope_scaling.factor=3" in refused.err
    refused = stoker(*common, f"model={base}", "rope_scaling.factor=2")
    assert refused.code == 2
    assert "is more than the 64 positions of" in refused.err
    assert "rope_scaling.factor=3" in refused.err
    scaled = ("rope_scaling.factor=4",)
    for name, more in (("whole", ()), ("adapter", ("lora.rank=4", "lr=0.05"))):
        done = stoker(*common, f"model={base}", *scaled, *more, "--name", name)
        assert done.code == 0, done.err
    runs = tmp_path / "runs" / "llm"
    trained = {name: loaded(runs / name).newest()["val_loss"] for name in ("whole", "adapter")}

    model = AutoModelForCausalLM.from_pretrained(runs / "whole/artifacts/model")
    assert model.config.max_position_embeddings == 4 * SHORT
    assert model.config.rope_parameters["rope_type"] == "yarn"
    merged = stoker("models", "push", "adapter", "./merged", "--merge")
    assert merged.code == 0, merged.err
    for named, value in (("whole", "whole"), ("adapter", "adapter"), ("merged", "adapter")):
        done = stoker("evaluate", named, "data=a.jsonl", "sequence_length=96", "generate_tokens=0", "--json")
        assert done.code == 0, done.err
        assert done.answer["metrics"]["test_loss"] == pytest.approx(trained[value], rel=1e-4)

    pushed = stoker("models", "push", "adapter", "./pushed")
    assert pushed.code == 0, pushed.err
    asked = ("--prompt", "a b c " * 20, "--max-tokens", "8", "--json")
    said = [stoker("generate", name, *asked).answer["answers"][0]["text"] for name in ("adapter", "./merged")]
    assert said[0] == said[1]
    others = subprocess.run(
        [sys.executable, "-c", LOADED_BY_OTHERS], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    theirs = json.loads(others.stdout.splitlines()[-1])
    tokenizer = building.load_tokenizer(str(tmp_path / "pushed"))
    assert tokenizer.decode(theirs, skip_special_tokens=True) == said[0]


def test_an_adapter_goes_on_with_the_scaling_that_it_was_trained_with(tmp_path: Path) -> None:
    (tmp_path / exports.BASE).write_text(json.dumps({"rope_scaling": {"factor": 4.0, "type": "yarn"}}))
    saved_adapters.check_scaling(tmp_path, RopeScaling(factor=4))
    with pytest.raises(BadInput, match=r"with rope_scaling.factor=4 rope_scaling.type=yarn: set the same"):
        saved_adapters.check_scaling(tmp_path, RopeScaling())
    (tmp_path / exports.BASE).write_text("{}")
    with pytest.raises(BadInput, match="without rope_scaling: omit it"):
        saved_adapters.check_scaling(tmp_path, RopeScaling(factor=math.e))
