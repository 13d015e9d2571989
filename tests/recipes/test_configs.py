"""The configs that ship: each says what it is for, and trains a small model of its family."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from stoker import BadInput, Run, config, recipes
from stoker.recipes import llm

import families

SMALL = ("sequence_length=64", "max_steps=1", "epochs=none", "batch_size=4", "precision=fp32")
FAMILY = {"llama": "llama", "mistral": "mistral", "qwen": "qwen2", "python": None}


def test_there_are_those_that_were_promised() -> None:
    assert set(recipes.configs()) == {
        "llama-2-7b-lora", "llama-2-7b-full-fsdp", "mistral-7b-qlora", "qwen-0.5b-full", "python-docs"
    }  # fmt: skip


@pytest.mark.parametrize("name", recipes.configs())
def test_it_opens_with_its_hardware_and_its_command(name: str) -> None:
    head = recipes.configs()[name].read_text().partition("\nmodel:")[0]
    assert re.search(r"^# For (one GPU|8 GPUs|a laptop)", head, re.MULTILINE)
    assert f"stoker train llm --config {name} " in head
    assert all(line.startswith("#") for line in head.splitlines())


@pytest.mark.filterwarnings("ignore")  # those of bitsandbytes and peft
@pytest.mark.parametrize("name", recipes.configs())
def test_it_trains_a_small_model_of_its_family(name: str, tmp_path: Path) -> None:
    records = [{"instruction": f"Say {i}.", "input": "", "output": f"It is {i}."} for i in range(100)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    family = FAMILY[name.partition("-")[0]]
    model = families.save(tmp_path / "model", family, num_hidden_layers=2) if family else "tiny"
    strategy = ("parallel=single",) if "fsdp" in name else ()
    given = (*SMALL, *strategy, f"model={model}", f"data={tmp_path / 'data.jsonl'}", "generate_tokens=1")
    resolved = config.resolve(llm.Config, (*given, "vocab_size=300"), recipes.configs()[name])
    with Run("configs", name, runs=tmp_path / "runs", config=resolved.config) as run:
        llm.train(run, resolved.config)
    assert run.latest["test_perplexity"] > 1
    adapted = yaml.safe_load(recipes.configs()[name].read_text()).get("lora")
    assert (run.directory.artifacts / ("adapter" if adapted else "model")).is_dir()


def test_the_memory_that_a_config_names_is_what_a_rank_is_found_to_need() -> None:
    """Of weights, gradients and optimizer state, from the shapes of the real models."""
    from stoker.engine import memory
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig())
    whole = memory.needed(model, [], "single", llm.Config(), 1)
    assert "100 GiB in float32" in recipes.configs()["llama-2-7b-full-fsdp"].read_text()
    assert whole.total / 2**30 == pytest.approx(100, abs=1)
    assert "12.6 GiB of frozen weights" in recipes.configs()["llama-2-7b-lora"].read_text()
    assert whole.weights / 2 / 2**30 == pytest.approx(12.6, abs=0.1)


def test_a_config_is_named_or_is_a_file(tmp_path: Path) -> None:
    assert recipes.config_file(None) is None
    assert recipes.config_file(tmp_path) == tmp_path
    assert recipes.config_file(Path("python-docs")) == recipes.configs()["python-docs"]
    with pytest.raises(BadInput, match=r"did you mean .qwen-0\.5b-full."):
        recipes.config_file(Path("qwen-0.5b"))


def test_what_ships_is_listed_shown_and_copied(stoker: Any, tmp_path: Path) -> None:
    listed = stoker("recipes", "list", "--json").answer
    assert [found["name"] for found in listed["configs"]] == list(recipes.configs())
    shown = stoker("recipes", "show", "qwen-0.5b-full", "--json").answer
    assert shown["values"]["model"] == "Qwen/Qwen2.5-0.5B"
    assert "(required)" in stoker("recipes", "show", "evaluation").out
    assert stoker("recipes", "copy", "qwen-0.5b-full").code == 0
    assert (tmp_path / "qwen-0.5b-full.yaml").read_text() == recipes.configs()["qwen-0.5b-full"].read_text()
    assert stoker("recipes", "copy", "qwen-0.5b-full", "-o", "some/folder/mine.yaml").code == 0
    again = stoker("recipes", "copy", "qwen-0.5b-full")
    assert (again.code, "already exists" in again.err) == (2, True)


@pytest.mark.parametrize("recipe", ["llm", "image", "text"])
@pytest.mark.parametrize("key", ["max_steps", "eval_every"])
def test_lengths_are_the_same_on_every_machine(recipe: str, key: str) -> None:
    with pytest.raises(BadInput, match=f"{key}=10min .* is a time, which differs"):
        config.resolve(recipes.load(recipe).config, overrides=[f"{key}=10min"])
