"""The warp chain (everything between a model's logits and the distribution that is drawn from) and the draw itself.

A ``WarpChain`` is fixed for a sequence; a ``WarpState`` belongs to a *path* of tokens and is never changed in place, so that
every node of a tree has its own. Rows are warped one by one in effect: a row's result does not depend on its neighbours.
The work is done by numpy on the host, where one call costs about a microsecond.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from quantspec.errors import ModelError, UsageError
from quantspec.types import SamplingParams

if TYPE_CHECKING:
    from torch import Tensor

    from quantspec.core.noise import Stream

Rows = NDArray[np.float32]
_PREFIXES = (64, 1024)  # sorted prefixes tried for top-p and min-p before a full sort


@dataclass(frozen=True, slots=True)
class WarpState:
    """What the chain must know of one path: how many tokens it has generated, and how often each."""

    generated: int = 0
    counts: Mapping[int, int] = field(default_factory=dict)


class WarpChain:
    """Penalties, bias, masks, temperature, top-k, top-p, min-p, in that order; ties in a ranking go to the lower id.

    Temperature 0 stops after the masks. ``repetition_penalty`` covers prompt and output, the other two the output.
    ``stop_ids`` (the end of sequence and the user's own) are masked until ``min_new_tokens`` tokens are generated.
    """

    def __init__(self, params: SamplingParams, prompt: Sequence[int], stop_ids: frozenset[int] = frozenset()) -> None:
        self.params = params
        self.stop_ids = stop_ids
        self.greedy = params.temperature == 0
        self._repeats = params.repetition_penalty != 1
        self._penalized = self._repeats or params.presence_penalty != 0 or params.frequency_penalty != 0
        self._masks = params.min_new_tokens > 0 and bool(stop_ids)
        self._prompt = frozenset(prompt)
        self._prompt_ids = _ids(self._prompt)
        self._stop_ids = _ids(stop_ids)
        self._bias_ids = _ids(params.logit_bias)
        self._bias = np.array([params.logit_bias[i] for i in self._bias_ids.tolist()], dtype=np.float32)

    @property
    def stateless(self) -> bool:
        """True when all paths share one state, so that all rows are warped alike."""
        return not (self._penalized or self._masks)

    def check(self, vocab_size: int) -> None:
        """Refuse token ids that the model does not have with a ``UsageError``."""
        for name, ids in (("logit_bias", self._bias_ids), ("stop_token_ids", self._stop_ids)):
            if ids.size and not 0 <= ids.min() <= ids.max() < vocab_size:
                bad = ids.min() if ids.min() < 0 else ids.max()
                raise UsageError(f"{name} names token {bad}, but the model's tokens are 0 to {vocab_size - 1}")

    def start(self) -> WarpState:
        """The state right after the prompt."""
        return WarpState()

    def at(self, output: Sequence[int]) -> WarpState:
        """The state after ``output``: ``advance`` over all of it, at once."""
        return self.start() if self.stateless else WarpState(len(output), Counter(output) if self._penalized else {})

    def advance(self, state: WarpState, token: int) -> WarpState:
        """The state of the path that goes on with ``token``."""
        if self.stateless:
            return state
        if not self._penalized:
            return WarpState(state.generated + 1)
        counts = dict(state.counts)
        counts[token] = counts.get(token, 0) + 1
        return WarpState(state.generated + 1, counts)

    def apply(self, state: WarpState, row: Tensor) -> Tensor:
        """``apply_rows`` for one row ``[V]``."""
        return self.apply_rows([state], row[None])[0]

    def apply_rows(self, states: Sequence[WarpState], logits: Tensor) -> Tensor:
        """Log scores ``[m, V]`` (fp32, not normalized; -inf where excluded) of logits ``[m, V]``, a path's state per row.

        The softmax of a row is the distribution that is drawn from. The argument is not changed.
        """
        rows = logits.detach().to("cpu", torch.float32).numpy()
        return torch.from_numpy(self._warp(states, rows)).to(logits.device)

    def draw(self, warped: Tensor, positions: Sequence[int], stream: Stream) -> list[int]:
        """The tokens of rows ``[m, V]`` at the absolute positions ``[m]``: the argmax, lowest id first, of the row at
        temperature 0, else of the row minus ``log E``."""
        rows = warped.detach().to("cpu").numpy()
        if not self.greedy:
            distinct = sorted(set(positions))
            noise = np.stack([stream.noise(t, rows.shape[1]) for t in distinct])
            rows = rows - (noise[[distinct.index(t) for t in positions]] if len(distinct) > 1 else noise)
        y = rows.argmax(axis=-1)
        _check_finite(rows[np.arange(len(y)), y])
        return y.tolist()

    def _warp(self, states: Sequence[WarpState], rows: Rows) -> Rows:
        params = self.params
        if self._penalized or self._masks or self._bias_ids.size:
            rows = rows.copy()
        if self._penalized:
            for state, row in zip(states, rows, strict=True):
                self._penalize(state, row)
        if self._bias_ids.size:
            rows[:, self._bias_ids] += self._bias
        if self._masks:
            early = np.array([state.generated < params.min_new_tokens for state in states])
            rows[np.ix_(np.flatnonzero(early), self._stop_ids)] = -np.inf
        if self.greedy:
            return rows
        rows = rows / np.float32(params.temperature)
        if params.top_k or params.top_p < 1 or params.min_p:
            rows = truncate(rows, params.top_k, params.top_p, params.min_p)
        return rows

    def _penalize(self, state: WarpState, row: Rows) -> None:
        output = np.fromiter(state.counts.keys(), np.int64, len(state.counts))
        if self._repeats:
            penalty = np.float32(self.params.repetition_penalty)
            new = [token for token in state.counts if token not in self._prompt]
            seen = np.concatenate([self._prompt_ids, np.array(new, dtype=np.int64)])
            values = row[seen]
            row[seen] = np.where(values > 0, values / penalty, values * penalty)
        if self.params.presence_penalty or self.params.frequency_penalty:
            counts = np.fromiter(state.counts.values(), np.float32, len(state.counts))
            row[output] -= np.float32(self.params.presence_penalty) + np.float32(self.params.frequency_penalty) * counts


def truncate(rows: Rows, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> Rows:
    """A copy of log scores ``[m, V]`` with -inf outside top-k (0 is off), then top-p, then min-p.

    All three keep a prefix of the row in descending order, stable by id. Top-p keeps the fewest tokens with a mass of at
    least ``top_p`` of what top-k left; min-p those with at least ``min_p`` times the best one's probability.
    """
    size = rows.shape[1]
    best = rows.max(axis=-1, keepdims=True)
    _check_finite(best)
    prefixes = [min(top_k, size)] if top_k else [*(k for k in _PREFIXES if k < size), size]
    total = None if top_k or top_p == 1 else np.exp(rows - best).sum(axis=-1, keepdims=True)
    result = np.full_like(rows, -np.inf)
    todo = np.arange(len(rows))
    for k in prefixes:
        part, part_best = (rows, best) if len(todo) == len(rows) else (rows[todo], best[todo])
        top = np.partition(part, size - k, axis=-1)[:, size - k :] if k < size else part.copy()
        top.sort(axis=-1)
        top = top[:, ::-1]
        mass = np.exp(top - part_best)
        kept = np.full(len(todo), k)
        if top_p < 1:
            cumulative = mass.cumsum(axis=-1, dtype=np.float64)
            limit = cumulative[:, -1:] if total is None else total[todo].astype(np.float64)
            kept = np.minimum(kept, 1 + (cumulative[:, :-1] < top_p * limit).sum(axis=-1))
        if min_p:
            kept = np.minimum(kept, (mass >= min_p).sum(axis=-1))
        done = kept < k if k < prefixes[-1] else np.full(len(todo), True)
        if done.any():
            _keep(rows, result, todo[done], kept[done], top[done, kept[done] - 1])
        todo = todo[~done]
        if not todo.size:
            break
    return result


def _keep(rows: Rows, result: Rows, which: NDArray[np.int64], kept: NDArray[np.int64], cut: Rows) -> None:
    """Copy the ``kept[i]`` largest entries of row ``which[i]``, the least of them ``cut[i]``, into ``result``."""
    part = rows if len(which) == len(rows) else rows[which]
    row, ids = np.nonzero(part >= cut[:, None])
    surplus = np.bincount(row, minlength=len(which)) - kept
    if surplus.any():  # more entries tie with the cut than fit: the highest ids go
        drop = [np.flatnonzero((row == i) & (part[row, ids] == cut[i]))[-surplus[i] :] for i in np.flatnonzero(surplus)]
        row, ids = np.delete(row, np.concatenate(drop)), np.delete(ids, np.concatenate(drop))
    result[which[row], ids] = part[row, ids]


def _ids(tokens: frozenset[int] | Mapping[int, float]) -> NDArray[np.int64]:
    return np.array(sorted(tokens), dtype=np.int64)


def _check_finite(best: Rows) -> None:
    if not np.isfinite(best).all():
        raise ModelError(
            "a row of scores has no finite maximum: the model made NaN or infinity, or every token is excluded",
            hint="check the weights with `quantspec check`, and logit_bias for infinite values",
        )
