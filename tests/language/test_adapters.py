"""Adapters that go on from another, bases in 4 bits, and what is refused."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import loading_run
import pytest
import torch
from safetensors.torch import load_file, save_file
from stoker import Run, exports
from stoker import config as configs
from stoker.errors import BadInput
from stoker.language import adapters, building, hub, merging, saved_adapters, targets
from stoker.language.lora import Lora, as_trained, is_adapter, is_of_adapter
from stoker.recipes import llm
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

import families

CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft's own


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return families.save(tmp_path_factory.mktemp("models") / "llama", "llama")


def filled(folder: Path, kind: str, lora: Lora | None = None) -> Any:
    model, language = loading_run.built(folder, kind, lora)
    language.load(model, CPU, "")
    return model.eval()


def logits(model: Any) -> torch.Tensor:
    bare = model.get_base_model() if hasattr(model, "peft_config") else model
    bare.set_attn_implementation("eager")
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=families.documents()["input_ids"]).logits
    return found


def trained_adapter(
    base: Path, folder: Path, kind: str, lora: Lora | None = None
) -> tuple[Path, torch.Tensor]:
    """An adapter whose weights are not those it began with, saved; and the logits with it."""
    model = filled(base, kind, lora)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder, logits(model)


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora"])
def test_an_adapter_is_gone_on_with_as_it_was(kind: str, base: Path, tmp_path: Path) -> None:
    folder, expected = trained_adapter(base, tmp_path / "adapter", kind)
    model = filled(base, kind, Lora(adapter=str(folder)))
    torch.testing.assert_close(logits(model), expected)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    saved = json.loads((folder / "adapter_config.json").read_text())
    own = adapters.settings(model, Lora(adapter=str(folder)))
    assert (own["lora.rank"], own["lora.alpha"]) == (saved["r"], saved["lora_alpha"])
    assert (own["lora.rslora"], own["lora.dora"]) == (kind == "rslora", kind == "dora")
    assert set(own["lora.targets"].split(",")) == set(saved["target_modules"])
    for key, value in own.items():
        assert configs.checked(llm.Config, key, value) == value


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_new_adapter_changes_nothing_yet(kind: str, base: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.testing.assert_close(logits(filled(base, kind)), logits(plain.eval()))


@pytest.fixture(scope="module")
def in_4_bits(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base with weights that 4 bits hold as they are."""
    from bitsandbytes import functional

    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for layer in plain.modules():
        if type(layer) is nn.Linear and layer is not plain.get_output_embeddings():
            codes, state = functional.quantize_4bit(layer.weight.data, blocksize=64, quant_type="nf4")
            layer.weight.data = functional.dequantize_4bit(codes, state)
    folder = tmp_path_factory.mktemp("models") / "in-4-bits"
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    plain.save_pretrained(folder)
    return folder


def merged(adapter: Path, folder: Path) -> torch.Tensor:
    """The logits of plain transformers with the merged model."""
    merging.merge(adapter, folder)
    assert not (folder / "adapter_config.json").exists()
    return logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval())


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora", "qlora"])
def test_merged_an_adapter_is_a_model_of_the_same_logits(
    kind: str, base: Path, in_4_bits: Path, tmp_path: Path
) -> None:
    model = in_4_bits if kind == "qlora" else base
    adapter, expected = trained_adapter(model, tmp_path / "adapter", kind)
    torch.testing.assert_close(merged(adapter, tmp_path / "merged"), expected, rtol=1e-4, atol=1e-4)
    assert (expected - logits(filled(model, kind))).norm() > 0.1 * expected.norm(), (
        "the adapter does something"
    )


@pytest.mark.filterwarnings("ignore:.*tie")  # peft's own
@pytest.mark.parametrize("targets", ["q_proj,lm_head", "q_proj,embed_tokens", "embed_tokens,lm_head"])
def test_merged_an_adapter_on_tied_weights_changes_that_end_alone(targets: str, tmp_path: Path) -> None:
    tied = families.save(tmp_path / "tied", "llama", tie_word_embeddings=True)
    adapter, expected = trained_adapter(tied, tmp_path / "adapter", "lora", Lora(rank=4, targets=targets))
    torch.testing.assert_close(merged(adapter, tmp_path / "merged"), expected, rtol=1e-4, atol=1e-4)


