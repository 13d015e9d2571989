"""Chunked cross-entropy against torch's own."""

from __future__ import annotations

import pytest
import torch
from stoker.language import cross_entropy
from stoker.language.cross_entropy import linear_cross_entropy
from torch.nn import functional as F

VOCABULARY, WIDTH = 97, 16
Made = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def problem(masked: float) -> Made:
    torch.manual_seed(0)
    hidden = torch.randn(2, 25, WIDTH, requires_grad=True)
    weight = torch.randn(VOCABULARY, WIDTH, requires_grad=True)
    bias = torch.randn(VOCABULARY, requires_grad=True)
    labels = torch.randint(0, VOCABULARY, (2, 25))
    labels[torch.rand(2, 25) < masked] = -100
    return hidden, weight, bias, labels


@pytest.mark.parametrize("rows", [1, 7, 1000])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("masked", [0.0, 0.4])
def test_value_and_gradients_are_those_of_torch(rows: int, with_bias: bool, masked: float) -> None:
    hidden, weight, bias, labels = problem(masked)
    used = [hidden, weight, bias] if with_bias else [hidden, weight]
    logits = F.linear(hidden, weight, bias if with_bias else None)
    plain = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
    ours = linear_cross_entropy(
        hidden, weight, labels, bias=bias if with_bias else None, chunk_bytes=4 * VOCABULARY * rows
    )
    torch.testing.assert_close(ours, plain, rtol=1e-6, atol=0)
    for a, b in zip(torch.autograd.grad(3 * ours, used), torch.autograd.grad(3 * plain, used), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 1000])
def test_with_every_token_masked_it_is_zero(rows: int) -> None:
    hidden, weight, bias, labels = problem(1.0)
    total = linear_cross_entropy(hidden, weight, labels.fill_(-100), bias=bias, chunk_bytes=388 * rows)
    assert total.item() == 0.0
    for gradient in torch.autograd.grad(total, [hidden, weight, bias]):
        assert not gradient.any()


def test_a_frozen_head_gets_no_gradient() -> None:
    hidden, weight, _, labels = problem(0.4)
    total = linear_cross_entropy(hidden, weight.detach(), labels, chunk_bytes=388 * 7)
    total.backward()
    assert hidden.grad is not None
    assert weight.grad is None


def test_without_gradients_it_computes_none(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, bias, labels = problem(0.4)
    with torch.no_grad(), monkeypatch.context() as patched:
        patched.delattr(cross_entropy, "_add_product")
        ours = linear_cross_entropy(hidden, weight, labels, bias=bias, chunk_bytes=388 * 7)
    assert not ours.requires_grad
    whole = linear_cross_entropy(hidden, weight, labels, bias=bias)
    torch.testing.assert_close(ours, whole.detach(), rtol=1e-6, atol=0)


def test_under_autocast_products_are_of_its_dtype_and_the_loss_is_float32() -> None:
    hidden, weight, _, labels = problem(0.4)
    exact = linear_cross_entropy(hidden, weight, labels)
    for rows in (7, 1000):
        with torch.autocast("cpu", torch.bfloat16):
            half = linear_cross_entropy(hidden, weight, labels, chunk_bytes=388 * rows)
        assert half.dtype == torch.float32
        torch.testing.assert_close(half, exact, rtol=1e-2, atol=0)
        (gradient,) = torch.autograd.grad(half, weight)
        assert gradient.dtype == torch.float32
        expected = torch.autograd.grad(exact, weight, retain_graph=True)[0]
        assert F.cosine_similarity(gradient.flatten(), expected.flatten(), 0) > 0.999


def test_it_holds_a_fraction_of_the_memory_at_a_large_vocabulary() -> None:
    """The most that is allocated at once, by torch's own count, forward and backward."""
    torch.manual_seed(0)
    hidden = torch.randn(1024, 32, requires_grad=True)
    weight = torch.randn(32_000, 32, requires_grad=True)
    labels = torch.randint(0, 32_000, (1024,))

    def peak(total: bool) -> int:
        hidden.grad = weight.grad = None
        with torch.profiler.profile(profile_memory=True) as seen:
            if total:
                loss = linear_cross_entropy(hidden, weight, labels, chunk_bytes=2**23)
            else:
                loss = F.cross_entropy(F.linear(hidden, weight), labels, reduction="sum")
            loss.backward()
        most = held = 0
        for event in seen.profiler.kineto_results.events():  # type: ignore[union-attr]
            if event.name() == "[memory]":
                held += event.nbytes()
                most = max(most, held)
        return most

    assert peak(True) < 0.35 * peak(False)
