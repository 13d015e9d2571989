"""Every strategy is the single process, to rounding: real ranks with gloo between them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import strategies_run
import torch
from stoker.run import view
from stoker.run.directory import RunDirectory
from strategies_run import LAYERS, STEPS

import ranks
from support import SOAK

Trained = tuple[list[float], dict[str, torch.Tensor]]

PIPELINE: dict[str, Any] = {"parallel": "pipeline", "micro_batch": 2}  # of shares of 8 or 4
STRATEGIES: dict[str, tuple[int, dict[str, Any]]] = {
    "ddp": (2, {"parallel": "ddp"}),
    "ddp-accumulating": (2, {"parallel": "ddp", "micro_batch": 2}),
    "ddp-static": (
        2,
        {
            "parallel": "ddp",
            "micro_batch": 2,
            "ddp": {"static_graph": True, "gradient_as_bucket_view": False},
        },
    ),
    "ddp-unused": (
        2,
        {"parallel": "ddp", "micro_batch": 2, "ddp": {"find_unused_parameters": True, "bucket_mb": 0.01}},
    ),
    "fsdp": (2, {"parallel": "fsdp"}),
    "fsdp-accumulating": (
        2,
        {"parallel": "fsdp", "micro_batch": 1, "fsdp": {"reshard_after_forward": False}},
    ),
    "fsdp-hybrid": (4, {"parallel": "fsdp", "fsdp": {"shard": 2}}),
    "gpipe": (2, {**PIPELINE, "pipeline": {"schedule": "gpipe"}}),
    "1f1b": (2, PIPELINE),
    "1f1b-by-default": (2, {"parallel": "pipeline"}),
    "interleaved": (2, {**PIPELINE, "pipeline": {"schedule": "interleaved"}}),
    "1f1b-auto": (2, {**PIPELINE, "micro_batch": "auto"}),
    "interleaved-x-ddp": (4, {**PIPELINE, "pipeline": {"ranks": 2, "schedule": "interleaved"}}),
    "1f1b-x-fsdp": (4, {**PIPELINE, "pipeline": {"ranks": 2, "data": "fsdp"}}),
    "pipeline-x-ddp": (4, {**PIPELINE, "pipeline": {"ranks": 2}}),
    "pipeline-x-fsdp": (4, {**PIPELINE, "pipeline": {"ranks": 2, "data": "fsdp", "schedule": "gpipe"}}),
    "zero-0": (2, {"parallel": "deepspeed", "micro_batch": 2, "deepspeed": {"stage": 0}}),
    "zero-1": (2, {"parallel": "deepspeed", "micro_batch": 2, "deepspeed": {"stage": 1}}),
    "zero-2": (2, {"parallel": "deepspeed", "micro_batch": 2, "deepspeed": {"stage": 2}}),
    "zero-3": (2, {"parallel": "deepspeed", "micro_batch": 2, "deepspeed": {"stage": 3}}),
}
PRODUCTS = ("interleaved-x-ddp", "1f1b-x-fsdp")
"""Of a schedule and a way to share data that others have too, each with another."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("strategies")


def _train(
    folder: Path, name: str, size: int, kind: str, settings: dict[str, Any], **more: Any
) -> list[Trained]:
    results = ranks.run(strategies_run.train, size, folder, folder, name, kind, settings, **more)
    assert all(result[0] == results[0][0] for result in results), "ranks log one loss"
    return results


@pytest.fixture(scope="module")
def alone(folder: Path) -> Trained:
    """The single process, in fp32."""
    return _train(folder, "alone", 1, "llama", {})[0]


@pytest.fixture(scope="module")
def deep_alone(folder: Path) -> Trained:
    """The same of a model that has a layer for each of four stages."""
    return _train(folder, "deep-alone", 1, "llama", {}, layers=4)[0]


@pytest.fixture(scope="module")
def averaged_alone(folder: Path) -> Trained:
    """The single process, with an average of the weights that is what is evaluated and exported."""
    return _train(folder, "averaged", 1, "llama", {"ema": {"decay": 0.9}}, steps=8, evaluate_at=5)[0]


