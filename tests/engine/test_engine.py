from __future__ import annotations

import dataclasses
import itertools
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from stoker import BadInput, storage
from stoker.engine import batches, precision, random_state, schedule


class Named(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor


@dataclasses.dataclass
class Fields:
    x: torch.Tensor
    label: str


def _draw() -> tuple[float, float, float, float]:
    return random.random(), float(np.random.rand()), float(np.random.randn()), torch.rand(()).item()


def test_random_state_comes_back_whole_and_through_json() -> None:
    import orjson

    random_state.seed_everything(7)
    _draw()
    tensors, values = random_state.capture()
    values = orjson.loads(orjson.dumps(values))
    expected = [_draw() for _ in range(3)]
    random_state.seed_everything(8)
    random_state.restore(tensors, values)
    assert [_draw() for _ in range(3)] == expected


def test_a_process_without_torch_is_seeded_without_it() -> None:
    code = (
        "import random, sys, numpy as np; from stoker.engine import random_state;"
        "random_state.seed_everything(7); print(random.random(), np.random.rand(), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    random_state.seed_everything(7)
    assert done.stdout.split() == [str(random.random()), str(float(np.random.rand())), "False"]


@pytest.mark.parametrize(
    "batch",
    [
        {"x": torch.arange(7)},
        (torch.arange(7), torch.arange(7) * 2),
        [torch.arange(7), "kept"],
        Named(torch.arange(7), torch.arange(7)),
        Fields(torch.arange(7), "kept"),
        torch.arange(7),
    ],
    ids=lambda batch: type(batch).__name__,
)
def test_a_batch_of_any_shape_is_split_by_samples(batch: Any) -> None:
    def first(part: Any) -> torch.Tensor:
        if isinstance(part, dict):
            return part["x"]
        if isinstance(part, Fields | Named):
            return part.x
        return part if isinstance(part, torch.Tensor) else part[0]

    parts = list(batches.split(batch, 3))
    assert [len(first(p)) for p in parts] == [3, 3, 1]
    assert all(type(part) is type(batch) for part in parts)
    assert torch.equal(torch.cat([first(p) for p in parts]), torch.arange(7))
    assert batches.size(batch) == 7


def test_a_batch_without_tensors_is_refused() -> None:
    with pytest.raises(ValueError, match="contains no tensor"):
        batches.size({"x": 1})


def test_what_has_an_item_for_each_sample_is_cut_with_the_tensors() -> None:
    names = [f"{n}.png" for n in range(7)]
    batch = {
        "x": torch.arange(7), "names": names, "in": {"boxes": tuple([n] * 2 for n in range(7))},
        "array": np.arange(7), "classes": ["cat", "dog"], "kind": "samples", "scale": torch.tensor(0.5),
        "field": Named(torch.arange(14).reshape(7, 2), names),
    }  # fmt: skip
    first, second = batches.split(batch, 4)
    for part, few in ((first, range(4)), (second, range(4, 7))):
        kept = slice(few.start, few.stop)
        assert part["x"].tolist() == part["array"].tolist() == list(few)
        assert part["names"] == list(part["field"].y) == names[kept]
        assert part["in"]["boxes"] == tuple([n] * 2 for n in few)
        assert (part["classes"], part["kind"], part["scale"].item()) == (["cat", "dog"], "samples", 0.5)
    first = next(batches.split(Fields(torch.arange(7), "samples"), 4))
    assert first.label == "samples", "a text is no list, though it has as many letters"


@pytest.mark.parametrize(
    ("shapes", "share"),
    [(((11, 16), (13, 16)), 16), (((11, 16), (11, 16)), 16), (((4, 1), (16, 1)), None), ((), 16)],
    ids=["time first", "one time first", "no share known", "no tensor with a dim"],
)
def test_a_batch_that_does_not_have_samples_first_is_whole_or_refused(
    shapes: tuple[tuple[int, ...], ...], share: int | None
) -> None:
    batch = [torch.tensor(0.5), *map(torch.zeros, shapes)]
    samples = batches.size(batch, share)
    assert samples == (share or 4)
    assert list(batches.split(batch, None, share)) == [batch]
    assert list(batches.split(batch, samples, share)) == [batch]
    said = re.escape(", ".join(map(str, shapes))) or "no tensors"
    with pytest.raises(BadInput, match=rf"micro_batch=3: .*{said}: make collate put samples first"):
        list(batches.split(batch, 3, share))


def test_samples_that_a_collate_function_joins_or_multiplies_are_cut_all_the_same() -> None:
    views = torch.zeros(32, 3, 8, 8), torch.zeros(32)
    assert [len(x) for x, _ in batches.split(views, 8, share=16)] == [8] * 4
    rows = {"input_ids": torch.zeros(6, 128), "documents": torch.zeros(6, 4)}
    assert [len(part["documents"]) for part in batches.split(rows, 4, share=16)] == [4, 2]


@pytest.mark.parametrize(
    "batch",
    [
        [torch.zeros(6), torch.zeros(6), torch.zeros(6), torch.zeros(6)],
        (torch.zeros(4, 3, 8, 8), [{"boxes": torch.zeros(4, 4)} for _ in range(4)]),
        {"x": torch.zeros(4, 2), "seen": [torch.zeros(5), torch.zeros(3), torch.zeros(2), torch.zeros(4)]},
        (torch.zeros(11, 3), torch.zeros(11)),
    ],
    ids=["a list of sequences", "as many boxes as samples", "unequal", "the nodes of graphs"],
)
def test_what_cannot_be_told_apart_by_samples_is_not_cut(batch: Any) -> None:
    assert batches.size(batch, 4) == 4
    assert not batches.can_be_cut(batch, 4)
    with pytest.raises(BadInput, match="micro_batch=2: a batch is split along the first dim"):
        list(batches.split(batch, 2, 4))


def test_fields_of_a_batch_with_as_many_samples_are_cut() -> None:
    parts = list(batches.split([torch.zeros(2, 5), torch.zeros(2)], 1, 2))
    assert [[tuple(field.shape) for field in part] for part in parts] == [[(1, 5), (1,)]] * 2
    parts = list(batches.split({"views": [torch.zeros(2, 5), torch.zeros(2, 7)]}, 1, 2))
    assert [[tuple(view.shape) for view in part["views"]] for part in parts] == [[(1, 5), (1, 7)]] * 2


def test_schedules_warm_up_and_come_down() -> None:
    cosine = schedule.build("cosine", warmup=0.1, floor=0.1)
    factors = [cosine(step, 100) for step in range(100)]
    assert all(a < b for a, b in itertools.pairwise(factors[:11]))
    assert factors[10] == 1.0
    assert all(a > b for a, b in itertools.pairwise(factors[10:]))
    assert cosine(100, 100) == pytest.approx(0.1)
    in_steps = schedule.build("cosine", warmup=10, floor=0.1)
    assert [in_steps(step, 100) for step in range(100)] == factors
    assert in_steps(9, 1000) < 1.0 == in_steps(10, 1000)
    assert schedule.build("linear")(50, 100) == 0.5
    assert schedule.build("constant")(99, 100) == 1.0
    assert schedule.build("cosine", warmup=0.5)(0, 1) == 1.0


def test_a_warm_up_longer_than_the_training_is_said(caplog: pytest.LogCaptureFixture) -> None:
    for shape in ("constant", "linear", "cosine", "wsd"):
        for warmup in (0.0, 0.5, 9):
            schedule.warn_of_no_peak(schedule.build(shape, warmup=warmup), 10)
    assert not caplog.text
    schedule.warn_of_no_peak(schedule.build("linear", warmup=100), 13)
    assert "still rises at the last of 13 steps, where it is 0.129 of what was asked for" in caplog.text


@pytest.mark.parametrize(("speed", "expected"), [(4.0, "bf16"), (1.2, "fp32"), (0.003, "fp32")])
def test_auto_precision_on_a_cpu_is_what_it_is_fast_at(speed: float, expected: str, tmp_path: Path) -> None:
    precision.bf16_speed(tmp_path / "bf16_speed.json")  # measures, and says under which name
    known = storage.read_json(tmp_path / "bf16_speed.json")
    storage.write_json(tmp_path / "bf16_speed.json", dict.fromkeys(known, speed))
    assert precision.resolve("auto", torch.device("cpu"), tmp_path) == expected
    assert precision.resolve("bf16", torch.device("cpu"), tmp_path) == "bf16"


def test_the_speed_of_bf16_is_measured_once_and_leaves_no_trace(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    first = precision.bf16_speed(tmp_path / "bf16_speed.json")
    assert first > 0
    assert precision.bf16_speed(tmp_path / "bf16_speed.json") == first
    assert torch.equal(torch.get_rng_state(), before)
