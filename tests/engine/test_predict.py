"""Predictions of a dataset are in its order and of each sample once, on every rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import predict_run
import pytest
import torch
from stoker import Run, Trainer, evaluation
from stoker.engine.random_state import seed_everything
from strategies_run import Rows, inputs, llama
from torch import nn
from torch.utils.data import Subset, TensorDataset

import ranks
from support import SOAK


def _expected(count: int) -> dict[str, Any]:
    """With plain PyTorch, all rows in one batch."""
    batch = torch.utils.data.default_collate([Rows()[n] for n in range(count)])
    with torch.no_grad():
        return predict_run.outputs(llama(layers=2).eval()(**inputs(batch)), batch)


def _check(found: dict[int, dict[str, Any]]) -> None:
    for count, made in found.items():
        expected = _expected(count)
        torch.testing.assert_close(made["logits"], expected["logits"], rtol=1e-5, atol=1e-6)
        assert torch.equal(made["rows"][0], expected["rows"][0])
        assert np.array_equal(made["rows"][1], expected["rows"][1])
        assert made["names"] == expected["names"]


def test_predictions_are_those_of_plain_pytorch_in_the_order_of_the_dataset(tmp_path: Path) -> None:
    _check(predict_run.predict(tmp_path, "single"))


@pytest.mark.parametrize("parallel", ["ddp", "fsdp", "pipeline"] if SOAK else ["ddp", "pipeline"])
def test_every_rank_has_the_predictions_of_all(tmp_path: Path, parallel: str) -> None:
    for found in ranks.run(predict_run.predict, 2, tmp_path, tmp_path, parallel):
        _check(found)


@pytest.fixture
def trainer(tmp_path: Path) -> Any:
    seed_everything(0)
    with Run("test", "a", runs=tmp_path) as run:
        yield Trainer(run, nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 2)), optimizer=None)


def _rows(count: int) -> TensorDataset:
    return TensorDataset(torch.randn(count, 3), torch.arange(count))


def test_many_batches_are_joined_in_order(trainer: Any) -> None:
    count = 3 * evaluation._TOGETHER + 1
    found = trainer.predict(_rows(count), lambda output, batch: batch[1], batch_size=2)
    assert found.tolist() == list(range(count))


def test_what_is_kept_is_no_view_of_the_whole_output(trainer: Any) -> None:
    found = trainer.predict(_rows(4), lambda output, batch: output[:, 1], batch_size=4)
    assert found.untyped_storage().nbytes() == 4 * found.element_size()
    assert not found.requires_grad


def test_the_model_is_in_training_mode_again_afterwards(trainer: Any) -> None:
    modes = []
    trainer.predict(
        _rows(2), lambda output, batch: modes.append(trainer.model.training) or output, batch_size=2
    )
    assert modes == [False]
    assert trainer.model.training


def test_the_model_is_in_training_mode_again_after_an_error_too(trainer: Any) -> None:
    for go in (trainer.predict, trainer.measure):
        with pytest.raises(ZeroDivisionError) as raised:
            go(_rows(2), lambda output, batch: 1 / 0, batch_size=2)
        assert trainer.model.training, raised


@pytest.mark.parametrize(
    ("outputs", "said"),
    [
        (lambda output, batch: output.mean(), "for 4 samples the function returned Tensor tensor"),
        (lambda output, batch: output[:3], r"for 4 samples the function returned Tensor \(3, 2\)"),
        (lambda output, batch: {"a": batch[1], "b": ["x"]}, "the function returned a list of 1"),
        (lambda output, batch: None, "the function returned NoneType None"),
    ],
)  # fmt: skip
def test_what_is_not_of_each_sample_is_refused(trainer: Any, outputs: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        trainer.predict(_rows(4), outputs, batch_size=4)


def test_items_of_different_shapes_are_refused_but_not_in_a_list(trainer: Any) -> None:
    def padded(output: Any, batch: Any) -> Any:
        return torch.zeros(len(output), 1 + int(batch[1].max()))

    with pytest.raises(ValueError, match=r"has the shapes \(2, 2\), \(2, 4\): pad it"):
        trainer.predict(_rows(4), padded, batch_size=2)
    found = trainer.predict(_rows(4), lambda output, batch: list(padded(output, batch)), batch_size=2)
    assert [len(item) for item in found] == [2, 2, 4, 4]


def test_a_subset_is_predicted_in_its_own_order(trainer: Any) -> None:
    found = trainer.predict(Subset(_rows(9), [7, 2, 5]), lambda output, batch: batch[1], batch_size=2)
    assert found.tolist() == [7, 2, 5]
