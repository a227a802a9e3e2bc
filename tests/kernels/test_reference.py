"""The reference backend against the formulas written down plainly in double precision, and its own fallbacks."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import Tensor

from quantspec.kernels import invariance
from quantspec.kernels.reference import (
    BLOCKS,
    SINGLE,
    WHOLE,
    Linear,
    attend,
    attend_fast,
    attend_singly,
    rms_norm,
    rotate,
    swiglu,
)
from quantspec.kernels.spans import make_spans, round_up
from quantspec.types import Batch

CPU = torch.device("cpu")
TREE = (-1, -1, 0, 0, 1, 2, 2, 5, 7, 8)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def plain_attention(
    q: Tensor, keys: Tensor, values: Tensor, cached: int, parents: tuple[int, ...], window: int | None
) -> Tensor:
    """Row by row over each path, in double precision."""
    group, rows = q.shape[1] // keys.shape[0], []
    for i, path in enumerate(Batch.of([(parents, parents)], [cached]).ancestors()):
        slots = [*range(cached), *(cached + j for j in path)][-(window or 10**9) :]
        heads = []
        for head in range(q.shape[1]):
            k, v = keys[head // group, slots].double(), values[head // group, slots].double()
            heads.append((k @ q[i, head].double()).softmax(0) @ v)
        rows.append(torch.cat(heads))
    return torch.stack(rows)


@pytest.mark.parametrize("window", [None, 1, 6, 140])
@pytest.mark.parametrize(
    "cached,parents",
    [(0, (-1,)), (0, tuple(range(-1, 20))), (125, TREE), (130, TREE), (300, (-1, 0, 1)), (5, (-1,) * 5)],
)
def test_attention(cached: int, parents: tuple[int, ...], window: int | None) -> None:
    heads, kv_heads, d = 6, 2, 16
    n, slots = len(parents), round_up(cached + len(parents), 16)
    q, keys, values = randn(n, heads, d), randn(kv_heads, slots, d, seed=1), randn(kv_heads, slots, d, seed=2)
    expected = plain_attention(q, keys, values, cached, parents, window)
    (span,) = make_spans(cached, parents, window, heads // kv_heads, CPU)
    for kernel in (attend, attend_singly, attend_fast):
        # fp32 rounding over a few hundred keys is about 1e-6; a key too many or too few shows above 1e-3.
        assert float((kernel(q, keys, values, span) - expected).abs().max()) < 1e-5
    assert window is not None or torch.equal(attend(q, keys, values, span), attend_singly(q, keys, values, span))


def test_a_long_chain_is_cut_into_tiles() -> None:
    q, keys, values = randn(300, 2, 16), randn(1, 320, 16, seed=1), randn(1, 320, 16, seed=2)
    spans = make_spans(5, tuple(range(-1, 299)), None, 2, CPU)
    assert [span.rows for span in spans] == [slice(0, 128), slice(128, 256), slice(256, 300)]
    rows = torch.cat([attend(q[span.rows], keys, values, span) for span in spans])
    expected = plain_attention(q, keys, values, 5, tuple(range(-1, 299)), None)
    assert float((rows - expected).abs().max()) < 1e-5


def test_slots_that_no_row_attends_do_not_matter() -> None:
    """Stale rows lie past every sequence; their content must change no bit."""
    q, keys, values = randn(3, 2, 16), randn(1, 32, 16, seed=1), randn(1, 32, 16, seed=2)
    (span,) = make_spans(4, (-1, 0, 0), None, 2, CPU)
    before = attend(q, keys, values, span)
    keys[:, 7:], values[:, 7:] = 9.0, -9.0
    assert torch.equal(attend(q, keys, values, span), before)


@pytest.mark.parametrize("tiling", [WHOLE, BLOCKS, SINGLE])
@pytest.mark.parametrize("bias", [True, False])
def test_linear(tiling: object, bias: bool) -> None:
    weight, x, b = randn(24, 40), randn(20, 40, seed=1), randn(24, seed=2) if bias else None
    linear = Linear(weight, b)
    linear.tiling = tiling
    expected = torch.nn.functional.linear(x.double(), weight.double(), None if b is None else b.double())
    assert float((linear(x) - expected).abs().max()) < 1e-5  # 40 products of size 1


def test_elementwise_operations() -> None:
    x, weight = randn(5, 32), randn(32, seed=1)
    expected = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight
    assert float((rms_norm(x, weight, 1e-5) - expected).abs().max()) < 1e-5
    gate, up = (20 * randn(4, 64, seed=2)).chunk(2, dim=-1)  # wide enough to reach both ends of the gate
    expected = torch.nn.functional.silu(gate.double()) * up
    assert torch.allclose(swiglu(torch.cat((gate, up), -1)).double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(swiglu(torch.tensor([[-200.0, 3.0]])), torch.tensor([[-0.0]]))  # exp overflows to infinity there

    angle = torch.tensor(math.pi / 3)
    cos, sin = angle.cos().expand(1, 1, 2), torch.stack((-angle.sin(), angle.sin())).view(1, 1, 2)
    turned = rotate(torch.tensor([[[1.0, 0.0]]]), cos, sin)
    assert torch.allclose(turned, torch.tensor([[[0.5, math.sqrt(0.75)]]]))


def test_tilings_are_chosen_by_what_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A matmul whose bits depend on the width is caught, and the surer tilings are taken."""
    linear, plain = Linear(randn(16, 32)), torch.mm
    assert invariance.choose_tiling(linear) == WHOLE

    def by_width(x: Tensor, weight: Tensor) -> Tensor:
        return plain(x, weight) * (1 + x.shape[0] * 1e-4)

    monkeypatch.setattr(torch, "mm", by_width)
    assert invariance.choose_tiling(linear) == BLOCKS

    def by_neighbours(x: Tensor, weight: Tensor) -> Tensor:
        return plain(x, weight) + x.sum() * 1e-3

    monkeypatch.setattr(torch, "mm", by_neighbours)
    assert invariance.choose_tiling(linear) == SINGLE


def test_checks_see_operations_that_depend_on_the_width(monkeypatch: pytest.MonkeyPatch) -> None:
    like = torch.empty(0)
    assert invariance.attention_is_invariant(4, 2, 16, like)
    assert invariance.elementwise_is_invariant(64, 96, like)
    monkeypatch.setattr(invariance, "attend", attend_fast)
    monkeypatch.setattr(invariance, "rms_norm", lambda x, weight, eps: rms_norm(x, weight, eps) + x.shape[0] * 1e-6)
    assert not invariance.attention_is_invariant(4, 2, 16, like)
    assert not invariance.elementwise_is_invariant(64, 96, like)


def test_random_trees_equal_their_paths() -> None:
    rng = random.Random(0)
    keys, values = randn(2, 320, 16, seed=1), randn(2, 320, 16, seed=2)
    for cached in (0, 1, 100, 127, 128, 190, 255):
        parents = tuple(rng.randrange(max(-1, i - 4), i) for i in range(64))
        q = randn(64, 4, 16, seed=cached)
        (span,) = make_spans(cached, parents, None, 2, CPU)
        assert torch.equal(attend(q, keys, values, span), attend_singly(q, keys, values, span))
