"""What the ranks of test_sparse.py do: train an embedding with sparse gradients."""

from __future__ import annotations

from pathlib import Path

import torch
from stoker import Run, Trainer, Training
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

STEPS, BATCH, LIMIT = 4, 8, 0.05


class Bags(nn.Module):
    """Bags of words, two classes; of an empty bag nothing looks at the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.EmbeddingBag(20, 4, mode="sum", sparse=True)
        self.classes = nn.Linear(4, 2)

    def forward(self, bags: torch.Tensor, used: bool = True) -> torch.Tensor:
        seen = self.words(bags) if used else torch.zeros(len(bags), 4)
        return self.classes(seen)


def dataset() -> TensorDataset:
    made = torch.Generator().manual_seed(0)
    bags = torch.randint(20, (STEPS * BATCH, 3), generator=made)
    return TensorDataset(bags, bags.sum(1) % 2)


def own_loop(folder: Path, *, alone: int = -1) -> dict[str, torch.Tensor]:
    """Steps of a loop with two optimizers, in the first of which rank `alone` does not use the embedding."""
    torch.manual_seed(0)
    with Run("test", "a", runs=folder) as run:
        trainer = Trainer(
            run, Bags(), training=Training(precision="fp32"), inputs=lambda batch: batch,
            optimizer={
                "words": lambda p: torch.optim.SparseAdam(p, 0.05),
                "classes": lambda p: torch.optim.Adam(p, 0.01),
            },
        )  # fmt: skip
        loader = trainer.loader(dataset(), batch_size=BATCH, shuffle=False)
        for batch in trainer.steps(loader, max_steps=STEPS):
            used = run.step > 1 or run.world.rank != alone
            for bags, classes in trainer.micro(batch):
                loss = cross_entropy(trainer.forward((bags, used)), classes, reduction="sum")
                trainer.backward(loss, len(bags))
            trainer.update(*trainer.optimizers.values())
        return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def clipped(folder: Path) -> dict[str, torch.Tensor]:
    """Steps of `trainer.step`, with clipping."""
    torch.manual_seed(0)
    with Run("test", "a", runs=folder) as run:
        trainer = Trainer(
            run, Bags(), training=Training(precision="fp32", clip_norm=LIMIT, on_bad_loss="skip"),
            optimizer=lambda p: torch.optim.SGD(p, 0.1),
            loss=lambda output, batch: (cross_entropy(output, batch[1], reduction="sum"), len(batch[1])),
        )  # fmt: skip
        loader = trainer.loader(dataset(), batch_size=BATCH, shuffle=False)
        for batch in trainer.steps(loader, max_steps=STEPS):
            trainer.step(batch)
        return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
