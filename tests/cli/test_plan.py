"""`stoker plan`: what a step takes of a GPU's memory, without a GPU, weights, or values."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from stoker import recipes
from stoker.cli.verbs import plan
from stoker.config import resolve
from stoker.engine import imagined
from stoker.run.directory import RunDirectory
from transformers import LlamaConfig

import families
from commands import Command
from support import SOAK

GIB = 2**30
MEASURED = Path(__file__).parents[2] / "bench/results/gpu-llm.json"

LIKE_THE_BENCHMARK = """
from dataclasses import dataclass

import stoker
import torch
from stoker.language import attention, objective
from transformers import LlamaConfig, LlamaForCausalLM


@dataclass(frozen=True, kw_only=True)
class Config(stoker.Training):
    lora: bool = False


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 80

    def __getitem__(self, index):
        ids = torch.zeros(2048, dtype=torch.long)
        return {"input_ids": ids, "labels": ids, "documents": torch.tensor([2048])}


def optimizer(config):
    if config.lora:
        return lambda ps: torch.optim.AdamW(ps, lr=1e-4, fused=True)
    return lambda ps: torch.optim.Adafactor(ps, lr=1e-4, foreach=False)


def train(run, config: Config):
    with torch.device("meta"):
        model = LlamaForCausalLM._from_config(LlamaConfig(), dtype=torch.bfloat16)
    if config.lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    (model.get_base_model() if config.lora else model).set_attn_implementation(attention.NAME)
    called = objective.attach(model)
    trainer = stoker.Trainer(
        run, model, optimizer=optimizer(config), inputs=called.inputs, loss=called.loss, training=config
    )
    for batch in trainer.steps(trainer.loader(Rows(), batch_size=4), max_steps=10):
        run.log(loss=trainer.step(batch))
"""

LOOP = """
import stoker
import torch
from torch import nn


class Samples(torch.utils.data.Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, index):
        return torch.zeros(8), index % 2


def loss(output, batch):
    return nn.functional.cross_entropy(output, batch[1], reduction="sum"), len(batch[1])


def train(run, config: stoker.Training):
    model = nn.Linear(8, 2)
    make = lambda ps: torch.optim.SGD(ps, lr=0.1)
    trainer = stoker.Trainer(run, model, optimizer=make, training=config, loss=loss)
    {before}
    for batch in trainer.steps(trainer.loader(Samples(), batch_size=8), max_steps=1):
        {within}
"""


def planned(recipe: str, *values: str, nproc: int = 1, memory: int = 80 * GIB) -> plan.Plan:
    found = recipes.load(recipe)
    return plan.Asked(found, resolve(found.config, values, None), nproc, 1, memory).plan()


@pytest.mark.soak(small=False)
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # of peft
@pytest.mark.parametrize(
    "row", [pytest.param(2, id="every-weight"), *([pytest.param(0, id="lora")] if SOAK else [])]
)
def test_7b_is_planned_as_a_gpu_has_measured_it(row: int, tmp_path: Path) -> None:
    """Beside the most that torch had allocated on an H200, by the results of bench/gpu_llm.py."""
    measured = json.loads(MEASURED.read_text())[row]
    assert measured["who"] == "ours"
    script = tmp_path / "like_the_benchmark.py"
    script.write_text(LIKE_THE_BENCHMARK)
    lora = "LoRA" in measured["kind"]
    found = planned(str(script), f"lora={lora}", "precision=bf16", "micro_batch=2", memory=141 * GIB)
    assert found.fits
    assert found.peak == pytest.approx(measured["peak"], rel=0.01)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What names a model of 667 million parameters without its weights, and data for it."""
    folder = tmp_path_factory.mktemp("llama")
    families.with_tokenizer(folder)
    LlamaConfig(num_hidden_layers=2, max_position_embeddings=4096).save_pretrained(folder)
    data = folder / "texts.jsonl"
    data.write_text("".join(json.dumps({"text": f"This is text {n}. " * 400}) + "\n" for n in range(200)))
    return [f"model={folder}", f"data={data}", "validation=0", "test=0", "sequence_length=2048"]


