"""What is answered to who types the key of another trainer."""

from __future__ import annotations

from dataclasses import dataclass, make_dataclass
from pathlib import Path
from typing import Any

import pytest
import typer
from stoker import Training, config, other_names
from stoker.cli import main
from stoker.errors import BadInput
from stoker.recipes import image, llm


@dataclass(frozen=True, kw_only=True)
class Own:
    lr: float = 0.1
    """How far a step goes."""
    length: int = 4
    out_dirs: str = "out"


@dataclass(frozen=True, kw_only=True)
class Script(Training):
    lr: float = 0.1
    size: int = 4


def said(cls: type, override: str) -> str:
    with pytest.raises(BadInput) as caught:
        config.resolve(cls, [override])
    return str(caught.value)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (
            "learning_rate=2e-4",
            "unknown key 'learning_rate' (command line); use lr (Peak learning rate;",
        ),
        (
            "per_device_train_batch_size=4",
            "instead, set batch_size (Rows per step, over all ranks) and micro_batch (Samples per",
        ),
        ("warmup_ratio=0.1", "; use warmup (Length of the learning-rate warm-up: a share of the steps"),
        ("lora.r=8", "; use lora.rank (Rank of the adapters"),
        ("loraplus_lr_ratio=16", "; use lora.lr_ratio (Learning rate of the adapters' B matrices"),
        ("loraplus_lr_embedding=1e-6", "with lora.lr_ratio, the adapter of an embedding learns at lr"),
        ("dataset_split=train", "or a slice, org/name#/train[:20%]"),
        ("bf16=true", "; use precision=bf16"),
        ("output_dir=out", "every run has its own folder: use the options --runs DIR"),
        ("resume_from_checkpoint=true", "to resume from the newest checkpoint, repeat the command"),
        ("n_trials=40", "; use `stoker sweep`'s option --trials N"),
        ("max_concurrent_trials=4", "; use `stoker sweep`'s option --parallel N"),
        ("batch_sise=4", "did you mean 'batch_size'?"),
        # near in no letters: by the beginning of a name, and by the words of a meaning
        ("learning=1", "; use lr (Peak learning rate"),
        ("gradient_accum=2", "; instead, set batch_size ("),
        ("momentum=1", "; keys with a similar meaning: optimizer (AdamW, Muon, SGD with momentum"),
    ],
)
def test_a_name_that_is_no_key_is_answered_with_what_takes_its_place(override: str, expected: str) -> None:
    assert expected in said(llm.Config, override)


def test_of_a_config_of_one_s_own_only_its_own_keys_are_named_with_its_own_words() -> None:
    assert said(Own, "learning_rate=1").endswith("; use lr (How far a step goes)")
    assert said(Own, "max_length=4").endswith("; did you mean 'length'?")
    assert said(Own, "gradient_accumulation_steps=4").endswith("; the keys are lr, length, out_dirs")
    assert said(Own, "out_dir=a").endswith("; did you mean 'out_dirs'?")
    assert "--runs DIR" in said(Own, "default_root_dir=a")


def test_what_is_of_language_models_is_not_answered_to_others() -> None:
    assert "cross-entropy" not in said(Script, "loss=mse")
    assert "cross-entropy" in said(llm.Config, "loss=mse")
    assert "; leave it out: it is off without quan" in said(llm.Config, "load_in_4bit=false")
    assert "; use workers (" in said(image.Config, "num_workers=4")


def test_of_a_class_whose_source_is_not_there_the_key_is_named_all_the_same() -> None:
    made = make_dataclass("C", [("lr", float, 1.0)])
    made.__module__ = "builtins"
    assert said(made, "learning_rate=1").endswith("; use lr")


def test_of_many_keys_those_of_the_config_itself_are_named_and_how_all_are_seen() -> None:
    found = said(Script, "frobnicate=1")
    assert "; its own keys are lr, size; `stoker recipes show RECIPE`" in found
    assert found.endswith(f"lists all {len(config.describe(Script))}")
    assert "`stoker recipes show RECIPE`" in said(llm.Config, "frobnicate=1")
    assert len(said(llm.Config, "frobnicate=1")) < 200


def test_every_name_leads_to_a_key_of_a_recipe_and_is_none_itself() -> None:
    keys = config.describe(llm.Config) | config.describe(image.Config)
    ours = {name: other_names.keys_for(name, keys) for name in other_names._OURS}
    assert len(ours) > 100
    assert all(ours.values())
    assert not (ours.keys() | other_names._OPTIONS.keys()) & keys.keys()
    assert ours.keys() & other_names._OPTIONS.keys() == {"dataloader_num_workers", "num_workers"}
    for given in {given for names in ours.values() for given in names if "=" in given}:
        assert config.checked(llm.Config, *given.split("=")) is not None


