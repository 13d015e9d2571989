"""The language recipe as test_equivalence.py runs it, and the same by plain transformers."""

from __future__ import annotations

import json
import random
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from stoker import Run, Training
from stoker.duration import Duration
from stoker.engine import blocks, memory, mesh, parallel
from stoker.engine.loss_scale import LossScale
from stoker.engine.step import Setting
from stoker.language import adapters, building
from stoker.language.lora import Lora
from stoker.recipes import llm
from stoker.run import view
from stoker.run.directory import RunDirectory
from stoker.world import World
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM

import families
from support import SOAK

ROW, BATCH, STEPS = 192, 4, 50 if SOAK else 20
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
"""With the marks by which transformers knows what the assistant says."""

Metrics = dict[str, dict[int, float]]
"""By name and step."""
Tokens = tuple[int, ...]
Document = tuple[Tokens, Tokens]
"""Its ids and its labels."""


def base(folder: Path) -> Path:
    """A small Llama whose tokenizer has that template."""
    from transformers import AutoTokenizer

    families.save(folder, "llama")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def adapter(folder: Path, model: Path, **more: Any) -> Path:
    """One that is new, by plain peft: what both begin with."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(5)
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    settings = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": "all-linear", **more}
    get_peft_model(plain, LoraConfig(**settings)).save_pretrained(folder, save_embedding_layers=False)
    return folder


def conversations(file: Path, count: int) -> Path:
    """Of one question or two, whose answers are of unequal length."""
    drawn = random.Random(11)
    words = ["forge", "coal", "iron", "spark", "anvil"]

    def turn() -> list[dict[str, str]]:
        said = " ".join(drawn.choices(words, k=drawn.randint(1, 9)))
        return [
            {"role": "user", "content": f"{drawn.choice(words)} {drawn.randrange(100)}?"},
            {"role": "assistant", "content": said},
        ]

    chats = [[m for _ in range(drawn.randint(1, 2)) for m in turn()] for _ in range(count)]
    file.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    return file


def config(model: Path, data: Path, **settings: Any) -> llm.Config:
    """The recipe's, with all that plain transformers is given too."""
    common: dict[str, Any] = {
        "model": str(model), "data": str(data), "precision": "fp32", "sequence_length": ROW,
        "batch_size": BATCH, "max_steps": Duration(STEPS, "step"), "warmup": 0.0, "weight_decay": 0.0,
        "lr": 1e-3, "generate_tokens": 1, "validation": 0.1, "test": 0.1,
        "eval_every": Duration(1000, "step"),
    }  # fmt: skip
    return llm.Config(**{**common, **settings})


def recipe(runs: Path, chosen: llm.Config, name: str) -> Metrics:
    """Every metric of a run of the recipe, on each rank."""
    warnings.simplefilter("ignore")
    with Run("test", name, runs=runs, config=chosen, seed=chosen.seed, accept_drift=True) as run:
        llm.train(run, chosen)
    return metrics(run.directory.path)


def metrics(run: Path) -> Metrics:
    points = view.load(RunDirectory(run)).points
    return {metric: dict(series.items()) for metric, series in points.items()}