def _assert_same(found: Trained, expected: Trained, *, losses: float, weights: float) -> None:
    assert found[0] == pytest.approx(expected[0], rel=losses)
    assert found[1].keys() == expected[1].keys()
    for name, tensor in expected[1].items():
        torch.testing.assert_close(found[1][name].float(), tensor, atol=weights, rtol=0, msg=name)


@pytest.mark.soak
@pytest.mark.parametrize("name", [name for name in STRATEGIES if SOAK or name not in PRODUCTS])
def test_a_strategy_has_the_curve_and_the_weights_of_one_process(
    name: str, folder: Path, request: pytest.FixtureRequest
) -> None:
    size, settings = STRATEGIES[name]
    same, layers = ("deep_alone", 4) if "interleaved" in name else ("alone", LAYERS)
    alone = request.getfixturevalue(same)
    found = _train(folder, name, size, "llama", settings, layers=layers)[0]
    _assert_same(found, alone, losses=1e-5, weights=1e-4)
    norms, epochs = _logged(folder, name)
    assert norms == pytest.approx(_logged(folder, same.replace("_", "-"))[0], rel=1e-3)
    assert epochs == [step * 8 / 64 for step in range(1, STEPS + 1)]


def _logged(folder: Path, name: str) -> list[list[float]]:
    points = view.load(RunDirectory(folder / "test" / name)).points
    return [list(dict(points[metric].items()).values()) for metric in ("grad_norm", "epoch")]


PLAIN = ("fsdp", "zero-3", *(("ddp", "1f1b", "interleaved", "zero-0", "zero-1", "zero-2") if SOAK else ()))
DECAYED: dict[str, tuple[int, dict[str, Any]]] = {
    "single": (1, {}),
    "in-backward": (1, {"optimizer_in_backward": True}),
    **{name: STRATEGIES[name] for name in PLAIN},
}


@pytest.mark.soak
@pytest.mark.parametrize("frozen", [False, True] if SOAK else [True])
@pytest.mark.parametrize("name", DECAYED if SOAK else ["in-backward", "zero-3"])
def test_weight_decay_leaves_out_norms_under_every_strategy(name: str, frozen: bool, tmp_path: Path) -> None:
    size, settings = DECAYED[name]

    def weights(run: str, weight_decay: float, steps: int) -> dict[str, torch.Tensor]:
        return ranks.run(
            strategies_run.decaying, size, tmp_path, tmp_path, run, settings,
            weight_decay=weight_decay, steps=steps, frozen=frozen,
        )[0]  # fmt: skip

    with_decay, without = weights("decay", 0.9, 1), weights("none", 0.0, 1)
    names = {n for n, p in strategies_run.llama(layers=LAYERS).named_parameters() if p.dim() > 1}
    moved = {n for n in without if not torch.allclose(with_decay[n], without[n], rtol=0, atol=1e-5)}
    assert moved == names

    whole = weights("whole", 0.9, 4)
    again = weights("decay", 0.9, 4)
    for n, tensor in whole.items():
        assert torch.equal(again[n], tensor), n


WAYS = [("fsdp", "single", "pipeline-x-fsdp")]
if SOAK:
    WAYS += [("pipeline-x-fsdp", "single", "fsdp"), ("fsdp-hybrid", "single", "ddp")]
    WAYS += [("ddp", "single", "1f1b"), ("1f1b", "single", "fsdp-hybrid")]


@pytest.mark.soak
@pytest.mark.parametrize("optimizer", ["muon", *(("adafactor", "sgd") if SOAK else ())])
def test_every_optimizer_has_the_curve_of_one_process_and_goes_on_under_another_strategy(
    optimizer: str, tmp_path: Path
) -> None:
    run = strategies_run.by_name
    alone = ranks.run(run, 1, tmp_path, tmp_path, "alone", {}, optimizer, 9)[0]
    for way in WAYS:
        losses: list[float] = []
        for steps, leg in zip((3, 6, 9), way, strict=True):
            size, settings = STRATEGIES.get(leg, (1, {}))
            found = ranks.run(run, size, tmp_path, tmp_path, "-to-".join(way), settings, optimizer, steps)[0]
            losses += found[0]
        _assert_same((losses, found[1]), alone, losses=1e-5, weights=1e-4)


