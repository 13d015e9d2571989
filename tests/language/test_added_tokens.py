"""Tokens that are added to a model's own, and modules that are trained whole beside adapters."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import loading_run
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from stoker.errors import BadInput
from stoker.language import flops, lora, objective
from stoker.language.loading import _Grown
from stoker.language.lora import Lora
from stoker.recipes import llm
from transformers import AutoModelForCausalLM, AutoTokenizer

import families
from support import loaded

CPU = torch.device("cpu")
TOKENS = ("<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
pytestmark = pytest.mark.filterwarnings("ignore")  # peft's and transformers' own


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model with an output layer of its own, and one that predicts with its embeddings."""
    folder = tmp_path_factory.mktemp("models")
    tokens = len(AutoTokenizer.from_pretrained(families.save(folder / "some", "llama")))
    return {f: families.save(folder / f, f, vocab_size=tokens) for f in ("llama", "qwen2")}


def ends_of(model: Any) -> list[torch.Tensor]:
    bare = model.get_base_model() if hasattr(model, "peft_config") else model
    ends = (bare.get_input_embeddings(), bare.get_output_embeddings())
    return [lora.as_trained(end).weight.detach() for end in ends]


def test_each_part_of_a_grown_tensor_is_of_its_rows_and_their_mean(tmp_path: Path) -> None:
    there = torch.randn(11, 3)
    save_file({"there": there}, tmp_path / "file.safetensors")
    whole = torch.cat([there, there.double().mean(0).float().expand(4, 3)])
    with safe_open(tmp_path / "file.safetensors", framework="pt") as file:
        grown = _Grown(file.get_slice("there"), 15, 20)
        assert grown.get_shape() == [15, 3]
        assert torch.equal(grown[...], whole)
        for begin in range(16):
            for end in range(begin, 16):
                assert torch.equal(grown[begin:end], whole[begin:end])
                assert torch.equal(grown[begin:end, 1:2], whole[begin:end, 1:2])
        spare = _Grown(file.get_slice("there"), 11, 8)
        assert torch.equal(
            spare[...], torch.cat([there[:8], there[:8].double().mean(0).float().expand(3, 3)])
        )


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_added_tokens_begin_as_the_mean_and_are_trained(
    family: str, kind: str, bases: dict[str, Path]
) -> None:
    plain = AutoModelForCausalLM.from_pretrained(bases[family], dtype=torch.float32)
    model, language = loading_run.built(bases[family], kind, add_tokens=TOKENS)
    language.load(model, CPU, "")
    had = language.tokenizer.convert_tokens_to_ids(TOKENS[0])
    for grown, before in zip(ends_of(model), ends_of(plain), strict=True):
        assert torch.equal(grown[:had], before)
        torch.testing.assert_close(grown[had:], before.mean(0).expand(2, -1))
    called = objective.attach(model)
    assert called.in_head, "its logits need not stand in memory"
    batch = families.documents()
    batch["input_ids"] = batch["input_ids"] % had
    batch["input_ids"][0, 2:4] = torch.tensor([had, had + 1])
    batch["labels"] = torch.where(batch["labels"] < 0, -100, batch["input_ids"])
    total, _ = called.loss(model.eval()(**called.inputs(batch)), batch)
    total.backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None and p.grad[had:].any()}
    assert any("embed_tokens" in name for name in trained)
    assert family == "qwen2" or any("lm_head" in name for name in trained)


def test_a_model_with_rows_to_spare_stays_as_large(tmp_path: Path) -> None:
    base = families.save(tmp_path / "model", "llama")
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model, language = loading_run.built(base, "lora", add_tokens=TOKENS)
    language.load(model, CPU, "")
    assert model.get_base_model().config.vocab_size == families.VOCABULARY
    known = len(language.tokenizer) - 2
    for spare, before in zip(ends_of(model), ends_of(plain), strict=True):
        assert torch.equal(spare[:known], before[:known])
        torch.testing.assert_close(spare[known], before[:known].mean(0))


