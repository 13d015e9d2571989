"""`stoker train llm` against plain transformers and peft, on the same data: loss curves and perplexities."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import equivalence_run
import pytest
import torch
from equivalence_run import BATCH, ROW, STEPS, Document, Metrics, Tokens
from stoker.checkpoint import manifest, store
from stoker.data import sources, tokens
from stoker.data.loader import Loader
from stoker.duration import Duration
from stoker.engine.settings import DeepSpeed
from stoker.language import building, data
from stoker.language.data import Rows
from stoker.language.lora import Lora
from stoker.recipes import llm
from stoker.world import World
from transformers import AutoModelForCausalLM

import ranks
from support import SOAK

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers' Trainer, and of peft


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return equivalence_run.base(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return equivalence_run.conversations(tmp_path_factory.mktemp("data") / "chats.jsonl", 150)


@pytest.fixture(scope="module")
def adapter(base: Path) -> Path:
    return equivalence_run.adapter(base.parent / "adapter", base)


@pytest.fixture
def adapted(adapter: Path, base: Path, chats: Path) -> Metrics:
    """What a run with that adapter measured, once for this module."""
    runs = adapter.parent / "runs"
    if not runs.exists():
        return equivalence_run.recipe(runs, of_adapter(adapter, base, chats), "adapted")
    return equivalence_run.metrics(runs / "test" / "adapted")


def of_adapter(adapter: Path, base: Path, chats: Path) -> llm.Config:
    return equivalence_run.config(base, chats, lora=Lora(adapter=str(adapter)))


def plain(base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


def rows_of(config: llm.Config) -> Rows:
    """The rows that the recipe trains on and measures."""
    found = sources.read_all(
        config.data, validation=config.validation, test=config.test, validation_data=config.validation_data,
        test_data=config.test_data,
    )  # fmt: skip
    language = building.build(config.model, tokenizer=None, vocab_size=300, sequence_length=ROW, documents=[])
    return data.pack(
        found, language.tokenizer, sequence_length=ROW, loss_on=config.loss_on, packing=config.packing
    )


def documents_of(batch: dict[str, torch.Tensor], known: dict[Tokens, Tokens]) -> list[Document]:
    """The documents of a batch of ours, with transformers' labels of them."""
    return [(ids, known[ids]) for ids in equivalence_run.pieces(batch)]


def documents_of_steps(config: llm.Config, known: dict[Tokens, Tokens]) -> list[list[Document]]:
    rows = rows_of(config).train
    loader = Loader(rows, batch_size=BATCH, world=World(), seed=config.seed, collate=tokens.collate)
    batches = itertools.islice(loader.batches(0), STEPS)
    return [documents_of(batch, known) for batch in batches]


@pytest.mark.soak
def test_lora_on_packed_answers_has_the_curve_of_transformers_and_peft(
    adapted: Metrics, adapter: Path, base: Path, chats: Path, tmp_path: Path
) -> None:
    """Theirs has a padded row a document, ours shares rows: the same tokens make a step, in one order."""
    from peft import PeftModel

    config = of_adapter(adapter, base, chats)
    found = adapted["loss"]
    known = equivalence_run.tokenised(base, chats, answers_only=True)
    steps = documents_of_steps(config, known)
    assert max(len(step) for step in steps) > BATCH  # rows hold several
    theirs = PeftModel.from_pretrained(plain(base), adapter, is_trainable=True)
    expected = equivalence_run.hf_trainer(theirs, steps, tmp_path / "hf", config.lr or 0.0)
    assert list(found) == list(range(1, STEPS + 1))
    assert list(found.values()) == pytest.approx(expected, abs=1e-5)
    assert expected[-1] < expected[0] - 0.5


EVERYWHERE = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "embed_tokens"]
PLUS: dict[str, Any] = {"max_steps": Duration(8, "step"), "validation": 0.0, "test": 0.0, "eval_every": None}


def plus(kind: str, base: Path, chats: Path, **settings: Any) -> llm.Config:
    """With LoRA+, going on from an adapter of peft's on every layer, the embedding too."""
    folder = base.parent / f"{kind}-everywhere"
    if not folder.exists():
        equivalence_run.adapter(folder, base, target_modules=EVERYWHERE, use_dora=kind == "dora")
    lora = Lora(adapter=str(folder), lr_ratio=16.0)
    return equivalence_run.config(base, chats, **{"lora": lora, "lr": 2e-4, **PLUS, **settings})