@pytest.mark.soak(small=False)
def test_what_an_optimizer_counts_goes_on_under_every_strategy(tmp_path: Path) -> None:
    """Such as the products of NAdam and the rates of ASGD, which are one number for each weight."""
    run = strategies_run.with_optimizers
    alone = ranks.run(run, 1, tmp_path, tmp_path / "alone", {}, 10)[0]
    found: dict[str, list[float]] = {name: [] for name in alone}
    legs = ("single", "zero-1", "fsdp", "zero-3", "single")
    for number, leg in enumerate(legs, start=1):
        size, settings = STRATEGIES.get(leg, (1, {}))
        for name, losses in ranks.run(run, size, tmp_path, tmp_path / "a", settings, 2 * number)[0].items():
            found[name] += losses
    for name, losses in alone.items():
        assert found[name] == pytest.approx(losses, rel=1e-4), name


def test_under_zero_a_group_goes_on_with_its_furthest_count(tmp_path: Path) -> None:
    """Else the updates of all its weights would be as large as those of one that was just begun."""
    alone, zero = ranks.run(strategies_run.with_a_late_weight, 1, tmp_path, tmp_path)[0]
    for name, tensor in alone.items():
        torch.testing.assert_close(zero[name], tensor, atol=1e-5, rtol=0, msg=name)


@pytest.mark.parametrize(
    ("optimizer", "said"),
    [
        ("adafactor", "Adafactor needs the rows and columns"),
        ("muon", "Muon needs the rows and columns"),
        ("adamw8bit", "with 8-bit states"),
    ],
)
def test_an_optimizer_that_deepspeed_would_make_another_is_refused(
    optimizer: str, said: str, tmp_path: Path
) -> None:
    size, settings = STRATEGIES["zero-2"]
    with pytest.raises(AssertionError, match=f"BadInput: parallel=deepspeed .*{said}"):
        ranks.run(strategies_run.by_name, size, tmp_path, tmp_path, "a", settings, optimizer, 4)


# One product in bf16 is off by up to 2**-9 of itself, in fp16 by 2**-12; the loss, a mean over many, by less.
# The weights follow AdamW, which moves each by up to lr a step whatever its gradient's size.
HALF = {"bf16": 1e-3, "fp16": 1e-4}


HALVED = ("single", "ddp", "fsdp", "1f1b", "pipeline-x-fsdp", "zero-0")
EVERY = [(name, p) for name in HALVED for p in HALF] + [(f"zero-{n}", "bf16") for n in (1, 2, 3)]
FEW = [("single", "fp16"), ("ddp", "bf16"), ("fsdp", "fp16"), ("pipeline-x-fsdp", "bf16"), ("zero-2", "bf16")]
ON_A_CPU = EVERY if SOAK else FEW


Halved = tuple[list[float], set[torch.dtype]]


def _halved(folder: Path, name: str, size: int, settings: dict[str, Any], *, normalised: bool) -> Halved:
    run = strategies_run.in_half_precision
    found: Halved = ranks.run(run, size, folder, folder, name, settings, normalised=normalised)[0]
    return found


@pytest.fixture(scope="module")
def halved_alone(folder: Path) -> Halved:
    return _halved(folder, "halved-alone", 1, {}, normalised=False)


@pytest.fixture(scope="module")
def normalised_by_ddp(folder: Path) -> Halved:
    settings = {"parallel": "ddp", "micro_batch": 8}
    return _halved(folder, "normalised-by-ddp", 2, settings, normalised=True)


@pytest.mark.parametrize("name", ["single", "fsdp", "zero-0", "zero-2", "zero-3"])
def test_a_loss_is_computed_in_float32_whatever_casts_the_forward_pass(
    name: str, halved_alone: Halved, tmp_path: Path
) -> None:
    """The same one too: rounded to bf16 it would be off by up to 2**-9 of itself."""
    losses, seen = halved_alone
    if name != "single":
        losses, seen = _halved(tmp_path, "a", *STRATEGIES[name], normalised=False)
    assert seen == {torch.float32}
    assert losses == pytest.approx(halved_alone[0], rel=5e-4)


