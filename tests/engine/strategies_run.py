"""What the ranks of tests/engine/test_strategies.py do: train a tiny model for some steps."""

from __future__ import annotations

import functools
import itertools
import json
import os
import signal
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from stoker import Run, Trainer, Training
from stoker.duration import Duration
from stoker.engine import memory as measured
from stoker.engine import optimizers
from stoker.engine.metrics import Max, Mean, Metric, Perplexity, Sum
from stoker.engine.random_state import seed_everything
from stoker.engine.settings import Ddp, DeepSpeed, Ema, Fsdp, Pipeline
from stoker.errors import BadInput, StokerError
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset
from transformers import LlamaConfig, LlamaForCausalLM, ResNetConfig, ResNetForImageClassification

from support import SOAK

STEPS = 20 if SOAK else 12
"""More than an epoch, which has 8."""

LAYERS = 4 if SOAK else 2

VOCABULARY = 64


class Rows(Dataset[Any]):
    """Rows of tokens of which only some count, a different number in each."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        made = torch.Generator().manual_seed(index)
        ids = torch.randint(0, VOCABULARY, (16,), generator=made)
        labels = ids.clone()
        labels[int(torch.randint(4, 16, (), generator=made)) :] = -100
        return {"input_ids": ids, "position_ids": torch.arange(16), "labels": labels}


class Images(Dataset[Any]):
    """Images whose class shows in their mean."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        made = torch.Generator().manual_seed(index)
        return torch.randn(3, 16, 16, generator=made) + index % 4, index % 4


def llama(tied: bool = False, dropout: float = 0.0, layers: int = 4, **more: Any) -> nn.Module:
    seed_everything(0)
    sizes = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": layers,
        "num_attention_heads": 4, "num_key_value_heads": 2,
    }  # fmt: skip
    given = {**sizes, "tie_word_embeddings": tied, "attention_dropout": dropout, **more}
    return LlamaForCausalLM(LlamaConfig(**given))


def resnet() -> nn.Module:
    seed_everything(0)
    return ResNetForImageClassification(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=4)
    )


