"""Triton's kernels over keys and values in 8 and 4 bits: the oracle's bytes, and attention over what they hold."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from quantspec.numerics.kv import KVFormat

attention = pytest.importorskip("quantspec.kernels.triton.attention", reason="triton is not installed")
rope = pytest.importorskip("quantspec.kernels.triton.rope", reason="triton is not installed")
cache = pytest.importorskip("quantspec.kernels.triton.cache", reason="triton is not installed")
rows_of = pytest.importorskip("quantspec.kernels.triton.rows", reason="triton is not installed").Rows.of

pytestmark = [pytest.mark.usefixtures("triton_device"), pytest.mark.filterwarnings("ignore::RuntimeWarning")]

TREE = (-1, -1, 0, 0, 2, 4)
FORMS = [KVFormat(bits, d) for d in (18, 64, 96, 128) for bits in (8, 4)]
# The same products of the same numbers as over a cache that is not quantized, but for the last bit of one's dtype.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 3e-2}


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As few rows as end some."""
    monkeypatch.setattr(attention, "CHUNK", 64)


def encode(form: KVFormat, rows: Tensor) -> Tensor:
    """On the CPU: elsewhere torch divides by a number as it multiplies by its inverse."""
    return form.encode(rows.float().cpu()).to(rows.device)


def decode(form: KVFormat, kv: Tensor) -> Tensor:
    return form.decode(kv.cpu()).to(kv.device)


def extreme_rows(n: int, planes: int, d: int) -> Tensor:
    """Of all sizes (the interpreter does not read bf16 below 1e-38); zeros, the least number there is, ties, and what
    is not finite."""
    rows = torch.randn(n, planes, d) * torch.logspace(-36, 30, n)[:, None, None]
    rows[3], rows[7] = 0.0, 1e-45
    rows[5, :, 1], rows[6, :, 0], rows[8, :, -1] = float("nan"), float("inf"), -float("inf")
    rows[9] = torch.arange(d) % 16 - 7.5
    return rows


