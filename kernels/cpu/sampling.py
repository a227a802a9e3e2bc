"""The best entries of rows of scores, natively where the library is loaded (``library.loaded``), else by torch."""

from __future__ import annotations

from ctypes import c_float, c_int, c_void_p
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from quantspec.kernels.cpu import library

_MOST = 64
"""The kernel keeps the best in a sorted list, which is quick while it is short."""


@cache
def _best() -> Any:
    return library.bind("qs_best_rows", None, [c_void_p, c_int, c_int, c_int, c_void_p, c_void_p])


@cache
def _nucleus() -> Any:
    arguments = [c_void_p, c_int, c_int, c_float, c_float, c_void_p, c_void_p, c_void_p]
    return library.bind("qs_nucleus_rows", library.no_memory, arguments)


def best_rows(rows: NDArray[np.float32], k: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Ids and ``log_softmax`` values, each ``[n, k]``, of the k largest entries of each row ``[n, V]``, descending.

    Natively, ties go to the lowest id. A row with a NaN has NaN for values.
    """
    n, size = rows.shape
    if k > min(size, _MOST) or not library.loaded():
        best = torch.log_softmax(torch.from_numpy(rows), dim=-1).topk(min(k, size))
        return best.indices.int().numpy(), best.values.numpy()
    rows = np.ascontiguousarray(rows)
    ids, scores = np.empty((n, k), np.int32), np.empty((n, k), np.float32)
    _best()(rows.ctypes.data, n, size, k, ids.ctypes.data, scores.ctypes.data)
    return ids, scores


def nucleus_rows(
    rows: NDArray[np.float32], top_p: float, min_p: float
) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.float32]]:
    """Counts ``[n]``, ids and values of what top-p and min-p leave of rows ``[n, V]``, give or take a few entries at
    the cut. Native alone; every row must have a finite maximum."""
    n, size = rows.shape
    rows = np.ascontiguousarray(rows)
    counts, ids, values = np.empty(n, np.int64), np.empty(n * size, np.int32), np.empty(n * size, np.float32)
    places = (array.ctypes.data for array in (counts, ids, values))
    _nucleus()(rows.ctypes.data, n, size, top_p, min_p, *places)
    end = counts.sum()
    return counts, ids[:end], values[:end]
