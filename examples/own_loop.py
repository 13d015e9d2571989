"""A small CNN on scikit-learn's digits: your own loop, tracked and resumable after any kill."""

from dataclasses import dataclass

import stoker
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import AdamW
from torch.utils.data import TensorDataset


@dataclass(frozen=True, kw_only=True)
class Config(stoker.Training):
    lr: float = 1e-3
    batch_size: int = 64
    epochs: int = 5
    seed: int = 0


def digits() -> tuple[TensorDataset, TensorDataset]:
    """1,797 images of 8 x 8 pixels: (1, 8, 8) floats in 0..1 with their digit; the last 297 are held out."""
    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(found.target)
    return TensorDataset(images[:1500], labels[:1500]), TensorDataset(images[1500:], labels[1500:])


def small_cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Dropout(0.2), nn.Linear(512, 10),
    )  # fmt: skip


@torch.no_grad()
def accuracy(model: nn.Module, dataset: TensorDataset) -> float:
    model.eval()
    images, labels = dataset.tensors
    right = (model(images).argmax(dim=1) == labels).float().mean()
    model.train()
    return right.item()


def train(run: stoker.Run, config: Config) -> None:
    training, held_out = digits()
    model = small_cnn()
    trainer = stoker.Trainer(
        run, model, training=config, optimizer=lambda parameters: AdamW(parameters, lr=config.lr),
        loss=lambda logits, batch: (cross_entropy(logits, batch[1], reduction="sum"), len(batch[1])),
    )  # fmt: skip
    loader = trainer.loader(training, batch_size=config.batch_size)
    for batch in trainer.steps(loader, epochs=config.epochs):
        run.log(loss=trainer.step(batch))
        if trainer.every("1ep"):
            run.log(val_accuracy=accuracy(model, held_out))


if __name__ == "__main__":
    stoker.main(train)