def test_every_option_for_another_searchers_name_is_one_of_the_search() -> None:
    program: Any = typer.main.get_command(main.app("sweep"))
    known = {name for parameter in program.commands["sweep"].params for name in parameter.opts}
    given = {**other_names._OF_SEARCHES, **other_names._IN_SEARCHES}
    assert {word for option in given for word in option.split() if word.startswith("--")} <= known
    names = [name for names in other_names._OF_SEARCHES.values() for name in names.split()]
    names += [name for names in other_names._IN_SEARCHES.values() for name in names.split()]
    assert len(set(names)) == len(names)
    assert not {f"--{name.replace('_', '-')}" for name in names} & known
    assert other_names.option_of_search("n_jobs") == "--parallel N"
    assert other_names.option_of_search("mode") == "--goal min or --goal max"
    assert other_names.option_of_search("lr") == ""


def test_all_keys_of_another_trainers_file_are_answered_at_once(tmp_path: Path) -> None:
    file = tmp_path / "axolotl.yml"
    file.write_text(
        "base_model: a\nsequence_len: 64\nflash_attention: true\nadapter: lora\nwandb_project: p\nlr: 0.1\n"
    )
    with pytest.raises(BadInput) as caught:
        config.resolve(llm.Config, file=file)
    first, *lines = str(caught.value).splitlines()
    assert first == f"5 unknown keys ({file}):"
    assert [line.split(":")[0].strip() for line in lines] == [
        "base_model", "sequence_len", "flash_attention", "adapter", "wandb_project",
    ]  # fmt: skip
    assert lines[1] == "  sequence_len: use sequence_length (Tokens per row)"
    assert "lora.rank=16" in lines[3]
    assert "WANDB_PROJECT" in lines[4]


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("checkpointer: {checkpoint_dir: a}", "use model (A size to train from scratch"),
        ("dataset: {packed: true}", "use packing ("),
        ("dataset: {_component_: a}", "use data ("),
        ("lr_scheduler: {num_warmup_steps: 9}", "use warmup ("),
        ("lr_scheduler: {_component_: a}", "use schedule ("),
        ("special_tokens: {pad_token: a}", "special tokens come from the tokenizer"),
        ("loss: {_component_: a}", "not needed: cross-entropy"),
        ("gradient_checkpointing_kwargs: {use_reentrant: true}", "not needed: activation checkpointing"),
        ("stage: sft", "not needed: texts are pretraining"),
        ("load_in_4bit: true", "use quantisation=nf4"),
        ("load_in_4bit: false", "leave it out: it is off without quantisation=nf4"),
        ("load_in_4bit:", "leave it out: it is off without quantisation=nf4"),
        ("bf16: false", "use precision (fp32, bf16 or fp16"),
        ("dataset: {lora_attn_modules: [q]}", "use lora.targets ("),
    ],
)
def test_a_key_within_a_group_is_answered_by_its_own_name_or_its_groups(
    written: str, expected: str, tmp_path: Path
) -> None:
    file = tmp_path / "torchtune.yml"
    file.write_text(f"{written}\nrun_name: a\n")
    with pytest.raises(BadInput) as caught:
        config.resolve(llm.Config, file=file)
    assert f": {expected}" in str(caught.value).splitlines()[1]


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("data: [a.jsonl, org/name]", "a.jsonl,org/name"),
        ("data: {a.jsonl: 3, org/name: 1.5}", "a.jsonl:3,org/name:1.5"),
        ("data: a.jsonl:3,org/name:1.5", "a.jsonl:3,org/name:1.5"),
    ],
)
def test_data_may_be_a_list_or_a_mapping(written: str, read: str, tmp_path: Path) -> None:
    (tmp_path / "a.yml").write_text(f"{written}\nlora: {{rank: 4, targets: [q_proj, v_proj]}}\n")
    found = config.resolve(llm.Config, file=tmp_path / "a.yml").config
    assert (found.data, found.lora.targets) == (read, "q_proj,v_proj")
    key, _, value = written.partition(": ")
    assert config.resolve(llm.Config, [f"{key}={value}"]).config.data == read


@pytest.mark.parametrize("written", ["[{path: a, type: b}]", "{a: b}"])
def test_sources_written_as_elsewhere_are_refused_in_a_sentence(written: str, tmp_path: Path) -> None:
    (tmp_path / "a.yml").write_text(f"data: {written}\n")
    with pytest.raises(
        BadInput, match=r"every (item must be a string, as in \[|name needs a weight, as in \{)"
    ):
        config.resolve(llm.Config, file=tmp_path / "a.yml")
