"""A learning rate that drops when the loss stalls: one of torch's schedulers, saved in every checkpoint."""

from dataclasses import dataclass

import stoker
from own_loop import digits, small_cnn
from torch.nn.functional import cross_entropy
from torch.optim import SGD
from torch.optim.lr_scheduler import ReduceLROnPlateau


@dataclass(frozen=True, kw_only=True)
class Config(stoker.Training):
    lr: float = 0.1
    patience: int = 1
    batch_size: int = 64
    epochs: int = 12
    seed: int = 0


def train(run: stoker.Run, config: Config) -> None:
    training, held_out = digits()
    trainer = stoker.Trainer(
        run, small_cnn(), training=config, optimizer=lambda parameters: SGD(parameters, lr=config.lr),
        loss=lambda logits, batch: (cross_entropy(logits, batch[1], reduction="sum"), len(batch[1])),
    )  # fmt: skip
    scheduler = ReduceLROnPlateau(trainer.optimizer, factor=0.3, patience=config.patience)
    trainer.register_for_checkpointing(scheduler=scheduler)
    loader = trainer.loader(training, batch_size=config.batch_size)
    for batch in trainer.steps(loader, epochs=config.epochs):
        run.log(loss=trainer.step(batch), lr=trainer.lr)
        if trainer.every("1ep"):
            loss = trainer.evaluate(held_out, batch_size=config.batch_size)  # the same on every rank
            run.log(val_loss=loss)
            scheduler.step(loss)


if __name__ == "__main__":
    stoker.main(train)
