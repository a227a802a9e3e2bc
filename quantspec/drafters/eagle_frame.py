"""What an EAGLE head's graph reads and writes: the inputs of one draft, in one buffer on the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from quantspec.core.drafter import View
from quantspec.kernels.spans import round_up
from quantspec.kernels.triton.drafting import Limits, Race
from quantspec.kernels.triton.rows import ALIGNMENT, Rows
from quantspec.types import Budget

_ALIGNED = ALIGNMENT // torch.int32.itemsize
_STOPS = 16
"""Tokens after which nothing grows; a node after one more of them is merely wasted."""


@dataclass(frozen=True, slots=True)
class Form:
    """What a graph is made for: ``tile`` true features at most, ``capacity`` nodes at most, and the kind of race."""

    tile: int
    capacity: int
    noisy: bool
    truncated: bool


class Frame:
    """``tokens [tile]`` and ``features [tile, H]`` to fill slots with, the ``chain`` of rows that these are, and the
    number ``last [1]`` of the last; ``race`` and ``limits``; the ``record`` of the draft (see ``types.PendingDraft``).
    """

    def __init__(
        self, form: Form, depth: int, width: int, hidden: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.form, self._depth, self._width = form, depth, width
        sizes = {"tokens": form.tile, "start": 1, "filled": 1, "last": 1, "max_depth": 1, "key": 2, "warp": 5}
        sizes |= {"stops": _STOPS, "prices": form.capacity, **{f"level {level}": 1 for level in range(depth - 1)}}
        self._places, end = dict[str, slice](), 0
        for name, size in sizes.items():
            self._places[name] = slice(end, end + size)
            end += round_up(size, _ALIGNED)
        self._buffer = torch.zeros(end, dtype=torch.int32, device=device)
        views = {name: self._buffer[place] for name, place in self._places.items()}
        numbers = torch.arange(max(form.tile, depth), dtype=torch.int32, device=device)
        depths = numbers[: form.tile].contiguous()
        self.tokens, self.last = views["tokens"], views["last"]
        self.features = torch.zeros(form.tile, hidden, device=device, dtype=dtype)
        self.record = torch.zeros(1 + 3 * form.capacity, dtype=torch.int32, device=device)
        self.chain = Rows(views["start"], depths, depths.repeat(form.tile, 1))
        warp, key = views["warp"].view(torch.float32), views["key"].view(torch.int64)
        self.race = Race(views["filled"], key, warp, form.noisy, form.truncated)
        self.limits = Limits(views["max_depth"], views["prices"].view(torch.float32), views["stops"])
        self._starts = [views[f"level {level}"] for level in range(depth - 1)]
        self._depths = [number.repeat(width) for number in numbers[:depth]]

    def rows(self, level: int, paths: Tensor) -> tuple[Rows, Rows]:
        """Where nodes at depth ``level + 1`` are written, and what they see (``TritonEagleHead.forward``), given
        ``Growth.paths``. All of them stand at one position, in slots past those of the levels before."""
        depths = self._depths[level]
        return Rows(self._starts[level], depths - level * self._width, paths), Rows(self.race.length, depths, paths)

    def fill(self, tokens: Sequence[int], features: Tensor, view: View, tau: float, budget: Budget, depth: int) -> None:
        """The inputs of one draft: the last of ``view.tokens`` but one have ``features [n, H]``, and ``tokens [n]``
        come after those. Waits for nothing."""
        host, count, params = np.zeros(len(self._buffer), np.int32), len(view.tokens) - 1, view.chain.params
        own = {name: host[place] for name, place in self._places.items()}
        own["tokens"][: len(tokens)] = tokens
        own["start"][0], own["filled"][0], own["last"][0] = count - len(tokens), count, len(tokens) - 1
        own["max_depth"][0] = depth
        if self.form.noisy:
            assert view.stream is not None, "the noise of a draw"
            own["key"].view(np.uint64)[0] = view.stream.key
        own["warp"].view(np.float32)[:] = (params.temperature, tau, params.top_p, params.min_p, params.top_k)
        stops = sorted(view.stop_ids)[:_STOPS]
        own["stops"][:] = (*stops, *[-1] * (_STOPS - len(stops)))
        # Rows that only the next ones would pay for are grown: what is not worth it, whoever sets max_nodes knows.
        own["prices"].view(np.float32)[:] = budget.floors()[: self.form.capacity]
        for level in range(self._depth - 1):
            own[f"level {level}"][0] = count + level * self._width
        # Not pinned: staged before the call returns, so the next draft may be written without waiting for this one.
        self._buffer.copy_(torch.from_numpy(host), non_blocking=True)
        self.features[: len(tokens)].copy_(features)


@dataclass(slots=True)
class Seat:
    """What outlives a sequence, since captured graphs hold its addresses: keys and values ``kv [2 kv_heads, slots,
    head_dim]``, ``cos, sin [>= slots, head_dim]``; inputs and graphs by form (None: used once, not captured yet)."""

    kv: Tensor
    cos: Tensor
    sin: Tensor
    frames: dict[Form, Frame] = field(default_factory=dict)
    graphs: dict[Form, Callable[[], None] | None] = field(default_factory=dict)