def test_a_model_that_says_how_to_sample_and_not_to_is_exported_and_merged(
    base: Path, tmp_path: Path
) -> None:
    """As many models of old have it, and transformers does not write it."""
    folder = shutil.copytree(base, tmp_path / "base")
    (folder / "generation_config.json").write_text('{"temperature": 0.9, "top_p": 0.6}')
    _, language = loading_run.built(folder, "lora")
    language.generation_config.save_pretrained(tmp_path / "exported")
    adapter, _ = trained_adapter(folder, tmp_path / "adapter", "lora")
    merged(adapter, tmp_path / "merged")
    for written in ("exported", "merged"):
        found = json.loads((tmp_path / written / "generation_config.json").read_text())
        assert (found["temperature"], found["top_p"], found["do_sample"]) == (0.9, 0.6, True)


def test_merged_an_adapter_on_4_bits_differs_by_what_they_had_rounded(base: Path, tmp_path: Path) -> None:
    """It is merged into the plain weights: that differs by at most twice what rounding does without it."""
    adapter, quantised = trained_adapter(base, tmp_path / "adapter", "qlora")
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    rounding = (logits(filled(base, "qlora")) - logits(plain.eval())).norm()
    found = merged(adapter, tmp_path / "merged")
    assert 0 < (found - quantised).norm() < 2 * rounding
    from peft import PeftModel

    theirs = PeftModel.from_pretrained(plain, adapter).eval()
    torch.testing.assert_close(found, logits(theirs), rtol=1e-4, atol=1e-4)


def test_adapters_of_another_model_are_refused(base: Path, tmp_path: Path) -> None:
    folder, _ = trained_adapter(base, tmp_path / "adapter", "lora")
    wider = families.save(tmp_path / "wider", "llama", hidden_size=128)
    with pytest.raises(BadInput, match="is for a different model: size mismatch"):
        filled(wider, "lora", Lora(adapter=str(folder)))
    deeper = families.save(tmp_path / "deeper", "llama", num_hidden_layers=5)
    with pytest.raises(BadInput, match=r"is for a different model: .*layers\.4.* is not in both"):
        filled(deeper, "lora", Lora(adapter=str(folder)))
    (folder / exports.BASE).write_text(json.dumps({"model": "org/other", "fingerprint": "0" * 64}))
    with pytest.raises(BadInput, match="trained on a different model, org/other"):
        filled(base, "lora", Lora(adapter=str(folder)))
    (folder / "adapter_model.safetensors").write_bytes(b"cut off")
    (folder / exports.BASE).unlink()
    with pytest.raises(BadInput, match="cannot be read"):
        filled(base, "lora", Lora(adapter=str(folder)))
    with pytest.raises(BadInput, match=r"has no adapter_config\.json"):
        filled(base, "lora", Lora(adapter=str(base)))


@pytest.mark.filterwarnings("ignore")  # peft's own
@pytest.mark.parametrize(
    ("settings", "how", "said"),
    [
        ({"bias": "all"}, {}, "has bias=all: only low-rank matrices"),
        ({"trainable_token_indices": [5, 6]}, {}, r"has trainable_token_indices=\[5, 6\]:"),
        ({"init_lora_weights": "pissa"}, {}, "has init_lora_weights=pissa:"),
    ],
)
def test_an_adapter_with_more_than_low_rank_matrices_is_refused(
    settings: dict[str, Any], how: dict[str, Any], said: str, base: Path, tmp_path: Path
) -> None:
    """As saved by peft: the rest of it would be lost without a word."""
    theirs = saved_by_peft(base, tmp_path / "adapter", settings, **how)
    with pytest.raises(BadInput, match=said):
        filled(base, "lora", Lora(adapter=str(theirs)))