def inputs(batch: dict[str, torch.Tensor]) -> dict[str, Any]:
    return {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"], "use_cache": False}


def token_loss(output: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    logits, labels = output.logits[:, :-1].float(), batch["labels"][:, 1:]
    total = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
    return total, (labels != -100).sum()


def image_loss(output: Any, batch: Any) -> tuple[torch.Tensor, int]:
    return F.cross_entropy(output.logits.float(), batch[1], reduction="sum"), len(batch[1])


def train(
    folder: Path,
    name: str,
    kind: str,
    settings: dict[str, Any],
    *,
    steps: int = STEPS,
    batch_size: int = 8,
    lr: float = 1e-3,
    dropout: float = 0.0,
    layers: int = LAYERS,
    die_at: int | None = None,
    evaluate_at: int | None = None,
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The losses of some steps on this rank, and the weights after them on rank 0.

    `die_at`: every rank kills itself in the middle of that step. `evaluate_at`: the loss over some rows
    after that step is one of the losses too.
    """
    warnings.simplefilter("ignore")
    language = kind == "llama"
    with Run("test", name, runs=folder) as run:
        trainer = Trainer(
            run,
            llama(dropout=dropout, layers=layers) if language else resnet(),
            optimizer=lambda p: torch.optim.AdamW(p, lr=lr, weight_decay=0.1, fused=True),
            inputs=inputs if language else lambda batch: {"pixel_values": batch[0]},
            loss=token_loss if language else image_loss,
            training=Training(**{"precision": "fp32", "clip_norm": 0.5, **built(settings)}),
        )
        loader = trainer.loader(Rows() if language else Images(), batch_size=batch_size)
        losses = []
        for batch in trainer.steps(loader, max_steps=steps):
            if run.step == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            loss = trainer.step(batch)
            run.log(loss=loss, **trainer.step_metrics())
            losses.append(loss.item())
            if run.step == evaluate_at:
                losses.append(trainer.evaluate(torch.utils.data.Subset(Rows(), range(8)), batch_size=4))
        weights = {n: t for n, t in trainer.state_dict().items() if "running" not in n and "tracked" not in n}
    return losses, weights


Tested = tuple[dict[str, torch.Tensor], float]
"""The weights on rank 0, and their loss over some rows."""


def best(folder: Path, name: str, settings: dict[str, Any]) -> tuple[Tested, int, Tested]:
    """What a step with the best metric came to, and after the loop which step was loaded, and what it has."""
    warnings.simplefilter("ignore")
    some = torch.utils.data.Subset(Rows(), range(8))
    with Run("test", name, runs=folder) as run:
        trainer = Trainer(
            run, llama(), optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2), inputs=inputs, loss=token_loss,
            training=Training(**{"precision": "fp32", "checkpoint_best": True, **built(settings)}),
        )  # fmt: skip
        for batch in trainer.steps(trainer.loader(Rows(), batch_size=8), max_steps=4):
            run.log(loss=trainer.step(batch))
            if run.step == 2:
                measured = trainer.state_dict(), trainer.evaluate(some, batch_size=4)
                run.log(val_loss=measured[1])
            if run.step == 3:
                run.log(val_loss=measured[1] + 1)
        step = trainer.load_best()
        return measured, step, (trainer.state_dict(), trainer.evaluate(some, batch_size=4))


def decaying(
    folder: Path,
    name: str,
    settings: dict[str, Any],
    *,
    weight_decay: float,
    steps: int,
    frozen: bool = False,
) -> dict[str, torch.Tensor]:
    """The weights after some steps of a recipe's AdamW, on rank 0; a run that is there goes on.

    `frozen`: what has one dimension is not trained, as where there are adapters.
    """
    warnings.simplefilter("ignore")
    model = llama(layers=LAYERS)
    for p in model.parameters():
        p.requires_grad_(p.dim() > 1 or not frozen)
    with Run("test", name, runs=folder) as run:
        trainer = Trainer(
            run, model, optimizer=optimizers.factory("adamw", lr=0.1, weight_decay=weight_decay),
            inputs=inputs, loss=token_loss, training=Training(**{"precision": "fp32", **built(settings)}),
        )  # fmt: skip
        for batch in trainer.steps(trainer.loader(Rows(), batch_size=8), max_steps=steps):
            run.log(loss=trainer.step(batch))
        return trainer.state_dict()


def by_name(
    folder: Path, name: str, settings: dict[str, Any], optimizer: Any, steps: int
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses up to a step with a recipe's optimizer, and the weights on rank 0; a run may go on."""
    warnings.simplefilter("ignore")
    lr = 0.1 if optimizer == "sgd" else 0.01
    with Run("test", name, runs=folder) as run:
        trainer = Trainer(
            run, llama(layers=LAYERS), optimizer=optimizers.factory(optimizer, lr=lr, weight_decay=0.1),
            inputs=inputs, loss=token_loss, training=Training(**{"precision": "fp32", **built(settings)}),
        )  # fmt: skip
        losses = []
        for batch in trainer.steps(trainer.loader(Rows(), batch_size=8), max_steps=steps):
            losses.append(trainer.step(batch).item())
            run.log(loss=losses[-1])
        return losses, trainer.state_dict()


class Averaging(torch.optim.SGD):
    """Counts its steps in numbers that are not tensors, and takes ever smaller ones."""

    def step(self, closure: Any = None) -> None:
        super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["count"] = self.state[p].get("count", 0) + 1
                p.data.add_(p.data, alpha=-0.01 / self.state[p]["count"])


def with_a_group_of_one(
    make: Any, most: dict[str, Any], last: dict[str, Any], groups: list[dict[str, Any]], lr: float
) -> torch.optim.Optimizer:
    """An optimizer whose last group, one number that only one rank has, keeps other state than the first."""
    *others, bias = itertools.chain.from_iterable(group["params"] for group in groups)
    return make([{"params": others, **most}, {"params": [bias], **last}], lr=lr)  # type: ignore[no-any-return]


OPTIMIZERS: dict[str, Any] = {
    **{
        name: getattr(torch.optim, name)
        for name in (
            "Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop", "Rprop",
        )
    },
    "SGD": functools.partial(torch.optim.SGD, momentum=0.9),
    "Averaging": Averaging,
    **{
        name: functools.partial(with_a_group_of_one, make, most, last)
        for name, make, most, last in (
            ("SGD-last", torch.optim.SGD, {}, {"momentum": 0.9}),
            ("SGD-first", torch.optim.SGD, {"momentum": 0.9}, {}),
            ("AdamW-last", torch.optim.AdamW, {}, {"amsgrad": True}),
        )
    },
}  # fmt: skip
"""Those that DeepSpeed can use, which flattens all weights."""


def with_optimizers(folder: Path, settings: dict[str, Any], steps: int) -> dict[str, list[float]]:
    """The losses of a tiny model up to a step with each optimizer; runs that are there go on.

    The optimizer has two groups, of which one has a smaller rate.
    """
    warnings.simplefilter("ignore")
    x = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
    found = {}
    for name, make in OPTIMIZERS.items():
        if name == "Rprop" and settings.get("parallel") == "fsdp":
            continue  # torch's does not support sharded parameters
        seed_everything(0)
        with Run("test", name, runs=folder) as run:
            trainer = Trainer(
                run, nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)),
                optimizer=lambda ps, make=make: make(
                    [{"params": ps[:1], "lr": 0.01}, {"params": ps[1:]}], lr=0.05
                ),
                loss=lambda out, b: ((out - b[0].sum(1, keepdim=True)).square().sum(), len(out)),
                inputs=lambda b: (b[0],), training=Training(**{"precision": "fp32", **built(settings)}),
            )  # fmt: skip
            losses = []
            for batch in trainer.steps(trainer.loader(TensorDataset(x), batch_size=8), max_steps=steps):
                losses.append(trainer.step(batch).item())
                run.log(loss=losses[-1])
            found[name] = losses
    return found


class Late(nn.Module):
    """Its first weight is not used until `late` says so."""

    def __init__(self) -> None:
        super().__init__()
        self.extra, self.first, self.last = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 1)
        self.late = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.first(x) + self.extra(x) if self.late else self.first(x)
        return self.last(hidden.tanh())  # type: ignore[no-any-return]


