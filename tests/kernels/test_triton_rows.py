"""Triton's row-wise kernels (norm, SwiGLU, RoPE with cache write, cache commit) against their eager references."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from quantspec.types import Batch

norm = pytest.importorskip("quantspec.kernels.triton.norm", reason="triton is not installed")
swiglu = pytest.importorskip("quantspec.kernels.triton.swiglu", reason="triton is not installed")
rope = pytest.importorskip("quantspec.kernels.triton.rope", reason="triton is not installed")
cache = pytest.importorskip("quantspec.kernels.triton.cache", reason="triton is not installed")
rows_of = pytest.importorskip("quantspec.kernels.triton.rows", reason="triton is not installed").Rows.of

pytestmark = [pytest.mark.usefixtures("triton_device"), pytest.mark.filterwarnings("ignore::RuntimeWarning")]

Launches = Callable[..., Counter[str]]

# One unit in the last place of the result, which the interpreter cuts to bf16 instead of rounding, and in fp32 a
# handful of roundings (6e-8 each) of exp, rsqrt and a sum over at most 300 columns.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
DTYPES = list(TOLERANCE)
TREE = (-1, 0, 0, 1, 2, 2)


def assert_near(actual: Tensor, expected: Tensor) -> None:
    rtol = TOLERANCE[actual.dtype]
    torch.testing.assert_close(actual.double(), expected.double(), rtol=rtol, atol=rtol * 0.1, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm(dtype: torch.dtype, launches: Launches) -> None:
    counts = launches(norm, "_rms_norm")
    for n, width in ((1, 1), (3, 37), (5, 64), (2, 300)):
        x, weight = torch.randn(n, width).to(dtype), torch.randn(width).to(dtype)
        normed, total = norm.rms_norm(x, weight, 1e-5)
        assert total is x
        assert_near(normed, norm.eager_rms_norm(x, weight, 1e-5)[0])
        residual = torch.randn(n, width).to(dtype)
        normed, total = norm.rms_norm(x, weight, 1e-5, residual)
        expected, exact_total = norm.eager_rms_norm(x, weight, 1e-5, residual)
        assert_near(total, exact_total)
        # Of the sum as it was rounded, so that the two do not differ by what the rounding made of it.
        assert_near(normed, norm.eager_rms_norm(total, weight, 1e-5)[0])
        assert expected.shape == normed.shape
    assert counts["_rms_norm"] == 8


def test_rms_norm_of_extreme_rows() -> None:
    ones = torch.ones(40)
    rows = torch.tensor([0.0, 1e-30, 1e18, 1e30, torch.inf, torch.nan])[:, None].expand(6, 40).contiguous()
    # 1e30 squared leaves fp32, and the row becomes zero; infinity times that zero is no number.
    expected = torch.tensor([0.0, 0.0, 1.0, 0.0, torch.nan, torch.nan])[:, None].expand(6, 40)
    assert_near(norm.rms_norm(rows, ones, 1e-5)[0], expected)
    most = torch.full((1, 8), 65504.0, dtype=torch.float16)
    normed, total = norm.rms_norm(most, torch.ones(8, dtype=torch.float16), 1e-5)
    assert_near(normed, torch.ones(1, 8))
    assert total is most
    _, total = norm.rms_norm(most, torch.ones(8, dtype=torch.float16), 1e-5, most)
    assert total.isinf().all(), "fp16 ends at 65504"


@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu(dtype: torch.dtype, launches: Launches) -> None:
    counts = launches(swiglu, "_swiglu")
    for n, width in ((1, 1), (3, 37), (1, 1025)):
        gate_up = (4 * torch.randn(n, 2 * width)).to(dtype)
        assert_near(swiglu.swiglu(gate_up), swiglu.eager_swiglu(gate_up))
    assert counts["_swiglu"] == 3


def test_swiglu_where_the_exponential_leaves_fp32() -> None:
    gates = torch.tensor([0.0, 80.0, 100.0, 1e30, -87.0, -89.0, -1000.0, -1e30, torch.nan])
    out = swiglu.swiglu(torch.cat((gates, torch.ones(9)))[None])[0]
    assert_near(out, torch.nn.functional.silu(gates.double()))


def test_elementwise_rows_have_the_same_bits_at_any_width() -> None:
    x, residual, gate_up, weight = torch.randn(9, 80), torch.randn(9, 80), torch.randn(9, 96), torch.randn(80)
    normed, gated = norm.rms_norm(x, weight, 1e-5, residual)[0], swiglu.swiglu(gate_up)
    for part in (slice(0, 1), slice(3, 5), slice(2, 9)):
        rows = x[part].clone(), residual[part].clone()
        assert torch.equal(norm.rms_norm(rows[0], weight, 1e-5, rows[1])[0], normed[part])
        assert torch.equal(swiglu.swiglu(gate_up[part].clone()), gated[part])


def rope_case(heads: int, kv_heads: int, d: int, cached: int, parents: Sequence[int]) -> tuple[Tensor, ...]:
    slots = cached + len(parents) + 3
    angles = torch.arange(slots)[:, None] * torch.rand(d // 2)
    cos, sin = angles.cos().repeat(1, 2), torch.cat((-angles.sin(), angles.sin()), 1)
    return torch.randn(len(parents), heads + 2 * kv_heads, d), cos, sin, torch.randn(2 * kv_heads, slots, d)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads, kv_heads, d, cached", [(3, 1, 64, 0), (5, 5, 80, 7), (6, 2, 128, 300)])
def test_rope(
    dtype: torch.dtype, heads: int, kv_heads: int, d: int, cached: int, triton_device: torch.device, launches: Launches
) -> None:
    counts = launches(rope, "_rope")
    qkv, cos, sin, kv = (part.to(dtype) for part in rope_case(heads, kv_heads, d, cached, TREE))
    rows = rows_of(TREE, cached, triton_device)
    for weights in (None, torch.randn(heads + kv_heads, d).to(dtype)):
        written, expected_kv = kv.clone(), kv.clone()
        q = rope.rope(qkv, cos, sin, rows, written, weights, 1e-6)
        assert_near(q, rope.eager_rope(qkv, cos, sin, rows, expected_kv, weights, 1e-6))
        assert_near(written, expected_kv)
        own = slice(cached, cached + len(TREE))
        assert torch.equal(written[kv_heads:, own], qkv[:, heads + kv_heads :].transpose(0, 1)), (
            "values stay as they are"
        )
        written[:, own] = kv[:, own]
        assert torch.equal(written, kv), "another slot was written"
    assert counts["_rope"] == 2


def test_rope_rows_have_the_same_bits_in_a_tree_and_alone(triton_device: torch.device) -> None:
    qkv, cos, sin, kv = rope_case(3, 1, 64, 20, TREE)
    rows, together = rows_of(TREE, 20, triton_device), kv.clone()
    q = rope.rope(qkv, cos, sin, rows, together)
    for i, depth in enumerate(rows.depths.tolist()):
        alone = kv.clone()
        row = rope.rope(qkv[i : i + 1].clone(), cos, sin, rows_of((-1,), 20 + depth, triton_device), alone)
        assert torch.equal(row[0], q[i])
        assert torch.equal(alone[:, 20 + depth], together[:, 20 + i])


@pytest.mark.parametrize(
    "accepted",
    [(0, 1, 2), (0, 2, 5), (1, 2, 3), (3,), (), tuple(range(1, 34)), (0, 4, 5, 6, 20, 33)],
    ids=lambda accepted: f"{len(accepted)} rows",
)
def test_commit(accepted: Sequence[int], launches: Launches) -> None:
    counts = launches(cache, "_commit")
    kv = torch.randn(2, 3 * 2, 50, 40)
    # As a captured graph would hand them over: always as many entries, those behind the path empty.
    rows = torch.tensor([*accepted, *(-1 for _ in range(40 - len(accepted)))], dtype=torch.int32)
    length, moved, expected = torch.tensor([11], dtype=torch.int32), kv.clone(), kv.clone()
    cache.commit(moved, length, rows)
    cache.eager_commit(expected, length, rows)
    assert torch.equal(moved, expected)
    assert torch.equal(moved[:, :, 11 : 11 + len(accepted)], kv[:, :, [11 + row for row in accepted]])
    assert counts["_commit"] == 1


def test_rows_stand_where_the_batch_says(triton_device: torch.device) -> None:
    for parents in (TREE, (-1,), (-1, 0, 1), (-1, -1, -1)):
        batch, rows = Batch.of([(range(len(parents)), parents)], [9]), rows_of(parents, 9, triton_device)
        assert tuple((rows.cached + rows.depths).tolist()) == batch.positions()
        paths = zip(rows.paths.tolist(), rows.depths.tolist(), strict=True)
        assert tuple(tuple(path[: depth + 1]) for path, depth in paths) == batch.ancestors()


def test_arguments_are_checked(triton_device: torch.device) -> None:
    x = torch.randn(4, 16)
    with pytest.raises(AssertionError, match="gaps"):
        norm.rms_norm(x[:, ::2], torch.ones(8), 1e-5)
    with pytest.raises(AssertionError, match="unaligned"):
        norm.rms_norm(torch.randn(33)[1:].view(4, 8), torch.ones(8), 1e-5)
    with pytest.raises(AssertionError, match="one dtype"):
        norm.rms_norm(x, torch.ones(16), 1e-5, x.half())
    with pytest.raises(AssertionError, match="as many gates"):
        swiglu.swiglu(torch.randn(2, 7))
    qkv, cos, sin, kv = rope_case(3, 1, 16, 4, TREE)
    with pytest.raises(AssertionError, match="shorter than the cache"):
        rope.rope(qkv, cos[:-1].clone(), sin[:-1].clone(), rows_of(TREE, 4, triton_device), kv)
    with pytest.raises(AssertionError, match="other rows"):
        rope.rope(qkv, cos, sin, rows_of((-1,), 4, triton_device), kv)
    with pytest.raises(AssertionError, match="before its child"):
        rows_of((-1, 1), 0, triton_device)
