"""Rows of keys and values in 8 and 4 bits: layout by hand, error bounds, and what is not finite."""

from __future__ import annotations

import pytest
import torch

from quantspec.numerics.kv import GROUP, KVFormat

SIZES = (2, 18, 64, 96, 128, 130)


def rows_of(head_dim: int, count: int = 50) -> torch.Tensor:
    """From tiny to huge, and correlated: the last channel towers over the others."""
    rows = torch.randn(count, head_dim, generator=torch.Generator().manual_seed(head_dim))
    rows[:, -1] *= 20
    return rows * torch.logspace(-30, 30, count)[:, None]


def test_layout_of_8_bits() -> None:
    row = torch.zeros(18)
    row[0], row[1], row[16], row[17] = 127.5, -127.5, 1.0, 2.5
    stored = KVFormat(8, 18).encode(row)
    expected = [255, 0, *[128] * 14, 129, 130, *[128] * 14]  # 2.5 goes to the even 2, 127.5 to the last code
    assert stored.tolist() == expected + list(torch.ones(1).view(torch.uint8))


def test_layout_of_4_bits() -> None:
    row = torch.arange(18.0) - 7.5  # -7.5 .. 9.5
    row[16], row[17] = 3.0, -5.0
    stored = KVFormat(4, 18).encode(row)
    low = [0, 2, 2, 4, 4, 6, 6, 8]  # channels 0 to 7 by 1 step: -7.5, -6.5, .. rounded to even, plus 8
    high = [8, 10, 10, 12, 12, 14, 14, 15]  # channels 8 to 15: 0.5 .. 7.5, of which the last is clipped
    assert stored[:8].tolist() == [a | b << 4 for a, b in zip(low, high, strict=True)]
    assert stored[8:16].tolist() == [11 | 8 << 4, 3 | 8 << 4, *[8 | 8 << 4] * 6]
    assert stored[16:].view(torch.float32).tolist() == [1.0]


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("head_dim", SIZES)
def test_errors_are_within_half_a_step(bits: int, head_dim: int) -> None:
    form, rows = KVFormat(bits, head_dim), rows_of(head_dim)
    stored = form.encode(rows)
    assert (stored.dtype, stored.shape) == (torch.uint8, (50, form.row_bytes))
    error = (form.decode(stored) - rows).abs()
    for first in range(0, head_dim, GROUP):
        part = slice(first, first + GROUP)
        step = rows[:, part].abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 0.5)
        assert (error[:, part] <= 0.5001 * step).all()  # fp32 rounds a quotient at most 2^-17 off


@pytest.mark.parametrize("bits", [8, 4])
def test_rows_do_not_depend_on_each_other(bits: int) -> None:
    form, rows = KVFormat(bits, 96), rows_of(96).view(5, 10, 96)
    stored = form.encode(rows)
    assert all(torch.equal(form.encode(rows[i, j]), stored[i, j]) for i in range(5) for j in range(10))
    assert torch.equal(form.decode(stored)[3, 4], form.decode(stored[3, 4]))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("fault", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_shows_in_its_own_group(bits: int, fault: float) -> None:
    form, rows = KVFormat(bits, 130), rows_of(130)[:3]
    rows[1, 70] = fault
    decoded, sound = form.decode(form.encode(rows)), form.decode(form.encode(rows_of(130)[:3]))
    assert decoded[1, 64:128].isnan().all()
    decoded[1, 64:128] = sound[1, 64:128]
    assert torch.equal(decoded, sound)


@pytest.mark.parametrize("bits", [8, 4])
def test_zeros_and_smallest_numbers(bits: int) -> None:
    form = KVFormat(bits, 64)
    assert torch.equal(form.decode(form.encode(torch.zeros(2, 64))), torch.zeros(2, 64))
    tiny = form.decode(form.encode(torch.full((1, 64), 1e-45)))  # its scale is zero
    assert torch.equal(tiny, torch.zeros(1, 64))


@pytest.mark.parametrize(("bits", "head_dim", "expected"), [(8, 64, 68), (4, 64, 36), (8, 96, 104), (4, 128, 72)])
def test_bytes_of_a_row(bits: int, head_dim: int, expected: int) -> None:
    assert KVFormat(bits, head_dim).row_bytes == expected