def with_a_late_weight(folder: Path) -> list[dict[str, torch.Tensor]]:
    """The weights but for a late one, a step after that one's first, in one process and with ZeRO."""
    warnings.simplefilter("ignore")
    x = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))

    def trained(name: str, steps: int, late: bool, **settings: Any) -> dict[str, torch.Tensor]:
        seed_everything(0)
        with Run("test", name, runs=folder) as run:
            model = Late()
            model.late = late
            trainer = Trainer(
                run, model, optimizer=lambda ps: torch.optim.NAdam(ps, lr=0.01),
                loss=lambda out, b: ((out - b[0].sum(1, keepdim=True)).square().sum(), len(out)),
                inputs=lambda b: (b[0],), training=Training(precision="fp32", **built(settings)),
            )  # fmt: skip
            for batch in trainer.steps(trainer.loader(TensorDataset(x), batch_size=8), max_steps=steps):
                trainer.step(batch)
            return {n: t.clone() for n, t in trainer.state_dict().items() if "extra" not in n}

    zero: dict[str, Any] = {"parallel": "deepspeed", "deepspeed": {"stage": 1}}
    found = []
    for name, settings in (("alone", {}), ("zero", zero)):
        trained(name, 30, False)
        trained(name, 31, True)
        found.append(trained(name, 32, True, **settings))
    return found