def test_sharded_weights_are_a_rank_s_part_of_them(stoker: Command, llama: list[str]) -> None:
    fsdp = "parallel=fsdp", "batch_size=8", "activation_checkpointing=full"
    done = stoker("plan", "llm", *llama, *fsdp, "--nproc", "8", "--memory", "8GB", "--json")
    found = done.answer
    weights = 666_914_816 * 4 / 8
    assert (done.code, found["fits"], found["ranks"], found["micro_batch"]) == (0, True, 8, 1)
    assert found["weights"] == pytest.approx(weights, rel=0.01)
    assert found["optimizer"] == pytest.approx(2 * weights, rel=0.01)
    block, ends = 202_383_360, 2 * 32_000 * 4096  # of which the embeddings stay until the backward pass
    assert found["gathered"] == pytest.approx(2 * (block + ends), rel=0.001)
    assert not Path("runs").exists()


def test_a_shipped_config_is_planned(stoker: Command, llama: list[str]) -> None:
    config = "--config", "llama-2-7b-full-fsdp", "--nproc", "8", "--memory", "8GB", "--json"
    done = stoker("plan", "llm", *llama, "kernels=liger", *config)
    assert (done.code, done.answer["parallel"], done.answer["ranks"]) == (0, "fsdp", 8)


@pytest.mark.soak(small=False)
def test_of_a_pipeline_the_stage_that_takes_the_most_is_said(stoker: Command, llama: list[str]) -> None:
    stages = "parallel=pipeline", "batch_size=8", "micro_batch=1", "--nproc", "2"
    found = stoker("plan", "llm", *llama, *stages, "--json").answer
    assert found["rank"] == 1, "which has the logits"
    assert found["weights"] == pytest.approx(666_914_816 * 4 / 2, rel=0.01)
    assert "the stage of rank 1 needs the most" in stoker("plan", "llm", *llama, *stages).out


@pytest.mark.soak(small=False)
def test_the_cheapest_change_that_makes_it_fit_is_said(stoker: Command, llama: list[str]) -> None:
    lora = "lora.rank=8", "batch_size=4", "precision=bf16"
    done = stoker("plan", "llm", *llama, *lora, "--memory", "3GB", "--json")
    assert (done.code, done.answer["fits"]) == (3, False)
    assert done.answer["peak"] > 3 * GIB
    assert done.answer["advice"]["changes"] == ["micro_batch=1"]
    assert done.answer["advice"]["peak"] <= 0.9 * 3 * GIB
    recomputed = stoker("plan", "llm", *llama, *lora, "--memory", "2500MB")
    assert recomputed.code == 3
    assert "it would with micro_batch=1 activation_checkpointing=full: " in recomputed.out
    every = stoker("plan", "llm", *llama, "batch_size=2", "--memory", "9GB")
    assert "it would with parallel=fsdp on 2 ranks: " in every.out
    assert "no change was found" in stoker("plan", "llm", *llama, "batch_size=1", "--memory", "9GB").out


@pytest.mark.soak(small=False)
def test_an_automatic_micro_batch_is_the_largest_that_fits(stoker: Command, llama: list[str]) -> None:
    lora = "lora.rank=8", "batch_size=8", "precision=bf16"
    done = stoker("plan", "llm", *llama, *lora, "micro_batch=auto", "--memory", "8GB", "--json")
    assert (done.code, done.answer["share"], done.answer["micro_batch"]) == (0, 8, 4)
    none = stoker("plan", "llm", *llama, *lora, "micro_batch=auto", "--memory", "2500MB", "--json")
    assert (none.code, none.answer["micro_batch"]) == (3, 1)
    assert none.answer["advice"]["changes"] == ["activation_checkpointing=full"]
    assert none.answer["advice"]["ranks"] == 1
    whole = stoker("plan", "llm", *llama, *lora, "--memory", "8GB", "--json")
    assert whole.answer["peak"] > 0.9 * 8 * GIB