@pytest.mark.filterwarnings("ignore")  # peft's own
@pytest.mark.parametrize(
    ("on", "name"),
    [(["q_proj"], "model.embed_tokens.weight"), (["embed_tokens"], "model.embed_tokens.base_layer.weight")],
)
def test_embeddings_that_peft_saved_beside_an_adapter_must_be_the_model_s(
    on: list[str], name: str, base: Path, tmp_path: Path
) -> None:
    from peft import PeftModel

    theirs = saved_by_peft(base, tmp_path / "adapter", {"target_modules": on}, save_embedding_layers=True)
    file = theirs / saved_adapters.WEIGHTS
    tensors = load_file(file)
    assert f"base_model.model.{name}" in tensors
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    expected = logits(PeftModel.from_pretrained(plain, theirs).eval())
    torch.testing.assert_close(logits(filled(base, "lora", Lora(adapter=str(theirs)))), expected)
    tensors[f"base_model.model.{name}"][7] += 1
    save_file(tensors, file)
    with pytest.raises(BadInput, match=rf"has base_model\.model\.{name}: only low-rank matrices"):
        filled(base, "lora", Lora(adapter=str(theirs)))


@pytest.mark.filterwarnings("ignore")  # peft's own
@pytest.mark.parametrize(
    "settings",
    [
        {"init_lora_weights": "gaussian"},
        {"lora_bias": True},
        {"rank_pattern": {"q_proj": 2}},
        {"modules_to_save": ["lm_head", "embed_tokens"]},
        {"modules_to_save": ["norm"]},  # which peft takes for each module whose name ends so
    ],
)
def test_an_adapter_of_peft_s_is_gone_on_with(settings: dict[str, Any], base: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    theirs = saved_by_peft(base, tmp_path / "adapter", settings)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    expected = logits(PeftModel.from_pretrained(plain, theirs).eval())
    torch.testing.assert_close(logits(filled(base, "lora", Lora(adapter=str(theirs)))), expected)


def test_what_a_whole_module_has_in_no_file_is_as_in_its_original(tmp_path: Path) -> None:
    """The scale of Gemma's embeddings is a buffer that is not persistent."""
    from peft import PeftModel

    gemma = families.save(tmp_path / "gemma", "gemma3", tie_word_embeddings=False)
    theirs = saved_by_peft(gemma, tmp_path / "adapter", {"modules_to_save": ["embed_tokens"]})
    plain = AutoModelForCausalLM.from_pretrained(gemma, dtype=torch.float32)
    expected = logits(PeftModel.from_pretrained(plain, theirs).eval())
    model = filled(gemma, "lora", Lora(adapter=str(theirs)))
    torch.testing.assert_close(logits(model), expected)
    assert not any(buffer.is_meta for buffer in model.buffers())


def test_of_modules_trained_whole_none_merely_ends_in_the_same_letters(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """`input_layernorm` ends in `norm`, but is no `norm`."""
    model = filled(base, "lora", Lora(rank=4, modules_to_save="norm"))
    trained = {n for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n}
    assert trained == {"base_model.model.model.norm.modules_to_save.default.weight"}
    with caplog.at_level("INFO", "stoker"), Run("test", "whole", runs=tmp_path / "runs") as run:
        targets.say(run, model)
    assert caplog.text.rstrip().endswith("v_proj, norm whole")
    with torch.no_grad():
        as_trained(model.get_base_model().model.norm).weight.mul_(2)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    again = filled(base, "lora", Lora(adapter=str(tmp_path / "adapter")))
    torch.testing.assert_close(logits(again), logits(model))


def saved_by_peft(base: Path, folder: Path, settings: dict[str, Any], **how: Any) -> Path:
    """An adapter that peft has made and saved, with values that are none of a beginning."""
    from peft import LoraConfig, get_peft_model

    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = LoraConfig(
        **{"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **settings}
    )
    model = get_peft_model(plain, config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder, **how)
    return folder


def test_dora_is_not_gone_on_with_on_a_base_in_4_bits(base: Path, tmp_path: Path) -> None:
    folder, _ = trained_adapter(base, tmp_path / "adapter", "dora")
    with pytest.raises(BadInput, match="DoRA needs them in full precision"):
        filled(base, "qlora", Lora(adapter=str(folder)))
    with pytest.raises(BadInput, match="DoRA needs them in full precision"):
        launched(model=str(base), quantisation="nf4", lora=Lora(adapter=str(folder)))


def launched(**settings: Any) -> None:
    """What is looked at before any process is started."""
    llm.check_launch(llm.Config(**settings))


@pytest.mark.parametrize(
    ("family", "targets"),
    [
        ("llama", "q_proj,self_attn.v_proj"),
        ("gpt2", "c_attn, mlp.c_proj"),
        ("mixtral", "all-linear, gate_up_proj"),  # whose files name the weights of experts otherwise
    ],
)
def test_modules_that_a_model_has_are_taken_at_the_launch(family: str, targets: str, tmp_path: Path) -> None:
    launched(model=str(families.save(tmp_path / "model", family)), lora=Lora(rank=2, targets=targets))


@pytest.mark.parametrize("files", ["weights", "config alone"])
def test_modules_that_a_model_lacks_are_refused_at_the_launch(files: str, tmp_path: Path) -> None:
    folder = families.save(tmp_path / "model", "llama")
    if files == "config alone":
        for file in folder.glob("*.safetensors*"):
            file.unlink()
    for model in (str(folder), "tiny"):
        with pytest.raises(BadInput, match=r"has no layer 'q_prj'; did you mean 'q_proj'\?"):
            launched(model=model, lora=Lora(rank=2, targets="v_proj,q_prj"))
        with pytest.raises(
            BadInput, match=r"modules_to_save: the model has no module 'lm_haed'; did you mean"
        ):
            launched(model=model, lora=Lora(rank=2, modules_to_save="lm_haed"))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_rows_longer_than_the_model_are_refused_at_the_launch(family: str, tmp_path: Path) -> None:
    folder = families.save(tmp_path / "model", family)
    launched(model=str(folder), sequence_length=256)
    with pytest.raises(BadInput, match="sequence_length=257 is more than the 256 positions of"):
        launched(model=str(folder), sequence_length=257)


def says_it_is_for(adapter: Path, model: str) -> Path:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": model}))
    return adapter


def test_an_adapter_that_says_that_it_is_for_another_model_of_the_hub_is_refused(
    base: Path, tmp_path: Path
) -> None:
    adapter = says_it_is_for(trained_adapter(base, tmp_path / "adapter", "lora")[0], "org/one")
    for same in ("org/one", "Org/One@v2", str(base)):
        saved_adapters.check(adapter, model=same, origin=base, quantised=False)
    with pytest.raises(BadInput, match="is for a different model, org/one: set model=org/one"):
        saved_adapters.check(adapter, model="org/two@v2", origin=base, quantised=False)


@pytest.mark.parametrize(
    ("said", "warned"), [("org/one", True), ("/home/else/llama", True), ("ORG/base", False), ("HERE", False)]
)
def test_an_adapter_warns_where_its_model_may_be_another(
    said: str, warned: bool, base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "models--org--base" / "snapshots" / "1"
    shutil.copytree(base, folder)
    adapter, _ = trained_adapter(folder, tmp_path / "adapter", "lora")
    says_it_is_for(adapter, said.replace("HERE", str(folder)))
    filled(folder, "lora", Lora(adapter=str(adapter)))
    assert (f"says that it is for {said}, and nothing shows" in caplog.text) is warned
    assert len(caplog.records) == warned


def test_a_directory_that_names_its_model_is_that_model(base: Path, tmp_path: Path) -> None:
    adapter = says_it_is_for(trained_adapter(base, tmp_path / "adapter", "lora")[0], "org/one")
    copy = tmp_path / "copy"
    copy.mkdir()
    for name, other in (("org/one", None), ("org/two", "org/one")):
        (copy / "config.json").write_text(json.dumps({"_name_or_path": name}))
        assert saved_adapters.other_model(adapter, str(copy), copy) == other


def test_what_is_not_there_or_for_another_model_is_said_at_the_launch(base: Path, tmp_path: Path) -> None:
    adapter, _ = trained_adapter(base, tmp_path / "adapter", "lora")
    given = Lora(adapter=str(adapter))
    launched(model=str(base), lora=given)
    with pytest.raises(BadInput, match=r"lora\.adapter \./nowhere is not a directory"):
        launched(model=str(base), lora=Lora(adapter="./nowhere"))
    with pytest.raises(BadInput, match=r"tokenizer \./nowhere is not a directory"):
        launched(tokenizer="./nowhere")
    with pytest.raises(BadInput, match=r"tokenizer directory .*adapter has no tokenizer\.json"):
        launched(tokenizer=str(adapter))
    launched(tokenizer=str(base))
    known = {"model": "org/one", "fingerprint": hub.fingerprint(base)}
    (adapter / exports.BASE).write_text(json.dumps(known))
    launched(model=str(base), lora=given)
    other = families.save(tmp_path / "other", "llama", rms_norm_eps=1e-3)
    tensor_file = next(other.glob("*.safetensors"))
    save_file({name: t + 1 for name, t in load_file(tensor_file).items()}, tensor_file, {"format": "pt"})
    for model in (str(other), "tiny"):
        with pytest.raises(BadInput, match="was trained on a different model, org/one"):
            launched(model=model, lora=given)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "cannot be read: .*No such file"),
        ("", "is empty: give a Jinja template"),
        ("You are a helpful assistant.", "writes no messages: give a Jinja template"),
        ("{% for m in messages %}\n{{ m.content }", "is not a valid Jinja template, line 2: unexpected '}'"),
        ("{% for m in messages %}{{ m.content }}", "is not a valid Jinja template, line 1: Unexpected end"),
        ("{% generation %}{% for m in messages %}{% break %}{% endfor %}{% endgeneration %}", None),
    ],
)
def test_a_chat_template_that_is_none_is_said_at_the_launch(
    text: str | None, said: str | None, tmp_path: Path
) -> None:
    file = tmp_path / "chat.jinja"
    if text is not None:
        file.write_text(text)
    with pytest.raises(BadInput, match=said) if said else contextlib.nullcontext():
        launched(chat_template=str(file))


def test_weights_are_read_to_be_compared_where_they_are_known_and_by_one_rank(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, _ = trained_adapter(base, tmp_path / "adapter", "lora")
    read: list[Path] = []
    monkeypatch.setattr(hub, "fingerprint", lambda folder: read.append(folder) or "1")
    language = building.build(str(base), tokenizer=None, vocab_size=300, sequence_length=24, documents=[])
    adapters.adapted(language, Lora(adapter=str(adapter)))
    (adapter / exports.BASE).write_text(json.dumps({"model": "org/one", "fingerprint": "1"}))
    language = building.build(str(base), tokenizer=None, vocab_size=300, sequence_length=24, documents=[])
    adapters.adapted(language, Lora(adapter=str(adapter)), compare=False)
    assert read == []
    language = building.build(str(base), tokenizer=None, vocab_size=300, sequence_length=24, documents=[])
    adapters.adapted(language, Lora(adapter=str(adapter)))
    assert read == [base]


@pytest.mark.parametrize("targets", ["q_proy", "v_proj, q_proy"])
def test_names_that_match_no_module_are_refused(targets: str, base: Path) -> None:
    said = (
        r"lora\.targets: .* no layer 'q_proy'; did you mean 'q_proj'\?; its layers are down_proj, .*v_proj$"
    )
    with pytest.raises(BadInput, match=said):
        loading_run.built(base, "lora", Lora(rank=4, targets=targets))


def test_settings_of_adapters_without_a_rank_make_no_sense() -> None:
    with pytest.raises(ValueError, match=r"lora\.alpha, lora\.dora without lora\.rank: .*Set lora\.rank"):
        Lora(dora=True, alpha=32.0)
    with pytest.raises(ValueError, match=r"lora\.lr_ratio without lora\.rank: .*or omit lora\.lr_ratio"):
        Lora(lr_ratio=16.0)
    with pytest.raises(ValueError, match=r"has its own rank: omit lora\.rank"):
        Lora(adapter="somewhere", rank=4, lr_ratio=16.0)
    with pytest.raises(BadInput, match=r"lora\.lr_ratio.*-1"):
        configs.resolve(llm.Config, ["lora.rank=4", "lora.lr_ratio=-1"])


def test_a_base_in_4_bits_is_that_of_bitsandbytes(base: Path, in_4_bits: Path) -> None:
    """The weights as transformers' own 4-bit loading has them: quantised by bitsandbytes, layer by layer."""
    plain = AutoModelForCausalLM.from_pretrained(in_4_bits, dtype=torch.float32)
    model = filled(base, "qlora")
    torch.testing.assert_close(logits(model), logits(plain.eval()))
    packed = sum(
        p.nbytes for name, p in model.named_parameters() if ".layers." in name and "lora_" not in name
    )
    whole = sum(p.nbytes for name, p in plain.named_parameters() if ".layers." in name)
    assert packed < 0.16 * whole  # 4 bits and a 64th of 32 of 32


def test_gradients_go_through_a_base_in_4_bits_as_through_its_values(base: Path) -> None:
    from stoker.language.quantised import Linear4bit

    layer = next(m for m in filled(base, "qlora").modules() if isinstance(m, Linear4bit))
    inputs = torch.randn(5, layer.in_features, requires_grad=True)
    weight = layer(torch.eye(layer.in_features)).T.detach()
    expected = nn.functional.linear(inputs, weight)
    torch.testing.assert_close(layer(inputs), expected)
    (ours,) = torch.autograd.grad(layer(inputs).square().sum(), inputs)
    (theirs,) = torch.autograd.grad(expected.square().sum(), inputs)
    torch.testing.assert_close(ours, theirs)


def test_under_autocast_an_adapter_s_input_is_not_copied_and_all_is_as_peft_has_it(base: Path) -> None:
    lora = Lora(rank=4, dropout=0.0)  # dropout would scale numbers of another precision
    layer = next(m for m in filled(base, "lora", lora).modules() if is_adapter(m)).train()
    layer.get_base_layer().to(torch.bfloat16)
    torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
    inputs = torch.randn(3, layer.in_features, dtype=torch.bfloat16, requires_grad=True)

    def trained() -> tuple[list[torch.Tensor], int]:
        with torch.autocast("cpu", torch.bfloat16), _Copies(inputs.shape) as copies:
            output = layer(inputs)
            weights = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
            found = torch.autograd.grad(output.sum(), [inputs, *weights])
        return [output, *found], copies.count

    ours, copies = trained()
    del layer._cast_input_dtype  # the instance's: peft's is that of the class
    theirs, copies_of_peft = trained()
    assert (copies, copies_of_peft) == (0, 4)
    for mine, its in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, its, rtol=0.0, atol=0.0)


class _Copies(TorchDispatchMode):
    """How often a tensor of some shape is copied into another type."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.count, self._shape = 0, shape

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._to_copy.default and args[0].shape == self._shape
        return func(*args, **(kwargs or {}))


@pytest.mark.filterwarnings("ignore")  # peft's own
@pytest.mark.parametrize(
    "settings",
    [{}, {"dora": True}, {"targets": "q_proj,embed_tokens"}, {"modules_to_save": "lm_head,embed_tokens"}],
)
def test_a_checkpoint_s_tensors_are_found_by_the_names_that_peft_saves(
    settings: dict[str, Any], base: Path, tmp_path: Path
) -> None:
    model = filled(base, "lora", Lora(rank=4, dropout=0.0, **settings))
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    of_adapter = [name for name in model.state_dict() if is_of_adapter(name)]
    assert {exports._by_peft(name) for name in of_adapter} == {*load_file(tmp_path / saved_adapters.WEIGHTS)}