@pytest.mark.soak
@pytest.mark.parametrize(("kind", "decay"), [("lora", 0.1), ("dora", 0.0)] if SOAK else [("lora", 0.1)])
def test_lora_plus_has_the_curve_of_peft_s_optimizer(
    kind: str, decay: float, base: Path, chats: Path, tmp_path: Path
) -> None:
    """peft decays the magnitudes of DoRA, ours never what has one dimension."""
    from peft import PeftModel
    from peft.optimizers import create_loraplus_optimizer

    config = plus(kind, base, chats, weight_decay=decay)
    found = equivalence_run.recipe(tmp_path, config, kind)
    steps = documents_of_steps(config, equivalence_run.tokenised(base, chats, answers_only=True))[:8]
    theirs = PeftModel.from_pretrained(plain(base), config.lora.adapter, is_trainable=True)
    lr, ratio = config.lr or 0.0, config.lora.lr_ratio
    optimizer = create_loraplus_optimizer(
        theirs, torch.optim.AdamW, lr=lr, loraplus_lr_ratio=ratio, loraplus_lr_embedding=lr,
        loraplus_weight_decay=decay, betas=config.betas,
    )  # fmt: skip
    expected = equivalence_run.hf_trainer(theirs, steps, tmp_path / "hf", lr, optimizer)
    assert list(found["loss"].values()) == pytest.approx(expected, abs=1e-5)
    assert found["lr"][1] == lr
    without = plus(kind, base, chats, weight_decay=decay, lora=Lora(adapter=config.lora.adapter))
    slower = equivalence_run.recipe(tmp_path, without, "slower")["loss"]
    assert slower[8] > found["loss"][8] + 0.01


BY_RANKS: dict[str, dict[str, Any]] = {
    "single": {},
    "ddp": {"parallel": "ddp"},
    "fsdp": {"parallel": "fsdp", "micro_batch": 1},
    "pipeline": {"parallel": "pipeline", "micro_batch": 1},
    "zero-2": {"parallel": "deepspeed", "deepspeed": DeepSpeed(stage=2)},
    "zero-3": {"parallel": "deepspeed", "deepspeed": DeepSpeed(stage=3)},
}


@pytest.mark.soak(small=False)
@pytest.mark.parametrize("name", BY_RANKS if SOAK else ["fsdp"])
def test_lora_plus_has_one_curve_under_every_strategy_and_goes_on_in_one_process(
    name: str, base: Path, chats: Path, tmp_path: Path
) -> None:
    """Half the steps by ranks, the others by one process: the same curve as by one process without a stop."""
    config = plus("dora", base, chats, weight_decay=0.1, schedule="constant")
    runs = base.parent / "plus"
    if not runs.exists():
        equivalence_run.recipe(runs, config, "alone")
    expected = equivalence_run.metrics(runs / "test" / "alone")
    half = dataclasses.replace(config, max_steps=Duration(4, "step"), **BY_RANKS[name])
    if name == "single":
        equivalence_run.recipe(tmp_path, half, name)
    else:
        ranks.run(equivalence_run.recipe, 2, tmp_path, tmp_path, half, name)
    found = equivalence_run.recipe(tmp_path, config, name)
    assert list(found["loss"].values()) == pytest.approx(list(expected["loss"].values()), abs=1e-5)
    assert found["lr"] == expected["lr"]
    if name == "single":
        assert found["loss"] == expected["loss"]


@pytest.mark.soak
@pytest.mark.parametrize("decay", [0.0, 0.1] if SOAK else [0.1])
def test_another_ratio_is_used_from_where_the_run_goes_on(
    decay: float, base: Path, chats: Path, tmp_path: Path
) -> None:
    """From none to one, to another, to none."""
    config = plus("dora", base, chats, schedule="constant", weight_decay=decay)
    rates = []
    for steps, ratio in ((2, 1.0), (4, 8.0), (6, 16.0), (8, 1.0)):
        lora = dataclasses.replace(config.lora, lr_ratio=ratio)
        again = dataclasses.replace(config, lora=lora, max_steps=Duration(steps, "step"))
        equivalence_run.recipe(tmp_path, again, "again")
        newest = manifest.committed(tmp_path / "test" / "again" / "checkpoints")[-1]
        values = store.load_values(manifest.read(newest))
        groups = values["optimizers"]["main"]["groups"]
        rates.append({group["lr"] for group in groups if group["params"]})
    assert rates == [{2e-4}, {2e-4, 2e-4 * 8}, {2e-4, 2e-4 * 16}, {2e-4}]


@pytest.mark.soak
def test_every_weight_on_every_token_has_the_curve_of_transformers(
    base: Path, chats: Path, tmp_path: Path
) -> None:
    config = equivalence_run.config(base, chats, packing=False, loss_on="all")
    found = equivalence_run.recipe(tmp_path, config, "full")["loss"]
    steps = documents_of_steps(config, equivalence_run.tokenised(base, chats, answers_only=False))
    expected = equivalence_run.hf_trainer(plain(base), steps, tmp_path / "hf", config.lr or 0.0)
    assert list(found.values()) == pytest.approx(expected, abs=1e-5)
    assert expected[-1] < expected[0] - 0.5


