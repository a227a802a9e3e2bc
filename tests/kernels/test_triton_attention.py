"""Triton's attention over prefix and tree against the eager reference in fp64; and its rows, bit by bit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from quantspec.kernels import reference
from quantspec.kernels.spans import make_spans

attention = pytest.importorskip("quantspec.kernels.triton.attention", reason="triton is not installed")
rows_of = pytest.importorskip("quantspec.kernels.triton.rows", reason="triton is not installed").Rows.of

pytestmark = [pytest.mark.usefixtures("triton_device"), pytest.mark.filterwarnings("ignore::RuntimeWarning")]

CHAIN, TREE, STAR = tuple(range(-1, 4)), (-1, -1, 0, 0, 2, 4), (-1,) * 4

# Weighted means of about 500 values of size 1, each weight off by the rounding of a score of up to 5, and of the
# weight itself, to the dtype of the cache (the interpreter cuts to bf16, which doubles that).
TOLERANCE = {torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 3e-2}


def make(heads: int, kv_heads: int, d: int, cached: int, n: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    slots = cached + n + 5
    sizes = (n, heads, d), (kv_heads, slots, d), (kv_heads, slots, d)
    q, keys, values = (torch.randn(size).to(dtype) for size in sizes)
    return [q * d**-0.5, keys, values]


def assert_near(
    out: Tensor, q: Tensor, keys: Tensor, values: Tensor, rows: object, window: int | None = None, atol: float = 0.0
) -> None:
    exact = attention.eager_attention(q.double(), keys.double(), values.double(), rows, window)
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=atol or TOLERANCE[out.dtype], equal_nan=True)


@pytest.mark.parametrize(
    "heads, kv_heads, d, cached, parents",
    [
        (4, 1, 64, 0, CHAIN),  # an empty prefix
        (3, 3, 80, 1, TREE),  # multi-head attention, a size that is no power of two
        (6, 2, 128, 254, TREE),  # paths across the end of a chunk
        (5, 1, 16, 256, STAR),  # a whole chunk of prefix, and rows with one entry after it
        (20, 1, 64, 515, (-1,)),  # more query heads per key head than the least tile
    ],
)
def test_attention(
    heads: int, kv_heads: int, d: int, cached: int, parents: Sequence[int],
    triton_device: torch.device, launches: Callable[..., Counter[str]],
) -> None:  # fmt: skip
    counts = launches(attention, "_attend_chunk", "_combine")
    q, keys, values = make(heads, kv_heads, d, cached, len(parents))
    rows = rows_of(parents, cached, triton_device)
    out = attention.attention(q, keys, values, rows)
    assert out.shape == (len(parents), heads * d)
    assert_near(out, q, keys, values, rows)
    assert counts == {"_attend_chunk": 1, "_combine": 1}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_caches_of_16_bits(dtype: torch.dtype, triton_device: torch.device) -> None:
    q, keys, values = make(4, 1, 80, 254, len(TREE), dtype)
    rows = rows_of(TREE, 254, triton_device)
    assert_near(attention.attention(q, keys, values, rows), q, keys, values, rows)


@pytest.mark.parametrize("window", [1, 2, 3, 200, 257, 10_000])
def test_window(window: int, triton_device: torch.device) -> None:
    """Windows smaller than the tree, that begin within a chunk, leave whole chunks behind, or reach past all."""
    q, keys, values = make(3, 1, 16, 510, len(TREE))
    rows = rows_of(TREE, 510, triton_device)
    assert_near(attention.attention(q, keys, values, rows, window), q, keys, values, rows, window)


@pytest.mark.parametrize("window", [None, 3, 100])
def test_agrees_with_the_reference_backend(window: int | None, triton_device: torch.device) -> None:
    q, keys, values = make(4, 2, 16, 266, len(TREE) + 3)  # 280 slots and more, as the reference reads them by 16
    q = q[: len(TREE)].clone()
    (span,) = make_spans(266, TREE, window, 2, triton_device)
    out = attention.attention(q, keys, values, rows_of(TREE, 266, triton_device), window)
    torch.testing.assert_close(out, reference.attend(q, keys, values, span), rtol=0, atol=2 * TOLERANCE[torch.float32])


def alone(
    q: Tensor, keys: Tensor, values: Tensor, path: list[int], cached: int, decoded: int, window: int | None
) -> Tensor:
    """The last row of a path whose first ``decoded`` rows are in the cache already, the rest forming a chain."""
    slots = torch.arange(keys.shape[1])
    slots[cached : cached + len(path)] = cached + torch.tensor(path)
    rows = rows_of(range(-1, len(path) - decoded - 1), cached + decoded, q.device)
    mine = q[torch.tensor(path[decoded:])].clone()
    return attention.attention(mine, keys[:, slots].clone(), values[:, slots].clone(), rows, window)[-1]


@pytest.mark.parametrize("cached, window", [(0, None), (253, None), (300, 3), (511, 250)])
def test_a_node_has_the_bits_of_its_path_alone(cached: int, window: int | None, triton_device: torch.device) -> None:
    q, keys, values = make(5, 1, 20, cached, len(TREE), torch.float16)
    rows = rows_of(TREE, cached, triton_device)
    out = attention.attention(q, keys, values, rows, window)
    for i, depth in enumerate(rows.depths.tolist()):
        path = rows.paths[i, : depth + 1].tolist()
        for decoded in {0, depth}:
            assert torch.equal(alone(q, keys, values, path, cached, decoded, window), out[i]), (i, decoded)


def test_a_row_has_the_same_bits_at_any_width(triton_device: torch.device) -> None:
    q, keys, values = make(3, 1, 16, 260, 13, torch.float16)
    whole = attention.attention(q, keys, values, rows_of(range(-1, 12), 260, triton_device))
    for n in (1, 2, 6, 11):
        rows = rows_of(range(-1, n - 1), 260, triton_device)
        assert torch.equal(attention.attention(q[:n].clone(), keys, values, rows), whole[:n])


def test_neither_room_nor_what_lies_in_it_matters(triton_device: torch.device) -> None:
    q, keys, values = make(2, 1, 16, 40, len(TREE))
    rows = rows_of(TREE, 40, triton_device)
    out = attention.attention(q, keys, values, rows)
    roomy = [torch.cat((kv, torch.full((1, 800, 16), torch.nan)), 1) for kv in (keys, values)]
    assert torch.equal(attention.attention(q, *roomy, rows), out)


def test_saturated_values(triton_device: torch.device) -> None:
    """Scores whose exponentials leave fp32, values at the end of fp16, and one key that takes all the weight."""
    q, keys, values = make(2, 1, 16, 300, len(TREE))
    rows = rows_of(TREE, 300, triton_device)
    keys[:, 17] *= 1e4
    q *= 50
    # Scores of about 200, off by roundings of 6e-8 each, and values of up to 4.
    assert_near(attention.attention(q, keys, values, rows), q, keys, values, rows, atol=1e-4)
    half = [part.clamp(-65504, 65504).half() for part in (q / 50, keys, torch.full_like(values, 65504.0))]
    assert (attention.attention(*half, rows) == 65504).all()


@pytest.mark.parametrize("fault", [float("nan"), float("inf")])
def test_a_fault_reaches_just_the_rows_that_attend_it(fault: float, triton_device: torch.device) -> None:
    cached, window = 520, 262
    q, keys, values = make(2, 1, 16, cached, len(TREE), torch.float16)
    rows = rows_of(TREE, cached, triton_device)
    clean = attention.attention(q, keys, values, rows, window)
    for slot in (259, 260, cached + 2):  # left behind by deeper rows; an ancestor of some
        faulty = values.clone()
        faulty[:, slot] = fault
        hit = ~attention.eager_attention(q, keys, faulty, rows, window).isfinite().all(-1)
        out = attention.attention(q, keys, faulty, rows, window)
        assert hit.any()
        assert not hit.all()
        assert not out[hit].isfinite().any()
        assert torch.equal(out[~hit], clean[~hit])


def test_arguments_are_checked(triton_device: torch.device) -> None:
    q, keys, values = make(4, 2, 16, 3, len(TREE))
    rows = rows_of(TREE, 3, triton_device)
    with pytest.raises(AssertionError, match="as many query heads"):
        attention.attention(q[:, :3].clone(), keys, values, rows)
    with pytest.raises(AssertionError, match="one dtype"):
        attention.attention(q.half(), keys, values, rows)
    with pytest.raises(AssertionError, match="gaps"):
        attention.attention(q, keys[:, ::2], values[:, ::2], rows)
    with pytest.raises(AssertionError, match="at least one key"):
        attention.attention(q, keys, values, rows, 0)