def test_tokens_that_there_are_already_cost_nothing(bases: dict[str, Path]) -> None:
    model, language = loading_run.built(bases["llama"], "lora", add_tokens=("<|endoftext|>",))
    assert not language.added_tokens
    assert not model.peft_config["default"].modules_to_save


def test_what_is_trained_whole_takes_operations_once(bases: dict[str, Path]) -> None:
    alone, _ = loading_run.built(bases["llama"], "lora", Lora(rank=4))
    beside, _ = loading_run.built(bases["llama"], "lora", Lora(rank=4, modules_to_save="lm_head"))
    head = alone.get_base_model().get_output_embeddings().weight.numel()
    more = flops.per_token(beside, context=4.0) - flops.per_token(alone, context=4.0)
    assert more == 2 * head, "the gradient of its weight"


@pytest.mark.parametrize(
    ("kind", "name", "said"),
    [
        (
            "lora",
            "lm_haed",
            "lora.modules_to_save: the model has no module 'lm_haed'; did you mean 'lm_head'",
        ),
        ("qlora", "q_proj", "q_proj is kept in 4 bits and cannot be trained"),
    ],
)
def test_what_cannot_be_trained_whole_is_refused(
    kind: str, name: str, said: str, bases: dict[str, Path]
) -> None:
    with pytest.raises(BadInput, match=said):
        loading_run.built(bases["llama"], kind, Lora(rank=4, modules_to_save=name))


def test_an_adapter_that_is_gone_on_from_gets_no_tokens() -> None:
    with pytest.raises(
        ValueError, match="keeps the tokens that it was trained with, and cannot get new ones"
    ):
        llm.Config(add_tokens=TOKENS, lora=Lora(adapter="somewhere"))


def test_a_token_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="add_tokens: an empty or blank token"):
        llm.Config(add_tokens=("<a>", " "))


@pytest.mark.soak(small=False)
def test_an_adapter_with_tokens_of_its_own_is_the_same_sharded_and_can_be_used_wherever_adapters_are(
    bases: dict[str, Path], stoker: Callable[..., Any], tmp_path: Path
) -> None:
    """On a model that predicts with its embeddings, which learn apart."""
    from peft import AutoPeftModelForCausalLM

    (tmp_path / "chatml.jinja").write_text(CHATML)
    pairs = [{"prompt": f"what is {n}?", "completion": f"it is {n}"} for n in range(40)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    common = ("train", "llm", f"model={bases['qwen2']}", "data=d.jsonl", "sequence_length=64", "batch_size=4",
              "max_steps=3", "lr=0.01", "generate_tokens=0", "test=0")  # fmt: skip
    new = (*common, "chat_template=chatml.jinja", f"add_tokens={json.dumps(TOKENS)}", "lora.rank=4",
           "lora.dropout=0")  # fmt: skip
    made = []
    for how in (("--name", "one"), ("--name", "two", "--nproc", "2", "parallel=fsdp")):
        done = stoker(*new, *how)
        assert done.code == 0, done.err
        made.append(tmp_path / "runs" / "llm" / how[1] / "artifacts" / "adapter")
    one, two = (load_file(folder / "adapter_model.safetensors") for folder in made)
    assert {name for name in one if "lora_" not in name} == {
        "base_model.model.lm_head.weight", "base_model.model.model.embed_tokens.weight"
    }  # fmt: skip
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=1e-5)

    done = stoker(*common, f"lora.adapter={made[0]}", "--name", "further")
    assert done.code == 0, done.err
    views = [loaded(tmp_path / "runs" / "llm" / name) for name in ("one", "further")]
    assert views[1].points["val_loss"][0] == pytest.approx(views[0].last("val_loss"), rel=1e-6)
    assert stoker("models", "push", "one", "merged", "--merge").code == 0
    ids = torch.arange(2, len(AutoTokenizer.from_pretrained(made[0])))[None]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    theirs = AutoPeftModelForCausalLM.from_pretrained(made[0]).eval()
    with torch.no_grad():
        torch.testing.assert_close(
            merged(input_ids=ids).logits, theirs(input_ids=ids).logits, rtol=1e-4, atol=1e-4
        )
    assert stoker("generate", "one", "--prompt", "what is 3?", "--max-tokens", "2").code == 0
