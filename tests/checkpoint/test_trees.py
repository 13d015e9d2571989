"""State of a script's own as a checkpoint holds it."""

from __future__ import annotations

import collections
import random
from typing import Any

import numpy as np
import orjson
import pytest
import torch
from stoker.checkpoint import trees

STATES: dict[str, Any] = {
    "plain": {"a": [1, 2.5, -0.0, None, True, "x"], "b": {}},
    "not in JSON": {"n": float("nan"), "i": -float("inf"), "big": 2**130, "low": -(2**63) - 1},
    "tuples": (1, (2.0, [3]), ()),
    "keys": {1: "a", None: "b", (1, "x"): "c", 2.5: {"tensor": {"at": "here"}}},
    "collections": [
        collections.OrderedDict(b=1, a=2), collections.Counter([1, 1, 2]), collections.deque([1, 2], 5),
        {"y"}, frozenset({(1, 2)}),  # of one each, as the order of a set is chance, and told by its repr
    ],
    "numpy": [np.float32(1 / 3), np.int64(-7), np.bool_(True), {np.int32(3): np.float64("inf")}],
    "random": [random.Random(1).getstate(), np.random.default_rng(0).bit_generator.state],
}  # fmt: skip


def _back(state: Any) -> Any:
    values, tensors = trees.apart(state)
    return trees.together(orjson.loads(orjson.dumps(values)), tensors)


@pytest.mark.parametrize("name", STATES)
def test_a_state_comes_back_of_the_same_types(name: str) -> None:
    assert repr(_back(STATES[name])) == repr(STATES[name])  # which tells -0.0 from 0, a tuple from a list


def test_a_set_is_the_same_to_all_who_hold_it() -> None:
    sets = [set(order) for order in (range(0, 9000, 8), range(8992, -1, -8))]
    assert _back(sets[0]) == sets[0]
    assert trees.apart(sets[0]) == trees.apart(sets[1])


@pytest.mark.parametrize(
    "array", [np.arange(6.0).reshape(2, 3).T, np.array(3, np.uint16), np.empty((0, 2)), np.array([True])]
)
def test_an_array_comes_back(array: np.ndarray[Any, Any]) -> None:
    found = _back({"x": array})["x"]
    assert type(found) is np.ndarray
    assert (found.dtype, found.shape) == (array.dtype, array.shape)
    assert np.array_equal(found, array)


def test_tensors_stand_under_their_places() -> None:
    values, tensors = trees.apart({"shadow": {"a.b": torch.ones(2).bfloat16()}, 0: [torch.zeros(())]})
    assert list(tensors) == ["['shadow']['a.b']", "[0][0]"]
    assert [leaf["at"] for _, leaf in trees.leaves(values)] == list(tensors)
    assert trees.together(values, tensors)["shadow"]["a.b"] is tensors["['shadow']['a.b']"]


def test_what_was_written_before_is_read() -> None:
    """Never change this text: it is what checkpoints have."""
    text = """{"dict": {
        "best": {"float": "inf"}, "lr": [0.1], "seen": {"Counter": [[3, 1]]}, "big": {"int": "-9"},
        "x": {"numpy": ["<f4", 0.5]}, "last": {"deque": [2, [{"tuple": [1, null]}, {"set": ["a"]}]]},
        "w": {"tensor": {"at": "['w']", "dtype": "float32", "shape": [2], "on": "cpu"}},
        "y": {"array": {"at": "['y']", "dtype": "int64", "shape": [1]}}
    }}"""
    tensors = {"['w']": torch.tensor([1.0, 2.0]), "['y']": torch.tensor([5])}
    assert repr(trees.together(orjson.loads(text), tensors)) == repr({
        "best": float("inf"), "lr": [0.1], "seen": collections.Counter([3]), "big": -9, "x": np.float32(0.5),
        "last": collections.deque([(1, None), {"a"}], 2), "w": torch.tensor([1.0, 2.0]), "y": np.array([5]),
    })  # fmt: skip


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({"rules": [0, len]}, r"len at \['rules'\]\[1\]"),
        ({"at": {1: object()}}, r"an object of type object at \['at'\]\[1\]"),
        (object(), "an object of type object$"),
        ({"k": {frozenset(): 1}}, r"a key of type frozenset at \['k'\]"),
        ({"x": np.array(["a"])}, r"an array of <U1 at \['x'\]"),
        ({"x": torch.ones(2).to_sparse()}, r"a tensor \(torch.sparse_coo, torch.float32\) at \['x'\]"),
        ({"x": torch.ones(1, device="meta")}, r"a tensor \(meta\) at \['x'\]"),
        ({"x": np.array([1j])}, r"a tensor \(torch.strided, torch.complex128\) at \['x'\]"),
        ({"x": collections.defaultdict(int)}, r"an object of type defaultdict at \['x'\]"),
    ],
)
def test_what_cannot_be_saved_is_named_with_its_place(state: Any, said: str) -> None:
    with pytest.raises(trees.Unsavable, match=said):
        trees.apart(state)
