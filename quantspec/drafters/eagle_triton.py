"""EAGLE on Triton's kernels: a whole draft, from the features of the last step to the record of a tree, is one CUDA
graph, and the host hears of it from the verifier alone.

The trees are those of ``Eagle``, up to rounding, and to truncation, which looks at the best 64 tokens. Where the warp
needs the host (penalties, masks, biases), ``Eagle`` grows the tree with this head; also where the device, on which
these kernels may never have run, does not grow a first tree as the host does.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from quantspec.core.drafter import TargetParts, View
from quantspec.core.noise import Stream
from quantspec.core.sampling import WarpChain
from quantspec.core.step import warn
from quantspec.drafters.config import EagleOptions
from quantspec.drafters.eagle import Eagle
from quantspec.drafters.eagle_frame import Form, Frame, Seat
from quantspec.drafters.eagle_triton_head import TritonEagleHead
from quantspec.drafters.feature_tree import FeatureState
from quantspec.errors import ResourceError
from quantspec.kernels.spans import round_up
from quantspec.kernels.triton.attention import CHUNK
from quantspec.kernels.triton.drafting import Growth, best_children
from quantspec.kernels.triton.rows import Rows
from quantspec.models import triton_frame
from quantspec.models.base import CausalModel
from quantspec.models.triton_decoder import TritonDecoder
from quantspec.models.triton_graphs import Graphs, current
from quantspec.models.triton_rounds import MOST_ROWS
from quantspec.types import EMPTY_DRAFT, Budget, PendingDraft, Proposal, SamplingParams, Verdict

_SPARE_SEATS = 2
_WIDEST = 16
"""Nodes of a level that one program can grow."""
_TRIAL = Budget(8, 8)
_NEAR = 1e-2  # sums of fp32 in another order are a thousand times nearer, wrong noise is a thousand times further


@dataclass(slots=True)
class TritonEagleState(FeatureState):
    """See ``FeatureState``; ``kv`` is that of the ``seat``."""

    seat: Seat = field(kw_only=True)


class TritonEagle(Eagle):
    """``Eagle`` for a ``TritonDecoder``. ``notice`` gets a line where trees grow on the host, or without graphs."""

    _longest_lag = 0  # a draft is one graph, which begins with true features

    _decoder: TritonDecoder
    _network: TritonEagleHead
    _graphs: Graphs

    def __init__(
        self, folder: Path | str, options: EagleOptions | None = None, notice: Callable[[str], None] = warn
    ) -> None:
        super().__init__(folder, options)
        self._notice, self._grows = notice, True
        self._spare: deque[Seat] = deque(maxlen=_SPARE_SEATS)
        self._lock = threading.Lock()  # graphs share memory

    def _load(self, model: CausalModel, probe: Tensor) -> None:
        assert isinstance(model, TritonDecoder), "engine.build chose this drafter for another model"
        self._decoder = model
        self._network = TritonEagleHead(*self._tensors(model), model.device, model.dtype)
        self._lm_head, self._ids = self._network.lm_head, self._network.ids
        self._graphs = Graphs(model.device)

    def prepare(self, parts: TargetParts) -> None:
        super().prepare(parts)
        # What grows them on the device knows no tokens but the target's.
        flaw = self._flaw() if self._ids is None else "its draft vocabulary is its own"
        self._grows = flaw is None
        if flaw is not None:
            self._notice(f"EAGLE's trees are grown on the host, which is slower: {flaw}")

    def _flaw(self) -> str | None:
        """Why the device should not grow trees; None if a first one is the host's."""
        chain, size = WarpChain(SamplingParams(temperature=1.0), (0,)), self.config.model.hidden_size
        room, vocab = self.options.depth + 1, self._decoder.vocab_size
        view = View((0, 1, 2, 3), 1, chain, chain.start(), Stream(0), frozenset(), room, vocab)
        features = torch.linspace(-1, 1, 3 * size, device=self._network.device).view(3, size)
        drafts = []
        try:
            for self._grows in (True, False):
                state = self.open(view)
                self.observe(state, Verdict((), (), 0, (0,), (), taps={"norm": features}))
                for _ in range(3 if self._graphs.usable else 1):  # launched, captured, replayed
                    draft = self.propose([state], [view], [_TRIAL])[0]
                drafts.append(draft.resolve() if isinstance(draft, PendingDraft) else draft)
                self.close(state)
        except Exception as error:
            if isinstance(error, torch.OutOfMemoryError | ResourceError):
                raise
            return f"{type(error).__name__}: {error}"
        found, expected = drafts
        same = (found.tokens, found.parents) == (expected.tokens, expected.parents) and all(
            math.isclose(a, b, rel_tol=_NEAR) for a, b in zip(found.scores, expected.scores, strict=True)
        )
        return None if same else "the device grew another tree than the host"

    def open(self, view: View) -> TritonEagleState:
        """Raises ``ResourceError``: no memory."""
        room = max(triton_frame.TILES[-1], self.options.top_k * self.options.depth)
        slots = round_up(len(view.tokens) + view.remaining + room, CHUNK)
        with self._lock:
            seat = next((spare for spare in self._spare if spare.kv.shape[1] == slots), None)
            if seat is not None:
                self._spare.remove(seat)
            else:
                self._spare.clear()
                self._network.rope.grow(slots)
                seat = Seat(self._network.new_kv(slots), self._network.rope.cos, self._network.rope.sin)
        return TritonEagleState(seat.kv, seat.kv.new_empty(0, self.config.model.hidden_size), seat=seat)

    def close(self, state: FeatureState) -> None:
        assert isinstance(state, TritonEagleState)
        self._spare.append(state.seat)
        super().close(state)

    def propose(
        self, states: Sequence[FeatureState], views: Sequence[View], budgets: Sequence[Budget]
    ) -> list[Proposal]:
        with current(self._network.device):
            return super().propose(states, views, budgets)

    def _draft(self, state: FeatureState, view: View, budget: Budget) -> Proposal:
        depth = self._room(state, view, budget)
        if not depth:
            return EMPTY_DRAFT
        if not self._grows or self.options.top_k > _WIDEST or not _on_device(view):
            return super()._draft(state, view, budget)
        assert isinstance(state, TritonEagleState)
        if state.count - state.filled > triton_frame.TILES[-1]:
            self._fill(state, view.tokens)  # a prompt; its last slot is filled once more below
        new = max(state.count - state.filled, 1)
        frame, tau = self._frame(state.seat, view, budget, new), self.config.tau_at(view.chain.params.temperature)
        start = state.count - new
        frame.fill(view.tokens[start + 1 :], state.features[start - state.base :], view, tau, budget, depth)
        with self._lock:
            self._run(state.seat, frame)
        state.filled = state.count
        return PendingDraft(frame.record, frame.form.capacity, depth, self.name)

    def _frame(self, seat: Seat, view: View, budget: Budget, new: int) -> Frame:
        width, depth, params = self._width, self.options.depth, view.chain.params
        noisy = not view.chain.greedy
        truncated = noisy and (params.top_k > 0 or params.top_p < 1 or params.min_p > 0)
        capacity = min(budget.max_nodes, width * (1 + (depth - 1) * width))
        form = Form(triton_frame.tile_for(new), capacity, noisy, truncated)
        if form not in seat.frames:
            hidden, network = self.config.model.hidden_size, self._network
            seat.frames[form] = Frame(form, depth, width, hidden, network.device, network.dtype)
        return seat.frames[form]

    @property
    def _width(self) -> int:
        return min(self.options.top_k, self._model.vocab_size)

    def _run(self, seat: Seat, frame: Frame) -> None:
        """``_launch``, as a graph from the second time on."""

        def launch() -> None:
            self._launch(seat, frame)

        if self._graphs.usable and frame.form in seat.graphs and seat.graphs[frame.form] is None:
            seat.graphs[frame.form] = self._graphs.capture(launch)
            if not self._graphs.usable:
                self._notice(self._graphs.failure)
        replay = seat.graphs.setdefault(frame.form, None)
        if replay is None:
            launch()
        else:
            replay()

    def _launch(self, seat: Seat, frame: Frame) -> None:
        """All launches of a draft: the slots of true features, then level by level."""
        network, depth = self._network, self.options.depth
        chain, cache = frame.chain, (seat.kv, seat.cos, seat.sin)
        x = network.forward(frame.features, self._embed_rows(frame.tokens), *cache, chain, chain)
        x = x.index_select(0, frame.last)
        growth = Growth(self._width, self._width, depth, network.device)
        for level in range(depth):
            best = best_children(self._logits(x), frame.race, level, self._width)
            growth.grow(best, level, frame.limits, frame.record)
            if level + 1 < depth:
                embedded, parents = self._embed_rows(growth.tokens), x.index_select(0, growth.rows)
                x = network.forward(parents, embedded, *cache, *frame.rows(level, growth.paths))

    def _embed_rows(self, tokens: Tensor) -> Tensor:
        own = self._network.embed_weight
        return self._decoder.embed_rows(tokens) if own is None else F.embedding(tokens, own)

    def _embed(self, tokens: Sequence[int]) -> Tensor:
        return self._embed_rows(torch.tensor(tokens, dtype=torch.int32).to(self._network.device, non_blocking=True))

    def _fill(self, state: FeatureState, tokens: Sequence[int]) -> Tensor:
        """See ``FeatureTree._fill``."""
        assert isinstance(state, TritonEagleState)
        start, outputs, seat = min(state.filled, state.count - 1), state.features, state.seat
        while start < state.count:
            end = min(start + MOST_ROWS, state.count)
            rows = self._chain(end - start, start)
            features = state.features[start - state.base : end - state.base]
            embedded = self._embed(tokens[start + 1 : end + 1])
            outputs = self._network.forward(features, embedded, seat.kv, seat.cos, seat.sin, rows, rows)
            start = end
        state.filled = state.count
        return outputs[-1:]

    def _chain(self, n: int, start: int) -> Rows:
        """``Rows.of`` a chain, which is long here: put together on the device."""
        cached = torch.tensor([start], dtype=torch.int32).to(self._network.device, non_blocking=True)
        numbers = torch.arange(n, dtype=torch.int32, device=self._network.device)
        return Rows(cached, numbers, numbers.repeat(n, 1))

    def _expand(
        self, state: FeatureState, tokens: Sequence[int], features: Tensor, first: int, position: int,
        columns: Sequence[Sequence[int]],
    ) -> Tensor:  # fmt: skip
        """See ``FeatureTree._expand``."""
        assert isinstance(state, TritonEagleState)
        seat, device, own = state.seat, self._network.device, columns[0][-1]
        depths = torch.full((len(tokens),), position - first, dtype=torch.int32)
        cached, paths = torch.tensor([first]), torch.tensor([list(path) for path in columns])
        numbers = (cached + own, depths - own, cached, depths, paths)
        start, offsets, *seen = (each.to(device, torch.int32) for each in numbers)
        cache = (seat.kv, seat.cos, seat.sin)
        return self._network.forward(
            features, self._embed(tokens), *cache, Rows(start, offsets, seen[2]), Rows(seen[0], seen[1], seen[2])
        )

    def describe(self) -> str:
        return f"{super().describe()}, on the device"


def _on_device(view: View) -> bool:
    """Whether the draws of this sequence need no more than temperature, truncation and noise."""
    chain = view.chain
    return chain.stateless and not chain.params.logit_bias and (chain.greedy or view.stream is not None)
