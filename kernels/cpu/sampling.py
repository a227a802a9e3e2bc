"""The best entries of rows of scores, natively where the library is loaded, else by torch."""

from __future__ import annotations

from ctypes import c_int, c_void_p
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from quantspec.kernels.cpu import library

_MOST = 64
"""The kernel keeps the best in a sorted list, which is quick while it is short."""


@cache
def _native() -> Any:
    return library.bind("qs_best_rows", None, [c_void_p, c_int, c_int, c_int, c_void_p, c_void_p])


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
    _native()(rows.ctypes.data, n, size, k, ids.ctypes.data, scores.ctypes.data)
    return ids, scores
