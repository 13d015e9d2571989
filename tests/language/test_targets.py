"""Which layers adapters are put on: of mixtures of experts, and of models that see as well."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import loading_run
import pytest
import torch
from safetensors.torch import load_file
from stoker.errors import BadInput
from stoker.language import targets
from stoker.language.lora import Lora
from transformers import AutoModelForCausalLM

import families
import ranks
from commands import Command
from support import SOAK

CPU = torch.device("cpu")
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft's own


def trained(model: Any) -> set[str]:
    """What adapters are on, by the last part of its name."""
    names = [n.partition(".lora_")[0] for n, p in model.named_parameters() if p.requires_grad]
    return {name.removesuffix(".base_layer").rpartition(".")[2] for name in names}


@pytest.mark.parametrize("family", ["mixtral", "phimoe", "qwen3_moe"])
def test_of_a_mixture_all_linear_is_neither_what_chooses_nor_experts(family: str) -> None:
    model = families.model(family)
    names, weights = targets.resolve(model, Lora(rank=4))
    assert {*names} == ATTENTION
    assert not weights
    assert {name.rpartition(".")[2] for name in targets.experts(model)} == {"gate_up_proj", "down_proj"}


@pytest.mark.parametrize(
    ("family", "named", "said"),
    [
        ("mixtral", "w1", "no layer 'w1'; its layers are down_proj, gate_up_proj, k_proj"),
        ("mixtral", "mlp", "no layer 'mlp'"),
        ("qwen3_moe", "q_proj,gate_proj,up_proj", "peft treats '(gate|up)_proj' as part of the"),
        (
            "qwen3_moe",
            "up_proj",
            "lora.targets: Cannot convert PEFT target.* up_proj without also .* gate_proj",
        ),
    ],
)
def test_names_of_what_is_no_layer_or_what_peft_cannot_take_are_refused(
    family: str, named: str, said: str
) -> None:
    with pytest.raises(BadInput, match=said):
        targets.resolve(families.model(family), Lora(rank=4, targets=named))


@pytest.mark.filterwarnings("ignore")  # peft's own
def test_an_adapter_on_experts_loads_with_peft_and_is_gone_on_with(tmp_path: Path) -> None:
    from peft import PeftModel

    base = families.save(tmp_path / "mixtral", "mixtral")
    with pytest.raises(BadInput, match=r"lora.dropout=0.05: the experts of a mixtral.*set lora.dropout=0"):
        loading_run.built(base, "lora", Lora(rank=4, targets="gate_up_proj"))
    on = Lora(rank=4, dropout=0.0, targets="all-linear, gate_up_proj, experts.down_proj")
    model, language = loading_run.built(base, "lora", on)
    language.load(model, CPU, "")
    assert trained(model) == {*ATTENTION, "experts"}
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    gone_on, language = loading_run.built(base, "lora", Lora(adapter=str(tmp_path / "adapter")))
    language.load(gone_on, CPU, "")
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(plain, tmp_path / "adapter")
    expected = logits(model)
    torch.testing.assert_close(logits(gone_on), expected)
    torch.testing.assert_close(logits(theirs), expected)
    assert trained(gone_on) == trained(model)


def logits(model: Any) -> torch.Tensor:
    model.eval().get_base_model().set_attn_implementation("eager")
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=families.documents()["input_ids"]).logits
    return found


def test_experts_that_stay_as_they_are_beside_4_bits_are_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = families.save(tmp_path / "mixtral", "mixtral")
    with caplog.at_level(logging.WARNING, logger="stoker"):
        loading_run.built(base, "qlora")
    assert "the experts of a mixtral are not linear layers and stay in float32" in caplog.text


@pytest.mark.soak
@pytest.mark.parametrize("kind", ["full", "lora"] if SOAK else ["full"])
def test_of_a_model_that_sees_what_text_goes_through_is_trained_alone(kind: str, tmp_path: Path) -> None:
    """On two ranks, of which each waits for the gradients of all that is trained."""
    base = families.that_sees(tmp_path / "gemma")
    model, _ = loading_run.built(base, kind)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert names
    assert all("language_model" in name or "lm_head" in name for name in names)
    (losses, _), _ = ranks.run(loading_run.train, 2, tmp_path, base, tmp_path, "ddp", kind)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("family", "patterns", "trained"),
    [
        ("llama", [r"layers\.3\."], {"model.layers.3"}),
        ("llama", [r"layers\.[01]\.self", "lm_head"], {"model.layers.0", "model.layers.1", "lm_head.weight"}),
        ("qwen2", ["lm_head"], {"model.embed_tokens.weight"}),  # which is the same one
    ],
)
def test_weights_are_trained_by_patterns_of_their_names(
    family: str, patterns: list[str], trained: set[str]
) -> None:
    made = families.model(family)
    targets.train_only(made, patterns)
    names = [name for name, p in made.named_parameters() if p.requires_grad]
    assert names
    assert all(any(name.startswith(one) for one in trained) for name in names)
    assert all(any(name.startswith(one) for name in names) for one in trained)


@pytest.mark.parametrize(
    ("family", "ends"),
    [
        ("llama", {"embed_tokens", "lm_head"}),
        ("qwen2", {"embed_tokens"}),  # tied
        ("gpt2", {"wte", "wpe"}),
        ("qwen3_moe", {"embed_tokens", "lm_head"}),
    ],
)
def test_what_is_hidden_is_all_but_the_ends(family: str, ends: set[str]) -> None:
    model = families.model(family)
    named = {id(p): name for name, p in model.named_parameters()}
    hidden = {named[id(p)] for p in targets.hidden(model)}
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in {*named.values()} - hidden} == ends


def test_adapters_of_the_ends_are_no_hidden_ones() -> None:
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(target_modules=["q_proj", "embed_tokens", "lm_head"], r=2)
    model = get_peft_model(families.model("llama"), lora)
    adapters = [n for n, p in model.named_parameters() if p.requires_grad]
    hidden = {id(p) for p in targets.hidden(model)}
    found = {n for n, p in model.named_parameters() if n in adapters and id(p) in hidden}
    assert found == {name for name in adapters if ".q_proj." in name}


def test_a_pattern_that_is_in_no_name_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(BadInput, match=r"no weight's name matches 'lm_haed'; did you mean 'lm_head'"):
        targets.train_only(families.model("llama"), ["layers", "lm_haed"])


@pytest.mark.parametrize(
    ("family", "patterns", "lacking"),
    [
        ("llama", ["layers"], "embed_tokens and lm_head"),
        ("llama", ["layers", "lm_head"], "embed_tokens"),
        ("qwen2", ["layers"], "embed_tokens and lm_head"),  # tied
        ("qwen2", ["layers", "lm_head"], ""),
        ("llama", ["lm_head", "embed_tokens"], ""),
    ],
)
def test_new_tokens_are_not_left_untrained(family: str, patterns: list[str], lacking: str) -> None:
    """They begin with the same embedding, and would keep it."""
    refused = pytest.raises(BadInput, match=f"add {lacking} to train_only") if lacking else nullcontext()
    with refused:
        targets.train_only(families.model(family), patterns, grown=True)


def test_what_is_not_trained_is_exported_as_it_was(stoker: Command, tmp_path: Path) -> None:
    folder = families.save(tmp_path / "m", "llama")
    (tmp_path / "d.jsonl").write_text('{"text": "one two three four five six"}\n' * 40)
    given = ("model=m", "data=d.jsonl", "sequence_length=32", "max_steps=3", "precision=fp32")
    given += ("validation=0", "test=0")
    done = stoker("train", "llm", *given, "--name", "a", "train_only=[layers.3]", "neftune=5")
    assert "are trained" in done.err, done.err
    before = load_file_of(folder)
    after = load_file_of(tmp_path / "runs" / "llm" / "a" / "artifacts" / "model")
    moved = {name for name, tensor in before.items() if not torch.equal(after[name], tensor)}
    assert moved
    assert all("layers.3." in name for name in moved)
    grown = stoker("train", "llm", *given, "--name", "b", "train_only=[layers.3]", 'add_tokens=["<a>"]')
    assert "add embed_tokens and lm_head to train_only, or omit add_tokens" in grown.err


def load_file_of(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}
