"""Drafts that only the device knows, grafted onto the rows of a forward."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable

import pytest
import torch

graft = pytest.importorskip("quantspec.kernels.triton.graft", reason="triton is not installed")
Rows = pytest.importorskip("quantspec.kernels.triton.rows", reason="triton is not installed").Rows


@pytest.mark.parametrize("lag", [1, 2, 7])
@pytest.mark.parametrize("capacity,padding", [(1, 0), (5, 3), (24, 0)])
def test_rows_are_those_of_the_draft(
    lag: int, capacity: int, padding: int, triton_device: torch.device, launches: Callable[..., Counter[str]]
) -> None:
    counts = launches(graft, "_graft")
    rng, n, standing_in = random.Random(capacity), lag + capacity + padding, [*range(-1, lag - 1)]
    for count in {0, 1, capacity // 2, capacity}:
        parents = [rng.choice((-1, i - 1, rng.randrange(-1, i))) for i in range(count)] + [-1] * (capacity - count)
        tokens = [rng.randrange(1, 100) for _ in range(count)] + [0] * (capacity - count)
        rows = Rows.of([*standing_in, *[lag - 1] * capacity, *[-1] * padding], 40, triton_device)
        wide = Rows(rows.cached, rows.depths, torch.full((n, n), 99, dtype=torch.int32))
        fed = torch.arange(n, dtype=torch.int32)
        record = torch.tensor([count, *tokens, *parents, *[7] * capacity], dtype=torch.int32)
        whole = [*standing_in, *(lag + parent if parent >= 0 else lag - 1 for parent in parents)]
        expected = Rows.of(whole, 40, triton_device)
        depth = int(expected.depths[lag:].max()) - lag + 1
        graft.graft(record, capacity, depth, lag, fed, wide)
        assert fed.tolist() == [*range(lag), *tokens, *range(lag + capacity, n)]
        assert torch.equal(wide.depths[: lag + capacity], expected.depths)
        assert torch.equal(wide.depths[lag + capacity :], rows.depths[lag + capacity :])
        for i in range(lag, lag + capacity):
            seen = int(expected.depths[i]) + 1
            assert torch.equal(wide.paths[i, :seen], expected.paths[i, :seen])
            assert (wide.paths[i, seen:] == 99).all(), "written past a path"
        assert (wide.paths[:lag] == 99).all()
        assert (wide.paths[lag + capacity :] == 99).all()
    assert counts["_graft"] == len({0, 1, capacity // 2, capacity})