@pytest.mark.parametrize("name", ["fsdp", "zero-1", "zero-2", "zero-3"])
def test_batch_norm_in_bf16_is_the_same_under_every_strategy(
    name: str, normalised_by_ddp: Halved, tmp_path: Path
) -> None:
    size, settings = STRATEGIES[name]
    losses, _ = _halved(tmp_path, "a", size, {**settings, "micro_batch": 8}, normalised=True)
    assert losses == pytest.approx(normalised_by_ddp[0], rel=1e-4)


@pytest.mark.soak
@pytest.mark.parametrize(("name", "precision"), ON_A_CPU)
def test_half_precision_stays_near_the_curve_of_fp32(
    name: str, precision: str, folder: Path, deep_alone: Trained
) -> None:
    size, settings = STRATEGIES.get(name, (1, {}))
    settings = {**settings, "precision": precision}
    found = _train(folder, f"{name}-{precision}", size, "llama", settings, layers=4)[0]
    assert found[0] == pytest.approx(deep_alone[0], rel=HALF[precision])
    lr, steps = 1e-3, STEPS
    for key, tensor in deep_alone[1].items():
        assert (found[1][key].float() - tensor).abs().max() < lr * steps / 4, key


RESUMED = ("fsdp", "1f1b", "zero-3")
RESUMED += ("ddp-accumulating", "fsdp-hybrid", "pipeline-x-ddp", "zero-1") if SOAK else ()


@pytest.mark.soak
@pytest.mark.parametrize("name", RESUMED)
def test_killed_and_resumed_it_ends_with_the_same_bits(name: str, tmp_path: Path) -> None:
    size, settings = STRATEGIES[name]
    same = {"steps": 9, "dropout": 0.1}
    settings = {**settings, "checkpoint_every": 4, "ema": {"decay": 0.9}}
    whole = _train(tmp_path, "whole", size, "llama", settings, **same)[0]
    assert (
        ranks.run(strategies_run.train, size, tmp_path, tmp_path, "cut", "llama", settings, die_at=7, **same)
        == [None] * size
    )
    rest = _train(tmp_path, "cut", size, "llama", settings, **same)[0]
    assert rest[0] in (whole[0][4:], whole[0]), "from the checkpoint of step 4, if it was on disk by then"
    for key, tensor in whole[1].items():
        assert torch.equal(rest[1][key], tensor), key


ROUND_TRIPS = {
    "worlds": ("ddp", "ddp-4", "fsdp-hybrid", "fsdp", "single"),
    "stages": ("fsdp", "1f1b-by-default", "pipeline-x-fsdp", "ddp"),
    "zero": ("ddp", "zero-2", "zero-3", "zero-1-4", "single"),
}


@pytest.mark.parametrize("name", ROUND_TRIPS)
def test_a_run_goes_on_under_other_strategies_and_on_other_numbers_of_ranks(
    name: str, tmp_path: Path, alone: Trained
) -> None:
    """Killed every few steps, and each time continued in another way."""
    ways = {
        **STRATEGIES, "single": (1, {}), "ddp-4": (4, {"parallel": "ddp"}),
        "zero-1-4": (4, {"parallel": "deepspeed", "deepspeed": {"stage": 1}}),
    }  # fmt: skip
    *legs, last = ROUND_TRIPS[name]
    for number, leg in enumerate(legs, start=1):
        size, settings = ways[leg]
        settings = {**settings, "checkpoint_every": 2}
        ranks.run(
            strategies_run.train, size, tmp_path, tmp_path, "a", "llama", settings, die_at=2 * number + 2
        )
    found = _train(tmp_path, "a", ways[last][0], "llama", ways[last][1])[0]
    steps = len(found[0])
    assert steps < STEPS, "it went on, and did not begin anew"
    _assert_same(found, (alone[0][-steps:], alone[1]), losses=1e-5, weights=1e-4)


