"""The warp chain (everything between a model's logits and the distribution that is drawn from) and the draw itself.

A ``WarpChain`` is fixed for a sequence; a ``WarpState`` belongs to a *path* of tokens and is never changed in place, so
every node of a tree has its own. A row's result does not depend on the other rows. The work is done by numpy on the
host, where one call costs about a microsecond.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from quantspec.core.penalties import History, penalize
from quantspec.core.race import DenseRace, DrawnRace, Race, SparseRace
from quantspec.core.truncation import (
    Kept,
    Rows,
    check_finite,
    truncate,
    truncate_candidates,
    truncate_for_draft,
)
from quantspec.errors import UsageError
from quantspec.kernels.draws import Drawn
from quantspec.models.base import Draw
from quantspec.types import SamplingParams

if TYPE_CHECKING:
    from torch import Tensor

    from quantspec.core.noise import Stream

_SETTLE_AFTER = 32


@dataclass(frozen=True, slots=True)
class WarpState:
    """What the chain must know of one path: the length of its output, and for penalties its tokens: a shared
    ``history`` up to some point, and those that came after it."""

    generated: int = 0
    history: History | None = None
    recent: tuple[int, ...] = ()


class WarpChain:
    """Penalties, bias, masks, temperature, top-k, top-p, min-p, in that order; ties in a ranking go to the lower id.

    Temperature 0 stops after the masks. ``repetition_penalty`` covers prompt and output, the other two the output.
    ``stop_ids`` (the end of sequence and the user's own) are masked until ``min_new_tokens`` tokens are generated.
    """

    def __init__(self, params: SamplingParams, prompt: Sequence[int], stop_ids: frozenset[int] = frozenset()) -> None:
        self.params = params
        self.stop_ids = stop_ids
        self.greedy = params.temperature == 0
        self._penalizes = bool(params.repetition_penalty != 1 or params.presence_penalty or params.frequency_penalty)
        self._masks = params.min_new_tokens > 0 and bool(stop_ids)
        self._truncates = params.top_k > 0 or params.top_p < 1 or params.min_p > 0
        self.stateless = not (self._penalizes or self._masks)
        """True when all paths share one state."""
        self.nameless = self.stateless and not params.logit_bias
        """True when nothing but the noise asks which token a column of logits is of."""
        self._prompt = tuple(prompt)
        self._stop_ids = _ids(stop_ids)
        self._bias_ids = _ids(params.logit_bias)
        self._bias = np.array([params.logit_bias[i] for i in self._bias_ids.tolist()], dtype=np.float32)
        self._start = WarpState(0, History(self._prompt, ()) if self._penalizes else None)

    def check(self, vocab_size: int) -> None:
        """Refuse token ids that the model does not have with a ``UsageError``."""
        for name, ids in (("logit_bias", self._bias_ids), ("stop_token_ids", self._stop_ids)):
            for token in ids.tolist():
                if not 0 <= token < vocab_size:
                    raise UsageError(f"{name} names token {token}, but the model's tokens are 0 to {vocab_size - 1}")

    def start(self) -> WarpState:
        """The state right after the prompt."""
        return self._start

    def advance(self, state: WarpState, token: int) -> WarpState:
        """The state of the path that goes on with ``token``."""
        if self.stateless:
            return state
        return WarpState(state.generated + 1, state.history, (*state.recent, token) if self._penalizes else ())

    def at(self, output: Sequence[int]) -> WarpState:
        """The state after ``output``, as ``advance`` over all of it gives."""
        if self.stateless:
            return self._start
        return WarpState(len(output), History(self._prompt, output) if self._penalizes else None)

    def settle(self, state: WarpState, output: Sequence[int]) -> WarpState:
        """The same state, put together anew when its recent tokens have become many; ``output`` are all of the
        path's."""
        return self.at(output) if len(state.recent) > _SETTLE_AFTER else state

    def apply(self, state: WarpState, row: Tensor) -> Tensor:
        """``apply_rows`` for one row ``[V]``."""
        return self.apply_rows([state], row[None])[0]

    def apply_rows(self, states: Sequence[WarpState], logits: Tensor) -> Tensor:
        """Log scores ``[m, V]`` (fp32, not normalized, -inf where excluded) of logits ``[m, V]`` with a state per row.

        The softmax of a row is the distribution that is drawn from. The argument is not changed.
        """
        rows = self._weigh(states, _host(logits))
        if self._truncates and not self.greedy:
            rows = truncate(rows, self.params.top_k, self.params.top_p, self.params.min_p).dense(rows.shape)
        return torch.from_numpy(rows).to(logits.device)

    def draw(self, warped: Tensor, positions: Sequence[int], stream: Stream) -> list[int]:
        """The tokens of warped rows ``[m, V]`` at the absolute positions ``[m]``: the argmax, lowest id first, of the
        row at temperature 0, else of the row minus ``log E``."""
        return self._noisy(_host(warped), positions, stream).argmax()

    def sample(
        self, states: Sequence[WarpState], logits: Tensor, positions: Sequence[int], stream: Stream
    ) -> list[int]:
        """``draw(apply_rows(states, logits), positions, stream)`` at a fraction of the cost."""
        return self.race(states, logits, positions, stream).argmax()

    def race(
        self,
        states: Sequence[WarpState],
        logits: Tensor,
        positions: Sequence[int],
        stream: Stream | None,
        exact: bool = True,
        ids: NDArray[np.int64] | None = None,
    ) -> Race:
        """``apply_rows(states, logits)``, minus ``log E`` at temperature > 0 where there is a stream. A race that no
        token depends on, a drafter's, need not be ``exact`` about where top-p and min-p cut. ``ids [W]`` are the tokens
        that columns ``[m, W]`` are of, for a chain that is ``nameless``; the race is one of columns all the same."""
        assert ids is None or self.nameless
        rows = self._weigh(states, _host(logits))
        if self.greedy or not self._truncates:
            return self._noisy(rows, positions, stream, ids)
        cut = truncate if exact else truncate_for_draft
        return _sparse(cut(rows, self.params.top_k, self.params.top_p, self.params.min_p), positions, stream, ids)

    def drawn(self, stream: Stream) -> Draw | None:
        """What a model that draws must know of this chain; None: it takes the host to weigh the rows."""
        if not self.stateless or self._bias_ids.size:
            return None
        return Draw() if self.greedy else Draw(stream.key, self.params.temperature, self._truncates)

    def drawn_race(self, drawn: Drawn, logits: Tensor, positions: Sequence[int], stream: Stream) -> Race:
        """``race`` of a stateless chain from what the device tells of its rows; ``logits [m, V]``, which are still
        there, for what that does not settle."""
        states = [self._start] * len(positions)
        if self.greedy or not self._truncates:
            whole = partial(self.race, states, logits, positions, stream)
            return DrawnRace(drawn.value, drawn.ids, drawn.log_scores, whole)
        check_finite(drawn.value)
        params = self.params.top_k, self.params.top_p, self.params.min_p
        values = drawn.logits / np.float32(self.params.temperature)
        kept = truncate_candidates(drawn.candidates, values, drawn.mass, logits.shape[1], *params)
        if kept is None:
            # With the device's sums, so that which way a row was cut shows nowhere.
            kept = truncate(self._weigh(states, _host(logits)), *params, total=drawn.mass)
        return _sparse(kept, positions, stream)

    def _weigh(self, states: Sequence[WarpState], rows: Rows) -> Rows:
        """Penalties, bias, masks and temperature. The result may be the argument itself where nothing is to be done."""
        if self._penalizes or self._masks or self._bias_ids.size:
            rows = rows.copy()
        if self._penalizes:
            for state, row in zip(states, rows, strict=True):
                assert state.history
                penalize(row, *state.history.plus(state.recent), self.params)
        if self._bias_ids.size:
            rows[:, self._bias_ids] += self._bias
        if self._masks:
            early = np.array([state.generated < self.params.min_new_tokens for state in states])
            rows[np.ix_(np.flatnonzero(early), self._stop_ids)] = -np.inf
        return rows if self.greedy else rows / np.float32(self.params.temperature)

    def _noisy(
        self, rows: Rows, positions: Sequence[int], stream: Stream | None, ids: NDArray[np.int64] | None = None
    ) -> DenseRace:
        if self.greedy or stream is None:
            return DenseRace(rows)
        if ids is None:
            return DenseRace(rows - np.stack([stream.noise(t, rows.shape[1]) for t in positions]))
        noise = stream.noise_at(positions, np.full(len(rows), len(ids)), np.tile(ids, len(rows)))
        return DenseRace(rows - noise.reshape(rows.shape))


def _sparse(
    kept: Kept, positions: Sequence[int], stream: Stream | None, ids: NDArray[np.int64] | None = None
) -> SparseRace:
    if stream is None:
        return SparseRace(kept)
    tokens = kept.ids if ids is None else ids[kept.ids]
    return SparseRace(Kept(kept.count, kept.ids, kept.values - stream.noise_at(positions, kept.count, tokens)))


def _ids(tokens: Iterable[int]) -> NDArray[np.int64]:
    return np.array(sorted(tokens), dtype=np.int64)


def _host(rows: Tensor) -> Rows:
    if rows.requires_grad or rows.device.type != "cpu" or rows.dtype != torch.float32 or not rows.is_contiguous():
        rows = rows.detach().to("cpu", torch.float32).contiguous()
    return rows.numpy()
