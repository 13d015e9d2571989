"""What the ranks of test_loading.py do: build a model on the meta device, lay it out, have it filled."""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any, Literal

import torch
from stoker import Run, Trainer, Training
from stoker.duration import Duration
from stoker.engine import memory
from stoker.engine.precision import DTYPES
from stoker.engine.random_state import seed_everything
from stoker.engine.settings import DeepSpeed, Fsdp, Pipeline
from stoker.language import adapters, building, loading, objective, quantised, targets
from stoker.language.loading import bare_name
from stoker.language.lora import Lora
from stoker.world import World
from torch.distributed.tensor import DTensor

STRATEGIES: dict[str, dict[str, Any]] = {
    "single": {"parallel": "single"},
    "ddp": {"parallel": "ddp"},
    "fsdp": {"parallel": "fsdp"},
    "hybrid": {"parallel": "fsdp", "fsdp": Fsdp(shard=2)},
    "pipeline": {"parallel": "pipeline", "pipeline": Pipeline(schedule="gpipe")},
    "zero2": {"parallel": "deepspeed", "deepspeed": DeepSpeed(stage=2)},
    "zero3": {"parallel": "deepspeed", "deepspeed": DeepSpeed(stage=3)},
}
ZERO3_AT_ONCE = json.dumps({
    "zero_optimization": {
        "stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 0,
        "stage3_max_reuse_distance": 0,
    }
})  # fmt: skip
"""Parameters are let go of as soon as a layer is done: by default ones as small as these never are."""
KINDS = {
    "full": Lora(),
    "lora": Lora(rank=4, alpha=8.0, dropout=0.0),
    "rslora": Lora(rank=4, alpha=8.0, dropout=0.0, rslora=True, targets="q_proj, v_proj"),
    "dora": Lora(rank=4, alpha=8.0, dropout=0.0, dora=True),
    "qlora": Lora(rank=4, alpha=8.0, dropout=0.0),
}
"""By name: what is trained. Of `qlora` the base is kept in 4 bits."""


def built(
    folder: Path, kind: str, lora: Lora | None = None, dtype: torch.dtype = torch.float32, **how: Any
) -> tuple[Any, building.Language]:
    language = building.build(
        str(folder), tokenizer=None, vocab_size=300, sequence_length=24, documents=[], dtype=dtype, **how
    )
    seed_everything(0)
    targets.freeze_what_no_text_goes_through(language.model)
    if kind == "qlora":
        quantised.convert(language.model, World.current())
    for name, p in language.model.named_parameters():
        p.requires_grad_(p.requires_grad and (kind != "head" or "lm_head" in name))
    model = adapters.adapted(language, lora or KINDS.get(kind, Lora()))
    return model, dataclasses.replace(language, load=adapters.loading(language.load))


def trainer(
    run: Run,
    folder: Path,
    strategy: str,
    kind: str,
    lr: float = 1e-3,
    lora: Lora | None = None,
    precision: Literal["fp32", "bf16"] = "fp32",
) -> tuple[Any, Trainer]:
    model, language = built(folder, kind, lora, DTYPES["fp32" if kind == "head" else precision])
    called = objective.attach(model)
    settings = dict(STRATEGIES[strategy])
    if strategy == "zero3":
        file = run.directory.path.parent / "zero3.json"
        file.write_text(ZERO3_AT_ONCE)
        settings["deepspeed"] = DeepSpeed(stage=3, config=file)
    training = Training(
        precision=precision, checkpoint_every=Duration(1000, "step"), micro_batch=1, **settings
    )
    return model, Trainer(
        run, model, optimizer=lambda p: torch.optim.AdamW(p, lr=lr), inputs=called.inputs, loss=called.loss,
        training=training, load=language.load,
    )  # fmt: skip


def fill(
    folder: Path, runs: Path, strategy: str, kind: str
) -> tuple[dict[str, torch.Tensor], int, list[int]]:
    """The weights by the bare model's names (on rank 0), the bytes a rank holds, and those of each read."""
    warnings.simplefilter("ignore")
    reads = watched_reads()
    with Run("test", f"{strategy}-{kind}", runs=runs) as run:
        _, made = trainer(run, folder, strategy, kind)
        held = memory.held([*made.model.parameters(), *made.model.buffers()])
        whole = made.state_dict()
    return {bare_name(name): tensor for name, tensor in whole.items() if "lora_" not in name}, held, reads


def train_the_head(folder: Path, runs: Path, strategy: str) -> tuple[dict[str, torch.Tensor], torch.dtype]:
    """The weights after a step in bf16 in which only the head was trained, and what a layer computes in."""
    import families

    warnings.simplefilter("ignore")
    rows = [{name: tensor[0] for name, tensor in families.documents().items()} for _ in range(4)]
    seen = []
    with Run("test", f"{strategy}-head", runs=runs) as run:
        _, made = trainer(run, folder, strategy, "head", precision="bf16")
        layer = made.model.model.layers[0].mlp.up_proj
        layer.register_forward_hook(lambda module, given, output: seen.append(output.dtype))
        for batch in made.steps(made.loader(rows, batch_size=4), max_steps=1):
            made.step(batch)
        return made.state_dict(), seen[0]


def watched_reads() -> list[int]:
    """The size of each tensor that is put into the model from now on, in bytes, as this rank has it."""
    sizes: list[int] = []
    put = loading._put

    def seen(slot: Any, value: torch.Tensor, device: torch.device) -> None:
        local = value.to_local() if isinstance(value, DTensor) else value
        sizes.append(local.nbytes)
        put(slot, value, device)

    loading._put = seen
    return sizes


def train(
    folder: Path, runs: Path, strategy: str, kind: str, steps: int = 4, **how: Any
) -> tuple[list[float], Any]:
    """The losses of some steps on rows of packed documents, and the trained weights, on rank 0."""
    import families

    warnings.simplefilter("ignore")
    batch = families.documents()
    rows = [{name: tensor[i % 2] for name, tensor in batch.items()} for i in range(16)]
    with Run("test", f"{strategy}-{kind}-train", runs=runs) as run:
        model, made = trainer(run, folder, strategy, kind, **how)
        losses = []
        loader = made.loader(rows, batch_size=4)
        for part in made.steps(loader, max_steps=steps):
            losses.append(made.step(part).item())
        losses.append(made.evaluate(rows, batch_size=4))
        trained = made.state_dict(lambda name: "lora_" in name or kind == "full")
        if made.world.rank == 0 and kind != "full":
            model.save_pretrained(runs / f"adapter-{strategy}", state_dict=trained)
    return losses, trained
