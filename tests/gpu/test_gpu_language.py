"""Language models on a GPU: packed documents in one kernel, fused kernels, 4 bits, memory of the loss."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from stoker.language import attention, kernels, objective, quantised
from stoker.language.cross_entropy import linear_cross_entropy
from torch.nn import functional as F

import families
import support

pytestmark = support.ON_A_GPU

HALF = [torch.bfloat16, torch.float16]


def to_gpu(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.cuda() for name, value in batch.items()}


def close(ours: torch.Tensor, exact: torch.Tensor, most: float) -> None:
    apart = (ours.float() - exact.float()).norm() / exact.float().norm()
    assert apart < most, f"{apart:.2g} apart, more than {most}"


def attended(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: torch.Tensor, window: int | None, scale: float
) -> torch.Tensor:
    """By scores of the whole row under a mask, in the dtype of what is given."""
    rows, heads, seq, _ = q.shape
    k, v = (t.repeat_interleave(heads // k.shape[1], 1) for t in (k, v))
    out = q.new_zeros(rows, seq, heads, q.shape[3])
    for row in range(rows):
        begin = 0
        for n in [int(n) for n in lengths[row] if n]:
            part = slice(begin, begin + n)
            scores = q[row, :, part] @ k[row, :, part].transpose(1, 2) * scale
            seen = torch.ones(n, n, dtype=torch.bool, device=q.device).tril()
            seen = seen if window is None else seen.triu(1 - window)
            weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
            out[row, part] = (weights @ v[row, :, part]).transpose(0, 1)
            begin += n
    return out


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("key_heads", [8, 2])
def test_documents_of_all_rows_are_attended_in_one_kernel(
    dtype: torch.dtype, window: int | None, key_heads: int
) -> None:
    """Against scores in float64: the outcome, and the gradients of query, key and value."""
    torch.manual_seed(0)
    lengths = torch.tensor([[300, 1, 211], [512, 0, 0], [17, 400, 0]]).cuda()
    made = {
        name: torch.randn(3, heads, 512, 64, dtype=dtype, device="cuda", requires_grad=True)
        for name, heads in (("q", 8), ("k", key_heads), ("v", key_heads))
    }
    exact = {name: t.detach().double().requires_grad_() for name, t in made.items()}
    assert attention._varlen_takes(made["q"], made["v"], 0.0, None)
    ours, _ = attention.attend(
        torch.nn.Identity(), *made.values(), None, sliding_window=window, documents=lengths, scaling=0.2
    )
    theirs = attended(*exact.values(), lengths, window, 0.2)
    real = torch.arange(512, device="cuda") < lengths.sum(1, keepdim=True)
    close(ours[real], theirs[real], 1e-2)
    pull = torch.randn_like(theirs) * real[:, :, None, None]
    ours.backward(pull.to(dtype))
    theirs.backward(pull)
    for name, given in made.items():
        close(given.grad, exact[name].grad, 1.5e-2)


@pytest.mark.parametrize("family", families.FAMILIES)
def test_packed_documents_have_the_loss_and_gradients_of_each_alone(family: str) -> None:
    """Under autocast to bfloat16, against float32."""
    made = families.model(family).cuda().eval()
    made.set_attn_implementation(attention.NAME)
    called = objective.attach(made)
    batch = to_gpu(families.documents())
    exact, count = families.alone(made, batch), (batch["labels"][:, 1:] != -100).sum()
    exact.backward()
    theirs = torch.cat([p.grad.flatten() for p in made.parameters()])
    made.zero_grad()
    with torch.autocast("cuda", torch.bfloat16):
        total, counted = called.loss(made(**called.inputs(batch)), batch)
    total.backward()
    ours = torch.cat([p.grad.flatten() for p in made.parameters()])
    assert counted == count
    assert total.item() == pytest.approx(exact.item(), rel=2e-2)
    assert F.cosine_similarity(ours, theirs, 0) > 0.97


def test_attention_within_documents_never_waits_for_the_device() -> None:
    query = torch.randn(2, 4, 64, 32, dtype=torch.bfloat16, device="cuda")
    documents = torch.tensor([[30, 34], [60, 0]]).cuda()
    attention.attend(torch.nn.Identity(), query, query, query, None, documents=documents)
    with support.never_waiting():
        attention.attend(torch.nn.Identity(), query, query, query, None, documents=documents)


@pytest.mark.skipif(importlib.util.find_spec("liger_kernel") is None, reason="liger-kernel is not installed")
@pytest.mark.parametrize(
    "family", ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi3"]
)
def test_fused_kernels_have_the_loss_and_gradients_of_torch(family: str) -> None:
    batch = to_gpu(families.documents())
    found = []
    for which in ("torch", "liger"):
        made = families.model(family).cuda()
        made.set_attn_implementation(attention.NAME)
        called = objective.attach(made)
        plain = type(made.model.norm).forward
        kernels.use(made, which)
        replaced = made.model.norm.forward.__func__ is not plain
        assert replaced == (which == "liger")
        total, _ = called.loss(made(**called.inputs(batch)), batch)
        total.backward()
        found.append((total.item(), torch.cat([p.grad.flatten() for p in made.parameters()])))
    (exact, theirs), (loss, ours) = found
    assert loss == pytest.approx(exact, rel=1e-4)
    close(ours, theirs, 1e-3)


def test_the_loss_holds_a_fraction_of_the_memory_at_a_large_vocabulary() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(8192, 256, device="cuda", requires_grad=True)
    weight = torch.randn(128_000, 256, device="cuda", requires_grad=True)
    labels = torch.randint(0, 128_000, (8192,), device="cuda")

    def of(chunked: bool) -> tuple[float, torch.Tensor, int]:
        hidden.grad = weight.grad = None
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        if chunked:
            loss = linear_cross_entropy(hidden, weight, labels)
        else:
            loss = F.cross_entropy(F.linear(hidden, weight), labels, reduction="sum")
        loss.backward()
        return loss.item(), weight.grad.clone(), torch.cuda.max_memory_allocated() - before

    (ours, gradient, peak), (theirs, exact, whole) = of(True), of(False)
    assert ours == pytest.approx(theirs, rel=1e-5)
    close(gradient, exact, 1e-4)
    assert peak < 0.25 * whole


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_a_layer_in_4_bits_computes_what_it_says() -> None:
    torch.manual_seed(0)
    plain = torch.nn.Linear(256, 128, dtype=torch.bfloat16, device="cuda")
    layer = quantised.Linear4bit(plain)
    layer.take(plain.weight.detach())
    layer.bias = plain.bias
    x = torch.randn(8, 256, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    out = layer(x)
    close(out, plain(x), 0.15)
    out.sum().backward()
    assert x.grad.isfinite().all()
    assert layer.weight.nbytes + layer.scales.nbytes < 0.3 * plain.weight.nbytes