def shares_of_7b(worlds: Sequence[int]) -> list[tuple[int, int, int]]:
    """Of the first and the last rank of worlds that are not there: bytes of its share of Llama 2 7B with
    adapters, what the formula says, and how many parameters are whole on it."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    warnings.simplefilter("ignore")
    cpu, training = torch.device("cpu"), Training(parallel="fsdp")
    found = []
    for world, rank in [(size, rank) for size in worlds for rank in (0, size - 1)]:
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
        with torch.device("meta"):
            bare = LlamaForCausalLM._from_config(LlamaConfig(), dtype=torch.bfloat16)
        nothing_else: Any = [None] * 7  # an adapter is put on the model alone
        model = adapters.adapted(building.Language(bare, *nothing_else), Lora(rank=16))
        blocks_of = blocks.find(model)
        formula = memory.needed(model, blocks_of, "fsdp", training, world)
        placed = mesh.build(World(rank=rank, size=world), cpu, training, "fsdp")
        setting = Setting(placed, lambda batch: batch, None, "bf16", LossScale(False), None)
        parallel.shard(model, blocks_of, training, setting)
        parameters = list(model.parameters())
        held = [p.to_local() if isinstance(p, DTensor) else p for p in parameters]
        whole = sum(h.numel() == p.numel() for h, p in zip(held, parameters, strict=True))
        found.append((sum(h.nbytes for h in held), formula.weights, whole))
        dist.destroy_process_group()
    return found


# -- the same by plain transformers -----------------------------------------------------------


def tokenised(model: Path, file: Path, *, answers_only: bool) -> dict[Tokens, Tokens]:
    """Ids -> labels of each conversation, as transformers' own template and mask have them."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    found = {}
    for line in file.read_text().splitlines():
        made = tokenizer.apply_chat_template(
            json.loads(line)["messages"], return_dict=True, return_assistant_tokens_mask=True
        )
        ids, said = made["input_ids"], made["assistant_masks"]
        labels = [i if is_said or not answers_only else -100 for i, is_said in zip(ids, said, strict=True)]
        found[tuple(ids)] = tuple(labels)
    return found


def pieces(batch: dict[str, torch.Tensor]) -> list[Tokens]:
    """The documents of a batch of ours, by their ids."""
    found = []
    for ids, lengths in zip(batch["input_ids"], batch["documents"].tolist(), strict=True):
        parts = ids[: sum(lengths)].split([n for n in lengths if n])
        found += [tuple(part.tolist()) for part in parts]
    return found


def padded(documents: Sequence[Document]) -> dict[str, torch.Tensor]:
    """A row a document: what transformers is called with."""
    longest = max(len(ids) for ids, _ in documents)

    def rows(of: Iterable[Sequence[int]], filler: int) -> torch.Tensor:
        return torch.tensor([[*row, *[filler] * (longest - len(row))] for row in of])

    return {
        "input_ids": rows((ids for ids, _ in documents), 0),
        "labels": rows((labels for _, labels in documents), -100),
        "attention_mask": rows(([1] * len(ids) for ids, _ in documents), 0),
    }


def hf_trainer(
    model: Any,
    steps: Sequence[Sequence[Document]],
    folder: Path,
    lr: float,
    optimizer: torch.optim.Optimizer | None = None,
    **settings: Any,
) -> list[float]:
    """The losses of transformers' Trainer, with schedule, clipping and, if none is given, optimizer."""
    from transformers import Trainer, TrainingArguments

    trainer = Trainer(
        model=model, train_dataset=[{"documents": step} for step in steps], optimizers=(optimizer, None),
        data_collator=lambda items: padded(items[0]["documents"]),
        args=TrainingArguments(**{
            "output_dir": str(folder), "max_steps": len(steps), "per_device_train_batch_size": 1,
            "learning_rate": lr, "lr_scheduler_type": "cosine_with_min_lr",
            "lr_scheduler_kwargs": {"min_lr_rate": 0.1}, "adam_beta2": 0.95, "weight_decay": 0.0,
            "max_grad_norm": 1.0, "train_sampling_strategy": "sequential", "logging_steps": 1,
            "remove_unused_columns": False, "report_to": [], "save_strategy": "no", "disable_tqdm": True,
            "use_cpu": True, "dataloader_pin_memory": False, **settings,
        }),
    )  # fmt: skip
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def perplexity(model: Any, documents: Iterable[Document]) -> float:
    """Of plain transformers, a document at a time: its own loss, weighed by the tokens that have one."""
    total, count = 0.0, 0
    with torch.no_grad():
        for ids, labels in documents:
            learnt = sum(label != -100 for label in labels[1:])
            given = model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels]))
            total, count = total + given.loss.item() * learnt, count + learnt
    return float(torch.tensor(total / count, dtype=torch.float64).exp())
