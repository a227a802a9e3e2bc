"""The best entries of rows, natively and by torch: the same ids and log-probabilities, the lowest id on ties."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from quantspec.kernels.cpu import library
from quantspec.kernels.cpu.sampling import best_rows


@pytest.fixture(autouse=True, params=["native", "torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "native":
        if library.usable() is not None:
            pytest.skip("no native library here")
    else:
        monkeypatch.setattr(library, "loaded", lambda: False)
    return request.param


@pytest.mark.parametrize("size", [1, 7, 64, 65, 130, 4099, 70_001])
def test_log_softmax_and_topk(size: int) -> None:
    rows = 4 * np.random.default_rng(size).standard_normal((5, size)).astype(np.float32)
    rows[1, : size // 2] = -np.inf
    for k in {1, min(4, size), min(64, size), min(65, size)}:
        ids, scores = best_rows(rows, k)
        expected = torch.log_softmax(torch.from_numpy(rows).double(), -1).topk(k).values
        # fp32 sums and exponentials, each good to 1e-6
        torch.testing.assert_close(torch.from_numpy(scores).double(), expected, rtol=1e-5, atol=1e-5)
        assert np.array_equal(np.take_along_axis(rows, ids.astype(np.int64), 1), np.sort(rows, 1)[:, ::-1][:, :k])


def test_ties_go_to_the_lowest_id(way: str) -> None:
    if way == "torch":
        pytest.skip("torch promises no order")
    rows = np.zeros((2, 200), np.float32)
    rows[0, [3, 70, 199]] = 1.0
    assert best_rows(rows, 5)[0].tolist() == [[3, 70, 199, 0, 1], [0, 1, 2, 3, 4]]


def test_a_strided_view_and_a_row_with_nan() -> None:
    whole = np.random.default_rng(0).standard_normal((4, 100)).astype(np.float32)
    ids, _ = best_rows(whole[::2, 10:90], 3)
    assert ids.tolist() == best_rows(whole[::2, 10:90].copy(), 3)[0].tolist()
    whole[2, 40] = math.nan
    assert np.isnan(best_rows(whole, 2)[1]).all(axis=1).tolist() == [False, False, True, False]