@pytest.mark.soak
@pytest.mark.parametrize("decay", [None, 0.9])
@pytest.mark.parametrize("name", STRATEGIES if SOAK else ["fsdp"])
def test_the_best_weights_are_loaded_under_every_strategy(
    name: str, decay: float | None, tmp_path: Path
) -> None:
    size, settings = STRATEGIES[name]
    settings = {**settings, "ema": {"decay": decay}}
    measured, step, loaded = ranks.run(strategies_run.best, size, tmp_path, tmp_path, "a", settings)[0]
    assert step == 2
    assert loaded[1] == measured[1]
    assert loaded[0].keys() == measured[0].keys()
    assert all(torch.equal(tensor, measured[0][key]) for key, tensor in loaded[0].items())


@pytest.mark.soak
@pytest.mark.parametrize("name", ["fsdp", "1f1b", *(["ddp", "zero-1", "zero-3"] if SOAK else [])])
def test_averaged_weights_are_the_same_under_every_strategy(
    name: str, folder: Path, averaged_alone: Trained
) -> None:
    size, settings = STRATEGIES[name]
    settings = {**settings, "ema": {"decay": 0.9}}
    found = _train(folder, f"{name}-averaged", size, "llama", settings, steps=8, evaluate_at=5)[0]
    _assert_same(found, averaged_alone, losses=1e-5, weights=1e-4)


IMAGES = {
    "fsdp": (2, {"parallel": "fsdp", "micro_batch": 4}),
    "zero-3-channels-last": (
        2,
        {"parallel": "deepspeed", "micro_batch": 4, "deepspeed": {"stage": 3}, "channels_last": True},
    ),
}


if SOAK:
    IMAGES["ddp"] = (2, {"parallel": "ddp", "micro_batch": 4})
    IMAGES["ddp-4"] = (4, {"parallel": "ddp", "micro_batch": 4})
    IMAGES["fsdp-channels-last"] = (2, {"parallel": "fsdp", "micro_batch": 4, "channels_last": True})


@pytest.fixture(scope="module")
def resnet_alone(folder: Path) -> Trained:
    return _train(folder, "resnet-alone", 1, "resnet", {"micro_batch": 4}, batch_size=16)[0]


@pytest.mark.soak
@pytest.mark.parametrize("name", IMAGES)
def test_a_resnet_on_the_same_micro_batches_has_one_curve(
    name: str, folder: Path, resnet_alone: Trained
) -> None:
    size, settings = IMAGES[name]
    found = _train(folder, f"resnet-{name}", size, "resnet", settings, batch_size=16)[0]
    _assert_same(found, resnet_alone, losses=1e-5, weights=1e-4)


def _gradient(folder: Path, name: str, size: int, settings: dict[str, Any]) -> dict[str, torch.Tensor]:
    return ranks.run(strategies_run.gradient, size, folder, folder, f"gradient-{name}", settings)[0]


@pytest.fixture(scope="module")
def gradient_alone(folder: Path) -> dict[str, torch.Tensor]:
    """Of the single process, the batch not cut."""
    return _gradient(folder, "alone", 1, {"clip_norm": None})


@pytest.mark.parametrize("size", [1, 2])
def test_however_a_batch_is_cut_its_gradient_is_the_same(
    size: int, tmp_path: Path, gradient_alone: dict[str, torch.Tensor]
) -> None:
    """By plain SGD with a rate of 1 the weights after one step are those before less the gradient."""
    cuts = ranks.run(strategies_run.gradients_of_parts, size, tmp_path, tmp_path, (8, 4, 2, 1, 3))[0]
    for micro_batch, cut in cuts.items():
        for name, gradient in gradient_alone.items():
            torch.testing.assert_close(cut[name], gradient, atol=2e-6, rtol=1e-5, msg=f"{micro_batch} {name}")


def test_a_parameter_may_have_a_gradient_on_one_rank_only(folder: Path) -> None:
    """In a loop that does its own backward passes; one that has none on any rank is left as it is."""
    found = [ranks.run(strategies_run.own_loop, size, folder, folder / str(size))[0] for size in (1, 2)]
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor, msg=name)


def test_fsdp_leaves_a_frozen_scalar_whole_and_refuses_one_that_is_trained(tmp_path: Path) -> None:
    replicated, sharded = (
        ranks.run(strategies_run.with_a_scalar, 2, tmp_path, tmp_path, strategy)[0]
        for strategy in ("ddp", "fsdp")
    )
    torch.testing.assert_close(sharded[0], replicated[0])
    assert replicated[0]["scale"].shape == ()
    assert replicated[1] == ""
    assert sharded[1].startswith("scale is a scalar, which FSDP cannot divide among ranks")