def built(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings with their groups as dataclasses, and durations."""
    groups = {"ddp": Ddp, "fsdp": Fsdp, "pipeline": Pipeline,
              "deepspeed": DeepSpeed, "ema": Ema}  # fmt: skip
    made = {k: groups[k](**v) if k in groups else v for k, v in settings.items()}
    return {k: Duration.parse(v) if k == "checkpoint_every" else v for k, v in made.items()}


def gradient(folder: Path, name: str, settings: dict[str, Any]) -> dict[str, torch.Tensor]:
    """What one step of plain SGD with a rate of 1 takes from the weights, on rank 0: the gradient."""
    warnings.simplefilter("ignore")
    before = {n: p.detach().clone() for n, p in llama(layers=LAYERS).named_parameters()}
    with Run("test", name, runs=folder) as run:
        trainer = Trainer(
            run, llama(layers=LAYERS), optimizer=lambda p: torch.optim.SGD(p, lr=1.0), inputs=inputs,
            loss=token_loss, training=Training(**{"precision": "fp32", **built(settings)}),
        )  # fmt: skip
        for batch in trainer.steps(trainer.loader(Rows(), batch_size=8, shuffle=False), max_steps=1):
            trainer.step(batch)
        after = trainer.state_dict()
    return {name: before[name] - tensor for name, tensor in after.items()}


def gradients_of_parts(folder: Path, sizes: Sequence[int]) -> dict[int, dict[str, torch.Tensor]]:
    """That of the same batch, cut into micro-batches of each size."""
    return {size: gradient(folder, f"by-{size}", {"clip_norm": None, "micro_batch": size}) for size in sizes}


def in_half_precision(
    folder: Path, name: str, settings: dict[str, Any], *, normalised: bool
) -> tuple[list[float], set[torch.dtype]]:
    """The losses of three steps in bf16, and the dtypes of the sums that the loss returns.

    `normalised`: the model has a BatchNorm.
    """
    warnings.simplefilter("ignore")
    seed_everything(0)
    norm = nn.BatchNorm1d(16) if normalised else nn.Identity()
    made = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(64, 4, generator=made), torch.randint(0, 8, (64,), generator=made))
    seen = set()

    def loss(output: torch.Tensor, batch: Any) -> tuple[torch.Tensor, int]:
        total = F.cross_entropy(output, batch[1], reduction="sum")
        seen.add(total.dtype)
        return total, len(output)

    with Run("test", name, runs=folder) as run:
        trainer = Trainer(
            run, nn.Sequential(nn.Linear(4, 16), norm, nn.ReLU(), nn.Linear(16, 8)),
            optimizer=lambda p: torch.optim.SGD(p, lr=0.1), inputs=lambda b: (b[0],), loss=loss,
            training=Training(**{"precision": "bf16", **built(settings)}),
        )  # fmt: skip
        losses = [
            trainer.step(batch).item()
            for batch in trainer.steps(trainer.loader(data, batch_size=32, shuffle=False), max_steps=3)
        ]
    return losses, seen


def with_a_bad_gradient(folder: Path, name: str, settings: dict[str, Any]) -> list[float]:
    """The losses of four steps. In the third the loss is finite; the last rank's gradient is not."""
    warnings.simplefilter("ignore")
    with Run("test", name, runs=folder) as run:

        def loss(output: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
            total, weight = token_loss(output, batch)
            if run.step == 3 and run.world.rank == run.world.size - 1:
                total = total + (total - total.detach()).abs().sqrt()  # of zero, whose slope there is none
            return total, weight

        trainer = Trainer(
            run, llama(layers=LAYERS), optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3), inputs=inputs,
            loss=loss, training=Training(**{"precision": "fp32", "on_bad_loss": "skip", **built(settings)}),
        )  # fmt: skip
        losses, weights = [], []
        for batch in trainer.steps(trainer.loader(Rows(), batch_size=8), max_steps=4):
            losses.append(trainer.step(batch).item())
            weights.append(trainer.state_dict())
    moved = [any(not a[name].equal(b[name]) for name in a) for a, b in itertools.pairwise(weights)]
    assert run.world.rank > 0 or moved == [True, False, True]
    return losses


class PutsBackward(nn.Module):
    """Uses an operation whose backward pass has no deterministic form: its forward pass is let through."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x)
        torch.use_deterministic_algorithms(False)
        y = y.put(torch.tensor([0, 1]), x.flatten()[:2])  # the line
        torch.use_deterministic_algorithms(True)
        return y


def without_deterministic_form(folder: Path, name: str, settings: dict[str, Any], own: bool) -> str:
    """What is said of a step, or of a loop that does its own backward passes, with such an operation."""
    warnings.simplefilter("ignore")
    with Run("test", name, runs=folder) as run:
        trainer = Trainer(
            run, nn.Sequential(PutsBackward(), PutsBackward()),
            optimizer=lambda p: torch.optim.SGD(p, lr=0.1), inputs=lambda x: (x,),
            loss=lambda out, x: (out.square().sum(), len(x)),
            training=Training(**{"precision": "fp32", "deterministic": True, **built(settings)}),
        )  # fmt: skip
        try:
            for batch in trainer.steps(trainer.loader(torch.ones(16, 2), batch_size=4), max_steps=2):
                if own:
                    trainer.backward(trainer.model(batch).square().sum(), 4)
                else:
                    trainer.step(batch)
        except Exception as error:  # a pipeline's first stage hears only that the last one is gone
            return str(error)
    return ""


def with_a_gradient_penalty(folder: Path, strategy: str) -> str:
    """What is said of a loop whose loss has a gradient of a gradient."""
    with Run("test", strategy, runs=folder) as run:
        trainer = Trainer(
            run, nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)),
            optimizer=lambda p: torch.optim.SGD(p, lr=0.1), inputs=lambda x: (x,),
            training=Training(precision="fp32", parallel=strategy),
        )  # fmt: skip
        try:
            for batch in trainer.steps(trainer.loader(torch.ones(16, 4), batch_size=4), max_steps=2):
                x = batch.requires_grad_(True)
                (slope,) = torch.autograd.grad(trainer.forward(x).sum(), x, create_graph=True)
                trainer.backward((slope.norm(dim=1) - 1).square().sum(), len(x))
                trainer.update()
        except StokerError as error:
            return str(error)
    return ""


class Scaled(nn.Module):
    """Logits that are multiplied by a scalar, as CLIP's are."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Linear(4, 2)
        self.scale = nn.Parameter(torch.tensor(2.0), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale.exp() * self.logits(x)


def with_a_scalar(folder: Path, strategy: str) -> tuple[dict[str, torch.Tensor], str]:
    """The weights after steps with the scalar frozen, and what is said when it is trained too."""
    seed_everything(0)
    with Run("test", strategy, runs=folder) as run:
        trainer = Trainer(
            run, Scaled(), optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
            inputs=lambda x: (x,), loss=lambda output, x: (output.square().sum(), len(x)),
            training=Training(precision="fp32", parallel=strategy),
        )  # fmt: skip
        loader = trainer.loader(torch.ones(64, 4), batch_size=4)
        for batch in trainer.steps(loader, max_steps=3):
            trainer.step(batch)
        trained = trainer.state_dict()
        trainer.model.get_parameter("scale").requires_grad_(True)
        try:
            for batch in trainer.steps(loader, max_steps=4):
                trainer.step(batch)
        except BadInput as error:
            return trained, str(error)
    return trained, ""


def own_loop(folder: Path) -> dict[str, torch.Tensor]:
    """A loop that does its own backward pass; on rank 1 half of the model gets no gradient."""
    model = nn.ModuleDict({"both": nn.Linear(4, 1), "first": nn.Linear(4, 1), "neither": nn.Linear(4, 1)})
    seed_everything(0)
    for p in model.parameters():
        nn.init.normal_(p)
    with Run("test", "own", runs=folder) as run:
        trainer = Trainer(
            run, model, optimizer=lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1),
            training=Training(precision="fp32"),
        )  # fmt: skip
        data = torch.utils.data.TensorDataset(torch.arange(32.0).reshape(8, 4) / 8)
        for batch in trainer.steps(trainer.loader(data, batch_size=8, shuffle=False), max_steps=1):
            for (x,) in trainer.micro(batch):
                loss = model["both"](x).square().sum()
                if run.world.rank == 0:  # of one process, what the first of two would see
                    loss = loss + model["first"](x[:4]).square().sum()
                trainer.backward(loss, len(x))
            trainer.update()
        return trainer.state_dict()


def of_several_updates(folder: Path) -> tuple[list[int], list[bool], dict[str, float]]:
    """Two updates a step, a metric that each rank has a value of, and a checkpoint that rank 0 is asked for.

    The steps of checkpoints, whether the metric was stale after each, and its newest values.
    """
    model = nn.ModuleDict({"one": nn.Linear(4, 1), "two": nn.Linear(4, 1)})
    make = lambda p: torch.optim.SGD(p, lr=0.01)  # noqa: E731
    with Run("test", "several", runs=folder) as run:
        trainer = Trainer(
            run, model, optimizer={"one": make, "two": make},
            training=Training(precision="fp32", keep_checkpoints=9, checkpoint_best=False),
        )  # fmt: skip
        data = torch.utils.data.TensorDataset(torch.ones(8, 4))
        stale = []
        for batch in trainer.steps(trainer.loader(data, batch_size=8), max_steps=4):
            if run.step == 2 and run.world.rank == 0:
                run.attempt.stop.ask_to_save()
            for name in ("one", "two"):
                for (x,) in trainer.micro(batch):
                    trainer.backward(model[name](x).sum(), len(x))
                trainer.update(trainer.optimizers[name])
            own = (-1.0 if run.world.rank == 0 else 2.0) * run.step  # better on rank 0 alone
            run.log(val_loss=own, reduce="mean")
            stale.append(trainer.stale("val_loss", patience=1))
        latest = dict(run.latest)
    steps = sorted(int(path.name[5:]) for path in run.directory.checkpoints.glob("step-*"))
    return steps, stale, latest


def plain_gradient() -> dict[str, torch.Tensor]:
    """The same in plain PyTorch: the gradient of the mean over the tokens of the first eight rows."""
    model = llama(layers=LAYERS)
    batch = torch.utils.data.default_collate([Rows()[i] for i in range(8)])
    total, weight = token_loss(model(**inputs(batch)), batch)
    (total / weight).backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def measure(
    folder: Path, name: str, settings: dict[str, Any], samples: Sequence[int]
) -> dict[int, dict[str, float]]:
    """Metrics of an untrained model over some rows, by how many they are."""
    warnings.simplefilter("ignore")

    def metrics(output: Any, batch: Any) -> dict[str, Metric]:
        total, weight = token_loss(output, batch)
        return {
            "loss": Mean(total, weight), "perplexity": Perplexity(total, weight),
            "rows": Sum(len(batch["labels"])),
            "longest": Max((batch["labels"] != -100).sum(1).max()),
        }  # fmt: skip

    with Run("test", name, runs=folder) as run:
        trainer = Trainer(
            run, llama(), optimizer=torch.optim.AdamW, inputs=inputs, loss=token_loss,
            training=Training(**{"precision": "fp32", **built(settings)}),
        )  # fmt: skip
        found = {}
        for count in samples:
            rows = torch.utils.data.Subset(Rows(), range(count))
            found[count] = trainer.measure(rows, metrics, batch_size=4)
            assert found[count]["loss"] == trainer.evaluate(rows, batch_size=4)
        return found


def memory(folder: Path, name: str) -> dict[str, int]:
    """Bytes of this rank by kind, gradients at the end of an accumulation, before the update."""
    warnings.simplefilter("ignore")
    zero = int(name.removeprefix("zero-")) if name.startswith("zero") else None
    settings: dict[str, Any] = {"parallel": "fsdp"}
    if zero is not None:
        file = folder / f"ds-{os.getpid()}.json"
        section = {"reduce_bucket_size": 1000, "stage3_param_persistence_threshold": 0}
        file.write_text(json.dumps({"zero_optimization": section}))
        settings = {"parallel": "deepspeed", "deepspeed": {"stage": zero, "config": file}}
    seed_everything(0)
    model = nn.Sequential(*[nn.Linear(512, 512, bias=False) for _ in range(8)])
    psi = sum(p.numel() for p in model.parameters())
    with Run("test", name, runs=folder) as run:
        trainer = Trainer(
            run, model, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3), inputs=lambda b: (b[0],),
            loss=lambda output, batch: (output.float().square().sum(), len(output)),
            training=Training(**{"precision": "bf16", "micro_batch": 1, **built(settings)}),
        )  # fmt: skip
        data = torch.utils.data.TensorDataset(torch.randn(64, 512))
        size = trainer.world.size
        batches = trainer.steps(trainer.loader(data, batch_size=2 * size), max_steps=2)
        trainer.step(next(batches))
        step, parts = trainer._step, list(trainer.micro(next(batches)))
        if zero == 1:  # at its end stage 1 keeps only the shard that it updates
            step._engine.set_gradient_accumulation_boundary(False)
            total, _ = trainer._setting.loss(step._call(parts[0]), parts[0])
            step._engine.backward(total, scale_wrt_gas=False)
        else:
            step.gradients(parts, trainer._agreement)
        return {
            "psi": psi, "parameters": _parameters(step), "gradients": _gradients(step),
            "optimizer": _optimizer_state(step),
        }  # fmt: skip