@pytest.mark.parametrize("form", [KVFormat(4, 2), *FORMS, KVFormat(4, 130)], ids=str)
@pytest.mark.parametrize("dtype, norm", [(torch.float32, False), (torch.bfloat16, True)], ids=str)
def test_written_bytes_are_the_oracles(
    form: KVFormat, dtype: torch.dtype, norm: bool, triton_device: torch.device
) -> None:
    """Of the rows as they are written in fp32 where nothing quantizes them."""
    n, cached, d = 12, 5, form.head_dim
    angles = torch.arange(32)[:, None] * torch.rand(d // 2)
    cos, sin = angles.cos().repeat(1, 2), torch.cat((-angles.sin(), angles.sin()), 1)
    qkv, rows = extreme_rows(n, 2 + 2 * 1, d).to(dtype), rows_of(range(-1, n - 1), cached, triton_device)
    weights = torch.randn(2 + 1, d) if norm else None
    plain, coded = torch.zeros(2, 32, d), torch.full((2, 32, form.row_bytes), 77, dtype=torch.uint8)
    q = rope.rope(qkv, cos, sin, rows, plain, weights, 1e-6)
    assert torch.equal(rope.rope(qkv, cos, sin, rows, coded, weights, 1e-6, form).nan_to_num(), q.nan_to_num())
    own = slice(cached, cached + n)
    assert torch.equal(coded[:, own], encode(form, plain[:, own]))
    assert torch.equal(coded[1:, own], encode(form, qkv[:, 3:]).transpose(0, 1)), "values were not as they came"
    coded[:, own] = 77
    assert (coded == 77).all(), "another slot was written"


def make(
    form: KVFormat, heads: int, kv_heads: int, cached: int, n: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    slots, d = cached + n + 4, form.head_dim  # rows of both are aligned
    slots = -(-slots // 16) * 16
    q = torch.randn(n, heads, d).to(dtype) * d**-0.5
    return q, *(encode(form, torch.randn(kv_heads, slots, d)) for _ in range(2))


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("dtype, window", [(torch.float32, None), (torch.float16, 66)], ids=str)
def test_attention(form: KVFormat, dtype: torch.dtype, window: int | None, triton_device: torch.device) -> None:
    q, keys, values = make(form, 3, 1, 75, len(TREE), dtype)
    rows = rows_of(TREE, 75, triton_device)
    out = attention.attention(q, keys, values, rows, window, form)
    held = [decode(form, kv).to(dtype) for kv in (keys, values)]
    torch.testing.assert_close(
        out, attention.attention(q, *held, rows, window), rtol=0, atol=TOLERANCE[dtype] / 4, equal_nan=True
    )
    exact = attention.eager_attention(q.double(), *(kv.double() for kv in held), rows, window)
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=5 * TOLERANCE[dtype])


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("cached, window", [(0, None), (61, None), (127, 60)])
def test_a_node_has_the_bits_of_its_path_alone(
    bits: int, cached: int, window: int | None, triton_device: torch.device
) -> None:
    form = KVFormat(bits, 80)
    q, keys, values = make(form, 5, 1, cached, len(TREE), torch.bfloat16)
    rows = rows_of(TREE, cached, triton_device)
    out = attention.attention(q, keys, values, rows, window, form)
    for i, depth in enumerate(rows.depths.tolist()):
        path, slots = rows.paths[i, : depth + 1].tolist(), torch.arange(keys.shape[1])
        slots[cached : cached + len(path)] = cached + torch.tensor(path)
        moved = keys[:, slots].clone(), values[:, slots].clone()
        for decoded in {0, depth}:
            mine = rows_of(range(-1, len(path) - decoded - 1), cached + decoded, triton_device)
            alone = attention.attention(q[torch.tensor(path[decoded:])].clone(), *moved, mine, window, form)
            assert torch.equal(alone[-1], out[i]), (i, decoded)


@pytest.mark.parametrize("form", [KVFormat(8, 96), KVFormat(4, 128)], ids=str)
@pytest.mark.parametrize("window", [None, 28])
def test_a_fault_reaches_just_the_rows_that_attend_it(
    form: KVFormat, window: int | None, triton_device: torch.device
) -> None:
    cached, fault = 36, torch.randn(1, form.head_dim)
    fault[0, -1] = float("nan")  # of one group, the last
    q, keys, values = make(form, 2, 1, cached, len(TREE))
    rows = rows_of(TREE, cached, triton_device)
    clean = attention.attention(q, keys, values, rows, window, form)
    assert clean.isfinite().all()
    # Left behind by deeper rows, an ancestor of some, nobody's; in keys, in values.
    for slot, faulty in ((11, 0), (11, 1), (cached + 2, 1), (cached + 7, 0)):
        kv = [keys.clone(), values.clone()]
        kv[faulty][:, slot] = encode(form, fault)
        held = [decode(form, each) for each in kv]
        hit = ~attention.eager_attention(q, *held, rows, window).isfinite().all(-1)
        out = attention.attention(q, *kv, rows, window, form)
        assert not out[hit].isfinite().all(-1).any()
        assert torch.equal(out[~hit], clean[~hit])


@pytest.mark.parametrize("accepted", [(0, 1, 2), (0, 2, 5), (3,), (), tuple(range(1, 20))])
@pytest.mark.parametrize("form", [KVFormat(8, 18), KVFormat(4, 128)], ids=str)
def test_commit_moves_bytes(accepted: Sequence[int], form: KVFormat) -> None:
    kv = torch.randint(256, (2, 4, 48, form.row_bytes), dtype=torch.uint8)
    rows = torch.tensor([*accepted, *(-1 for _ in range(24 - len(accepted)))], dtype=torch.int32)
    length, moved, expected = torch.tensor([11], dtype=torch.int32), kv.clone(), kv.clone()
    cache.commit(moved, length, rows)
    cache.eager_commit(expected, length, rows)
    assert torch.equal(moved, expected)


def test_arguments_are_checked(triton_device: torch.device) -> None:
    form = KVFormat(8, 64)
    q, keys, values = make(form, 2, 1, 3, len(TREE))
    rows = rows_of(TREE, 3, triton_device)
    with pytest.raises(AssertionError, match="a cache of other heads"):
        attention.attention(q, keys, values, rows)
    with pytest.raises(AssertionError, match="a cache of other heads"):
        attention.attention(q, keys, values, rows, None, KVFormat(4, 64))
    with pytest.raises(AssertionError, match="another precision"):
        attention.attention(q, *(kv.float() for kv in (keys, values)), rows, None, form)
    with pytest.raises(AssertionError, match="a cache of other heads"):
        attention.attention(q, keys, values, rows, None, KVFormat(4, 128))
