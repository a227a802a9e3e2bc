"""Hadamard matrices and the rotations made of them."""

from __future__ import annotations

import pytest
import torch

from quantspec.errors import UsageError
from quantspec.numerics.hadamard import Rotation, paley, sylvester

# Widths of published models: powers of 2, and 3, 5, 7, 9, 13 and 15 times one. 2880 and 104 take 180 and 104 whole.
SIZES = [1, 2, 16, 64, 80, 96, 104, 128, 256, 384, 896, 1536, 2560, 2880, 3584]


@pytest.mark.parametrize("size", SIZES)
def test_a_rotation_is_orthogonal_and_spreads_evenly(size: int) -> None:
    rotation = Rotation.random(size, 3)
    some = torch.eye(size, dtype=torch.float64)[:: -(-size // 40)]
    matrix = rotation.apply(some)
    assert rotation.size == size
    # Sums of up to 3584 products of 1 in fp64.
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(len(some), dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(matrix.abs(), torch.full_like(matrix, size**-0.5))
    torch.testing.assert_close(rotation.undo(matrix), some, rtol=0, atol=1e-12)
    rows = torch.randn(2, 3, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(rotation.undo(rotation.apply(rows)), rows)


@pytest.mark.parametrize("order", [4, 12, 20, 28, 36, 60, 104])
def test_paleys_matrices(order: int) -> None:
    matrix = paley(order)
    assert torch.equal(matrix.abs(), torch.ones(order, order))
    assert torch.equal(matrix @ matrix.T, order * torch.eye(order))


def test_the_seed_chooses_the_signs() -> None:
    first, same, other = (Rotation.random(64, seed) for seed in (0, 0, 1))
    assert torch.equal(first.signs, same.signs)
    assert not torch.equal(first.signs, other.signs)
    assert torch.equal(first.left, sylvester(3))


@pytest.mark.parametrize("size", [6, 46, 92])
def test_sizes_without_a_matrix_are_refused(size: int) -> None:
    """92 has one (Baumert, Golomb and Hall, 1962), but not by Paley's construction."""
    with pytest.raises(UsageError, match=f"of size {size} "):
        Rotation.random(size, 0)