@pytest.mark.soak
def test_decay_betas_eps_and_a_warm_up_in_steps_are_those_of_transformers(
    base: Path, chats: Path, tmp_path: Path
) -> None:
    """Of its schedules the one whose warm-up, as ours, does not begin at 0; the peak stays."""
    config = equivalence_run.config(
        base, chats, packing=False, loss_on="all", weight_decay=0.1, betas=(0.9, 0.95), eps=1e-6, warmup=10,
        schedule="constant",
    )  # fmt: skip
    found = equivalence_run.recipe(tmp_path, config, "settings")
    steps = documents_of_steps(config, equivalence_run.tokenised(base, chats, answers_only=False))
    expected = equivalence_run.hf_trainer(
        plain(base), steps, tmp_path / "hf", config.lr or 0.0, weight_decay=0.1, adam_beta1=0.9,
        adam_beta2=0.95, adam_epsilon=1e-6, warmup_steps=11, lr_scheduler_type="cosine_warmup_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 1.0},
    )  # fmt: skip
    assert list(found["lr"].values())[:2] == pytest.approx([1e-3 / 11, 2e-3 / 11])
    assert list(found["loss"].values()) == pytest.approx(expected, abs=1e-4)
    everywhere = equivalence_run.recipe(tmp_path, dataclasses.replace(config, decay_all=True), "everywhere")
    assert list(everywhere["loss"].values()) != pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("size", [1, 2])
def test_perplexity_is_that_of_plain_transformers(
    size: int, adapted: Metrics, base: Path, chats: Path, tmp_path: Path
) -> None:
    """Over rows that two ranks cannot share evenly: one of them has nothing to do in the last batch."""
    config = equivalence_run.config(base, chats, max_steps=Duration(1, "step"), lora=Lora(rank=2))
    rows = rows_of(config)
    parts = {"base_test_perplexity": rows.test["chats"], "val_perplexity": rows.validation["chats"]}
    assert any(len(part) % BATCH in (1, 2) for part in parts.values())
    found = adapted
    if size > 1:
        found, _ = ranks.run(equivalence_run.recipe, size, tmp_path, tmp_path, config, "ranks")
    known = equivalence_run.tokenised(base, chats, answers_only=True)
    for metric, part in parts.items():  # before the first step
        held_out = [document for row in part for document in documents_of(tokens.collate([row]), known)]
        expected = equivalence_run.perplexity(plain(base).eval(), held_out)
        assert found[metric][0] == pytest.approx(expected, rel=1e-4)


def test_perplexity_on_data_of_one_s_own_is_that_of_plain_transformers(base: Path, tmp_path: Path) -> None:
    lines = equivalence_run.conversations(tmp_path / "all.jsonl", 90).read_text().splitlines(keepends=True)
    files = {"data": lines[:60], "validation_data": lines[60:77], "test_data": lines[77:]}
    for name, part in files.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(part))
    own = {name: str(tmp_path / f"{name}.jsonl") for name in files}
    config = equivalence_run.config(
        base, Path(own.pop("data")), max_steps=Duration(1, "step"), lora=Lora(rank=2), **own,
        validation=llm.Config.validation, test=llm.Config.test,
    )  # fmt: skip
    found = equivalence_run.recipe(tmp_path, config, "own")
    for metric, file in (("val_perplexity", "validation_data"), ("base_test_perplexity", "test_data")):
        known = equivalence_run.tokenised(base, tmp_path / f"{file}.jsonl", answers_only=True)
        assert len(known) == len(files[file])
        expected = equivalence_run.perplexity(plain(base).eval(), known.items())
        assert found[metric][0] == pytest.approx(expected, rel=1e-4)
    trained = [ids for row in rows_of(config).train for ids in equivalence_run.pieces(tokens.collate([row]))]
    known = equivalence_run.tokenised(base, tmp_path / "data.jsonl", answers_only=True)
    assert sorted(trained) == sorted(known), "all of data, and nothing else"


@pytest.mark.soak(small=False)
def test_adapters_on_7b_are_sharded_whole_with_what_they_are_on(tmp_path: Path) -> None:
    (found,) = ranks.run(equivalence_run.shares_of_7b, 1, tmp_path, (4, 8))
    for share, formula, whole in found:
        assert whole == 0, "some parameter is on every rank"
        assert share <= formula * 1.05
