"""Weights from files into a model on the meta device: as transformers loads them, each rank its own part."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from pathlib import Path

import loading_run
import pytest
import torch
from safetensors.torch import load_file, save_file
from stoker.errors import BadInput
from stoker.language import building
from stoker.language.lora import Lora
from transformers import AutoModelForCausalLM, RobertaConfig

import families
import ranks
from support import SOAK

Trained = tuple[list[float], dict[str, torch.Tensor]]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A directory a family, which a worker makes for those alone that it tests."""
    folder = tmp_path_factory.mktemp("models")
    return functools.cache(lambda family: families.save(folder / family, family))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ranks train: a Llama of two layers, one for each of two stages."""
    return families.save(tmp_path_factory.mktemp("base") / "llama", "llama", num_hidden_layers=2)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STOKER_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("family", families.FAMILIES)
def test_every_family_loads_as_with_transformers(
    family: str, kind: str, saved: Callable[[str], Path]
) -> None:
    model, language = loading_run.built(saved(family), kind)
    assert all(p.is_meta for name, p in model.named_parameters() if "lora_" not in name)
    language.load(model, CPU, "")
    plain = AutoModelForCausalLM.from_pretrained(saved(family), dtype=torch.float32)
    bare = model.get_base_model() if kind == "lora" else model
    assert not any(t.is_meta for t in [*model.parameters(), *model.buffers()])
    ids = families.documents()["input_ids"]
    bare.set_attn_implementation("eager")
    plain.set_attn_implementation("eager")
    with torch.no_grad():  # an adapter begins as nothing
        assert torch.equal(model.eval()(input_ids=ids).logits, plain.eval()(input_ids=ids).logits)
    tied = bare.get_output_embeddings().weight is bare.get_input_embeddings().weight
    assert tied == (plain.get_output_embeddings().weight is plain.get_input_embeddings().weight)


SIZED = [("fsdp", 3), ("pipeline", 2), ("zero3", 2), ("ddp", 2), ("fsdp", 2), ("hybrid", 4), ("zero2", 2)]


@pytest.mark.soak
@pytest.mark.parametrize("kind", ["full", "lora"] if SOAK else ["lora"])
@pytest.mark.parametrize(("strategy", "size"), SIZED if SOAK else SIZED[:3])
def test_under_every_strategy_the_weights_are_those_of_the_files(
    strategy: str, size: int, kind: str, base: Path, tmp_path: Path
) -> None:
    answers = ranks.run(loading_run.fill, size, tmp_path, base, tmp_path, strategy, kind)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).state_dict()
    found = answers[0][0]
    assert found.keys() == plain.keys()
    assert all(torch.equal(found[name], plain[name]) for name in plain)
    whole = sum(t.nbytes for t in plain.values())
    if kind == "full" and strategy == "fsdp":  # a rank has read its own rows, and no more
        for _, held, reads in answers:
            assert sum(reads) <= whole / size * 1.1
            assert held <= whole / size * 1.1


@pytest.mark.soak
@pytest.mark.parametrize(
    ("strategy", "size"),
    [("single", 1), ("fsdp", 2), ("zero2", 2), ("zero3", 2)] if SOAK else [("fsdp", 2)],
)
def test_what_is_not_trained_keeps_its_values_in_bf16_too(
    strategy: str, size: int, base: Path, tmp_path: Path
) -> None:
    (found, computed_in), *_ = ranks.run(loading_run.train_the_head, size, tmp_path, base, tmp_path, strategy)
    assert computed_in == torch.bfloat16
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).state_dict()
    assert found.keys() == plain.keys()
    moved = {name for name in plain if not torch.equal(found[name], plain[name])}
    assert moved == {"lm_head.weight"}


@pytest.mark.soak
@pytest.mark.parametrize("family", ["qwen2", "gpt2", "mixtral"] if SOAK else ["qwen2", "gpt2"])
def test_tied_transposed_and_fused_weights_are_sharded_too(
    family: str, saved: Callable[[str], Path], tmp_path: Path
) -> None:
    (found, held, _), _ = ranks.run(loading_run.fill, 2, tmp_path, saved(family), tmp_path, "fsdp", "full")
    plain = AutoModelForCausalLM.from_pretrained(saved(family), dtype=torch.float32)
    expected = dict(plain.named_parameters())
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert held <= sum(t.nbytes for t in expected.values()) / 2 * 1.1


@pytest.fixture(scope="module")
def alone(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Trained]:
    """Losses and weights of one process, by what is trained."""
    folder = tmp_path_factory.mktemp("alone")

    @functools.cache
    def trained(kind: str) -> Trained:
        (found,) = ranks.run(loading_run.train, 1, folder, base, folder, "single", kind)
        return found  # type: ignore[no-any-return]

    return trained


EVERY = [
    *((kind, s) for kind in ("full", "lora") for s in ("ddp", "fsdp", "pipeline", "zero2", "zero3")),
    *((kind, s) for kind in ("dora", "qlora") for s in ("ddp", "fsdp", "zero2", "zero3")),
    ("rslora", "fsdp"),
]
FEW = [
    ("full", "fsdp"), ("full", "pipeline"), ("lora", "ddp"), ("dora", "zero2"), ("qlora", "fsdp"),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft's own
@pytest.mark.soak
@pytest.mark.parametrize(("kind", "strategy"), EVERY if SOAK else FEW)
def test_trained_under_every_strategy_it_is_as_in_one_process(
    strategy: str, kind: str, alone: Callable[[str], Trained], base: Path, tmp_path: Path
) -> None:
    (losses, trained), *_ = ranks.run(loading_run.train, 2, tmp_path, base, tmp_path, strategy, kind)
    expected_losses, expected = alone(kind)
    assert losses == pytest.approx(expected_losses, rel=1e-5)
    assert trained.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(trained[name], tensor, rtol=1e-4, atol=1e-4)
    if kind != "full":
        assert_peft_gives_the_same(tmp_path / f"adapter-{strategy}", base, expected)


@pytest.fixture(scope="module")
def begun(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that is no longer what it began as."""
    model, language = loading_run.built(base, "lora")
    language.load(model, CPU, "")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    folder = tmp_path_factory.mktemp("begun")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def gone_on(base: Path, begun: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Losses and weights of one process that goes on with it."""
    folder = tmp_path_factory.mktemp("gone-on")
    given = Lora(adapter=str(begun))
    (found,) = ranks.run(loading_run.train, 1, folder, base, folder, "single", "lora", lora=given)
    return found


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft's own
@pytest.mark.soak
@pytest.mark.parametrize("strategy", ["fsdp", "zero3"] if SOAK else ["zero3"])
def test_an_adapter_is_gone_on_with_under_every_strategy_as_in_one_process(
    strategy: str,
    begun: Path,
    gone_on: Trained,
    alone: Callable[[str], Trained],
    base: Path,
    tmp_path: Path,
) -> None:
    given = Lora(adapter=str(begun))
    (losses, trained), _ = ranks.run(
        loading_run.train, 2, tmp_path, base, tmp_path, strategy, "lora", lora=given
    )
    expected_losses, expected = gone_on
    assert losses == pytest.approx(expected_losses, rel=1e-5)
    assert losses[0] != pytest.approx(alone("lora")[0][0], rel=1e-2), "it is no new adapter"
    for name, tensor in expected.items():
        torch.testing.assert_close(trained[name], tensor, rtol=1e-4, atol=1e-4)
    assert_peft_gives_the_same(tmp_path / f"adapter-{strategy}", base, expected)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft's own
def test_in_bf16_an_adapter_learns_when_sharded_and_loads_with_peft(tmp_path: Path) -> None:
    tiny = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}  # bf16 is slow on most CPUs
    folder = families.save(tmp_path / "tiny", "llama", **tiny)
    (losses, trained), _ = ranks.run(
        loading_run.train, 2, tmp_path, folder, tmp_path, "fsdp", "lora", precision="bf16", lr=0.03, steps=6
    )
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[-1] < losses[0] * 0.9
    assert {tensor.dtype for tensor in trained.values()} == {torch.float32}
    assert_peft_gives_the_same(tmp_path / "adapter-fsdp", folder, trained)


def assert_peft_gives_the_same(adapter: Path, base: Path, expected: dict[str, torch.Tensor]) -> None:
    """The saved adapter as plain peft loads it, against the one that one process has trained."""
    from peft import PeftModel

    def on_base() -> torch.nn.Module:
        return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)

    theirs = PeftModel.from_pretrained(on_base(), adapter).eval()
    ours = PeftModel.from_pretrained(on_base(), adapter).eval()
    assert not ours.load_state_dict(expected, strict=False).unexpected_keys
    ids = families.documents()["input_ids"]
    with torch.no_grad():
        logits = theirs(input_ids=ids).logits
        torch.testing.assert_close(logits, ours(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(logits, on_base().eval()(input_ids=ids).logits, rtol=1e-2)


def build(folder: Path) -> None:
    model, language = loading_run.built(folder, "full")
    language.load(model, CPU, "")


def test_what_is_wrong_with_the_files_is_said(tmp_path: Path) -> None:
    folder = families.save(tmp_path / "m", "llama")
    index = folder / "model.safetensors.index.json"
    known = json.loads(index.read_text())
    first = folder / sorted(set(known["weight_map"].values()))[0]
    content = first.read_bytes()

    tensors = load_file(first)
    name = next(iter(tensors))
    save_file({n: t for n, t in tensors.items() if n != name}, first, {"format": "pt"})
    with pytest.raises(BadInput, match=rf"lack 1 of the model's tensors: {name}"):
        build(folder)
    save_file({**tensors, name: tensors[name][:-1].clone()}, first, {"format": "pt"})
    with pytest.raises(BadInput, match=f"{name} is"):
        build(folder)
    first.write_bytes(content[:100])
    with pytest.raises(BadInput, match=f"{first.name} cannot be read"):
        build(folder)
    first.unlink()
    with pytest.raises(BadInput, match=f"has no {first.name}"):
        build(folder)
    index.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    with pytest.raises(BadInput, match="is a pickle, which is never read"):
        build(folder)


def test_a_model_that_is_none_is_refused(tmp_path: Path) -> None:
    folder = families.save(tmp_path / "m", "llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "model_type": "vit", "architectures": ["ViTModel"]})
    )
    with pytest.raises(BadInput, match="a vit, which is not a causal language model"):
        build(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(BadInput, match="cannot be read"):
        build(folder)


def test_an_encoder_is_no_causal_model_unless_it_says_so(tmp_path: Path) -> None:
    """transformers loads it as one, but its tokens see what they would have to predict."""
    RobertaConfig().save_pretrained(tmp_path)
    with pytest.raises(BadInput, match="a roberta that encodes"):
        building.load_config(tmp_path)
    RobertaConfig(is_decoder=True).save_pretrained(tmp_path)
    assert building.load_config(tmp_path).is_decoder


def test_a_hub_that_cannot_be_reached_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(BadInput, match=r"hub cannot be reached.*HF_HOME"):
        building.build("some/model", tokenizer=None, vocab_size=300, sequence_length=8, documents=[])