def test_a_gradient_penalty_that_fsdp_cannot_compute_is_said(tmp_path: Path) -> None:
    said = [
        ranks.run(strategies_run.with_a_gradient_penalty, 2, tmp_path, tmp_path, strategy)[0]
        for strategy in ("ddp", "fsdp")
    ]
    assert said[0] == ""
    assert "a loss with a gradient of a gradient" in said[1]
    assert said[1].endswith("use parallel=ddp")


def test_ranks_agree_after_each_update_of_a_step_and_on_metrics_that_are_reduced(tmp_path: Path) -> None:
    first, second = ranks.run(strategies_run.of_several_updates, 2, tmp_path, tmp_path)
    assert first[:2] == second[:2] == ([2, 4], [False, True, True, True])
    assert first[2] == {"val_loss": 2.0}, "the mean of -4 and 8"


def test_gradients_of_a_trainer_are_those_of_plain_torch(folder: Path) -> None:
    """Of the mean over all tokens that count, whatever rows they are in."""
    expected = strategies_run.plain_gradient()
    for name, gradient in _gradient(folder, "two", 2, {"clip_norm": None}).items():
        torch.testing.assert_close(gradient, expected[name], atol=2e-6, rtol=1e-5, msg=name)


def test_a_gradient_that_is_not_finite_changes_nothing_on_any_rank(tmp_path: Path) -> None:
    """Of one rank alone, and with a loss that is finite: each strategy leaves out the step."""
    bad = strategies_run.with_a_bad_gradient
    (alone,) = ranks.run(bad, 1, tmp_path, tmp_path, "alone", {})
    for name in ("fsdp", "1f1b", "zero-2", "zero-3", *(("ddp", "zero-0", "zero-1") if SOAK else ())):
        size, settings = STRATEGIES[name]
        for losses in ranks.run(bad, size, tmp_path, tmp_path, name, settings):
            assert losses == pytest.approx(alone, rel=1e-5), name


@pytest.mark.soak
def test_a_clipped_norm_is_that_of_all_shards_and_stages(folder: Path) -> None:
    expected = strategies_run.plain_gradient()
    norm = torch.sqrt(sum(g.square().sum() for g in expected.values()))
    for name in ("pipeline-x-fsdp", "zero-2", "zero-3", *(("fsdp", "1f1b") if SOAK else ())):
        size, settings = STRATEGIES[name]
        found = _gradient(folder, name, size, {**settings, "clip_norm": norm.item() / 4})
        for key, gradient in expected.items():
            torch.testing.assert_close(found[key], gradient / 4, atol=2e-6, rtol=1e-4, msg=f"{name} {key}")


@pytest.mark.parametrize(("size", "parallel"), [(1, "single"), (2, "ddp")])
def test_complex_weights_are_those_of_plain_torch_and_go_on(size: int, parallel: str, tmp_path: Path) -> None:
    plain = strategies_run.Fourier()
    optimizer = torch.optim.Adam(plain.parameters(), lr=0.1)
    averages = [p.detach().clone() for p in plain.parameters()]
    x, y = strategies_run.shifted().tensors
    for _ in range(6):
        optimizer.zero_grad()
        (plain(x) - y).square().sum().div(len(x)).backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
        averages = [a.lerp(p.detach(), 0.5) for a, p in zip(averages, plain.parameters(), strict=True)]
    for steps in (3, 6):
        found = ranks.run(
            strategies_run.complex_weights, size, tmp_path, tmp_path, "a", steps, parallel=parallel
        )
    for (name, expected), average in zip(plain.named_parameters(), averages, strict=True):
        torch.testing.assert_close(found[0][0][name], expected.detach(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found[0][1][name], average, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("parallel", ["fsdp", "deepspeed"])
def test_complex_weights_are_refused_where_they_would_lose_a_part(parallel: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="filter is complex"):
        ranks.run(strategies_run.complex_weights, 1, tmp_path, tmp_path, "a", 1, parallel=parallel)