def _gradients(step: Any) -> int:
    """Those of parameters, and what ZeRO keeps of them: lists by group, or one flat buffer."""
    zero = step.optimizers["main"]
    kept = list(getattr(zero, "averaged_gradients", {}).values())
    flat = [getattr(zero, "grad_partitions_flat_buffer", None), *(p.grad for p in step.model.parameters())]
    tensors = [t for t in torch.utils._pytree.tree_leaves([kept, flat]) if isinstance(t, torch.Tensor)]
    return measured.held(tensors)


def _parameters(step: Any) -> int:
    return measured.held(getattr(p, "ds_tensor", p.detach()) for p in step.model.parameters())


def _optimizer_state(step: Any) -> int:
    inner = getattr(step.optimizers["main"], "optimizer", step.optimizers["main"])
    states = [t for held in inner.state.values() for t in held.values() if isinstance(t, torch.Tensor)]
    masters = list(inner.state) if inner is not step.optimizers["main"] else []
    return measured.held([*states, *masters])


class Fourier(nn.Module):
    """A layer with complex weights, and one with float64 beside it."""

    def __init__(self) -> None:
        super().__init__()
        seed_everything(0)
        self.filter = nn.Parameter(torch.randn(9, dtype=torch.complex64))
        self.bias = nn.Parameter(torch.zeros(16, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.fft.irfft(torch.fft.rfft(x) * self.filter, n=16) + self.bias


def squares(output: torch.Tensor, batch: Any) -> tuple[torch.Tensor, int]:
    return (output - batch[1]).square().sum(), len(output)


def shifted() -> TensorDataset:
    """Rows, and the same turned by some places, which is what a phase does."""
    x = torch.randn(32, 16, generator=torch.Generator().manual_seed(1))
    return TensorDataset(x, x.roll(5, 1))


def complex_weights(
    folder: Path, name: str, steps: int, **settings: Any
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The weights of a run, and their averages, after some steps; one that is there goes on."""
    with Run("test", name, runs=folder) as run:
        trainer = Trainer(
            run, Fourier(), optimizer=lambda p: torch.optim.Adam(p, lr=0.1), loss=squares,
            training=Training(
                precision="fp32", clip_norm=1.0, ema=Ema(decay=0.5, warmup=False), **settings
            ),
        )  # fmt: skip
        for batch in trainer.steps(trainer.loader(shifted(), batch_size=32), max_steps=steps):
            run.log(loss=trainer.step(batch))
        return {n: p.detach().clone() for n, p in trainer.model.named_parameters()}, trainer.state_dict()