def test_a_loop_of_one_s_own_is_planned_until_it_asks_for_values(stoker: Command, tmp_path: Path) -> None:
    plain = _script(tmp_path / "plain.py", within="run.log(loss=trainer.step(batch).item())")
    assert "it fits" in stoker("plan", str(plain)).out
    guarded = "made = trainer.step(batch)\n        assert not made.isnan() and not torch.isinf(made).any()"
    assert "it fits" in stoker("plan", str(_script(tmp_path / "guarded.py", within=guarded))).out
    pieces = "for part in trainer.micro(batch): trainer.backward(*loss(trainer.model(part[0]), part)); "
    pieces = pieces.rstrip("; ") + "\n        trainer.update()"
    assert "it fits" in stoker("plan", str(_script(tmp_path / "pieces.py", within=pieces))).out
    kept = tmp_path / "kept.pt"
    kept.write_bytes(b"of a real run")
    looks = (
        "made = trainer.step(batch); print(f'{made:.3f}', made.numpy(), torch.tensor([made, 2.0]))\n"
        f"        torch.save(trainer.model.state_dict(), {str(kept)!r})"
    )
    assert "it fits" in stoker("plan", str(_script(tmp_path / "looks.py", within=looks))).out
    assert kept.read_bytes() == b"of a real run"
    asks = _script(tmp_path / "asks.py", before="print(trainer.model(torch.zeros(1, 8)).sum().item())")
    done = stoker("plan", str(asks))
    assert done.code == 2
    assert "asks.py:23: print(trainer.model(torch.zeros(1, 8)).sum().item()) needs some" in done.err
    none = _script(tmp_path / "none.py", before="return")
    assert "ended before its second step" in stoker("plan", str(none)).err


def test_weights_that_are_tied_are_planned_once(stoker: Command, tmp_path: Path) -> None:
    lines = (json.dumps({"text": f"This is text {n}. " * 4}) for n in range(200))  # enough for 300 tokens
    (tmp_path / "texts.jsonl").write_text("\n".join(lines))

    def weights(tied: bool) -> int:
        new = "model=tiny", "vocab_size=300", f"tie_embeddings={str(tied).lower()}"
        return int(stoker("plan", "llm", "data=texts.jsonl", *new, "--json").answer["weights"])

    assert weights(tied=False) - weights(tied=True) == 300 * 128 * 4  # the matrix of the output layer


def test_a_run_of_the_same_config_knows_what_was_planned(stoker: Command, tmp_path: Path) -> None:
    script = str(_script(tmp_path / "planned_first.py"))
    plan = stoker("plan", script, "precision=fp32", "--json").answer
    assert stoker("train", script, "precision=fp32", "--name", "same").code == 0
    assert stoker("train", script, "precision=bf16", "--name", "another").code == 0
    same, another = (RunDirectory(tmp_path / "runs" / "planned_first" / name) for name in ("same", "another"))
    assert imagined.remembered(same, 1) == plan["peak"]
    assert imagined.remembered(same, 2) is None
    assert imagined.remembered(another, 1) is None


def _script(file: Path, before: str = "", within: str = "run.log(loss=trainer.step(batch))") -> Path:
    file.write_text(LOOP.format(before=before, within=within))
    return file


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["text", "--memory", "lots"], "--memory lots: give the memory of a GPU, such as 80GB or 24GB"),
        (["text", "--memory", "0GB"], "--memory 0GB: give the memory of a GPU"),
        (["text", "parallel=deepspeed"], "parallel=fsdp, which shards what ZeRO 3 does"),
        (["text", "batch_size=7", "--nproc", "2"], "the nearest size that can is 6 or 8"),
        (["text", "batch=7"], "did you mean"),
        (["txet"], "did you mean 'text'"),
    ],
)
def test_bad_input_is_answered_in_a_sentence(stoker: Command, given: list[str], said: str) -> None:
    done = stoker("plan", *given)
    assert done.code == 2
    assert said in done.err
    assert "Traceback" not in done.err
