"""Top-k, top-p and min-p on rows of log scores, sparse: what is kept of a large vocabulary is a handful of tokens.

All three keep a prefix of the row in descending order, ties by id. The prefix is found without a full sort where the
mass of the largest entries settles it; the sums behind that decision are the same for either way and for any number of
rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import takewhile

import numpy as np
import torch
from numpy.typing import NDArray

from quantspec.errors import ModelError
from quantspec.kernels.cpu import library
from quantspec.kernels.cpu.sampling import nucleus_rows

Rows = NDArray[np.float32]
Ids = NDArray[np.int64]
_PREFIXES = tuple(256 * 4**i for i in range(6))  # the sorted prefixes that are tried before the whole row


@dataclass(frozen=True, slots=True)
class Kept:
    """Entries that survive, row by row and then by id: ``values[j]`` stands at ``[row[j], ids[j]]``. No row is
    empty."""

    count: Ids
    ids: Ids
    values: Rows

    def dense(self, shape: tuple[int, int]) -> Rows:
        """``[m, V]`` with -inf elsewhere."""
        rows = np.full(shape, -np.inf, np.float32)
        rows[np.repeat(np.arange(len(self.count)), self.count), self.ids] = self.values
        return rows

    @property
    def starts(self) -> Ids:
        """Where each row's entries begin."""
        return self.count.cumsum() - self.count


def truncate(
    rows: Rows, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0, total: Rows | None = None
) -> Kept:  # fmt: skip
    """What top-k (0 is off), then top-p, then min-p keep of log scores ``[m, V]``.

    Top-p keeps the fewest tokens whose mass is at least ``top_p`` of what top-k left; min-p those with at least
    ``min_p`` times the probability of the best. ``total [m]`` is the sum of ``exp(row - best)`` of each, if known.

    Raises:
        ModelError: a row has no finite maximum.
    """
    size = rows.shape[1]
    best = rows.max(axis=-1, keepdims=True)
    check_finite(best)
    prefixes = [min(top_k, size)] if top_k else [*takewhile(lambda k: k < size, _PREFIXES), size]
    if top_p == 1 or top_k:
        total = None
    elif total is None:
        # sum(exp(row - best)) as the inverse of the best's share: torch's softmax is four times as fast as numpy's exp,
        # and a row of it is the same in any company.
        total = torch.softmax(torch.from_numpy(rows), dim=-1).amax(dim=-1).reciprocal().numpy()
    cut, count = np.empty(len(rows), np.float32), np.empty(len(rows), np.int64)
    todo = np.arange(len(rows))
    for k in prefixes:
        top = _largest(rows if len(todo) == len(rows) else rows[todo], k)
        count[todo] = _prefix_length(top, None if total is None else total[todo], top_p, min_p)
        cut[todo] = top[np.arange(len(todo)), count[todo] - 1]
        todo = todo[count[todo] == k]  # all of this prefix is kept, so that there may be more
        if not todo.size:
            break
    return _at_least(rows, cut, count)


def truncate_candidates(
    ids: NDArray[np.integer], values: Rows, total: Rows, vocab_size: int, top_k: int, top_p: float, min_p: float
) -> Kept | None:
    """``truncate`` of whole rows with this ``total``, where their best entries ``[m, c]``, in any order, settle all of
    them; else None. An entry that equals the least one may tie with others that were left out."""
    size = values.shape[1]
    whole = size == vocab_size
    k = min(top_k, vocab_size) if top_k else size if whole else size - 1
    if k > size:
        return None
    top = _largest(values, k)
    count = _prefix_length(top, total if top_p < 1 and not top_k else None, top_p, min_p)
    cut = top[np.arange(len(top)), count - 1]
    if not whole and ((cut <= values.min(axis=-1)).any() or (not top_k and (count == k).any())):
        return None
    order = ids.argsort(axis=-1)
    kept = _at_least(np.take_along_axis(values, order, -1), cut, count)
    places = np.take_along_axis(ids, order, -1).ravel()
    return Kept(count, places[kept.ids + np.arange(len(ids)).repeat(count) * size].astype(np.int64), kept.values)


def truncate_for_draft(rows: Rows, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> Kept:
    """``truncate`` give or take a few entries at the cut, three times as fast: a drafter's guess need not be exact."""
    if top_k or not library.loaded():
        return truncate(rows, top_k, top_p, min_p)
    check_finite(rows.max(axis=-1))
    count, ids, values = nucleus_rows(rows, top_p, min_p)
    return Kept(count, ids.astype(np.int64), values)


def _largest(rows: Rows, k: int) -> Rows:
    """The k largest entries of each row, in descending order."""
    size = rows.shape[1]
    top = np.partition(rows, size - k, axis=-1)[:, size - k :] if k < size else rows.copy()
    top.sort(axis=-1)
    return top[:, ::-1]


def _prefix_length(top: Rows, total: Rows | None, top_p: float, min_p: float) -> Ids:
    """How many of the descending entries ``[m, k]`` stay; ``total`` is the mass of the whole row (None: that of
    ``top``)."""
    mass = np.exp(top - top[:, :1])
    kept = np.full(len(top), top.shape[1])
    if top_p < 1:
        before = mass[:, :-1].cumsum(axis=-1, dtype=np.float64)
        whole = mass.sum(axis=-1) if total is None else total
        kept = 1 + (before < top_p * whole[:, None].astype(np.float64)).sum(axis=-1)
    if min_p:
        kept = np.minimum(kept, (mass >= min_p).sum(axis=-1))
    return kept


def _at_least(rows: Rows, cut: Rows, count: Ids) -> Kept:
    """The ``count[i]`` largest entries of row i, the least of which is ``cut[i]``."""
    flat = np.flatnonzero(rows >= cut[:, None])
    bounds = np.arange(len(rows) + 1) * rows.shape[1]
    places = flat.searchsorted(bounds)
    found = places[1:] - places[:-1]  # np.diff costs ten times as much
    values = rows.ravel()[flat]
    if (found > count).any():  # more entries tie with the cut than there is room for: the highest ids go
        ends, tied = found.cumsum(), values == cut.repeat(found)
        drop = [
            start + np.flatnonzero(tied[start:end])[-surplus:]
            for start, end, surplus in zip(ends - found, ends, found - count, strict=True)
            if surplus
        ]
        keep = np.delete(np.arange(len(flat)), np.concatenate(drop))
        flat, values = flat[keep], values[keep]
    return Kept(count, flat - bounds[:-1].repeat(count), values)


def check_finite(best: Rows) -> None:
    """Refuse rows whose largest entry is NaN or infinite with a ``ModelError``."""
    if not np.isfinite(best).all():
        raise ModelError(
            "a row of scores has no finite maximum: the model made NaN or infinity, or every token is excluded",
            hint="check the model's weights, and logit_bias for infinite values",
        )
