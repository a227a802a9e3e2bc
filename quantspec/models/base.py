"""What the verification core asks of a model and its cache. The native decoder, ``HFModel`` and the tests' table model
all answer to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from quantspec.types import Batch, Tap

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Output:
    """``logits [sum(num_logits), V]`` in fp32, and per asked tap one row ``[n, H]`` for *every* row of the batch."""

    logits: Tensor
    taps: Mapping[Tap, Tensor] = field(default_factory=dict)


class Cache(Protocol):
    """Keys and values of one sequence. Slots ``0..length-1`` are committed; a forward writes past them."""

    length: int
    """Committed slots. A forward with ``Batch.cached == length`` appends its rows provisionally."""
    chains_only: bool
    """True where rejected rows cannot be skipped (a recurrent or foreign cache): such a model is sent chains only."""

    def commit(self, rows: Sequence[int]) -> None:
        """Keep these rows of the last forward (numbered from 0 within the sequence), in order, right after ``length``;
        drop the others. A prefix 0, 1, 2, ... moves nothing."""

    def truncate(self, length: int) -> None:
        """Forget all committed slots from ``length`` on."""


class CausalModel(Protocol):
    """A causal language model that scores ragged rows against per-sequence caches."""

    vocab_size: int
    max_positions: int
    hidden_size: int
    weight_bytes: int
    """Bytes of all weights as the checkpoint stores them."""
    row_invariant: bool
    """True when a row's bits are the same at any width, chunking and batch (then runs are labelled ``exact``)."""

    backend: str
    """What computes, as in ``kernels.dispatch.BACKENDS``; "transformers" for a foreign model."""
    notes: tuple[str, ...]
    """What is not as one would expect, in words for the user."""

    def new_cache(self, max_length: int, max_nodes: int) -> Cache:
        """An empty cache for ``max_length`` committed tokens and ``max_nodes`` rows in flight."""

    def forward(self, batch: Batch, caches: Sequence[Cache], taps: Sequence[Tap] = ()) -> Output:
        """Score the batch's rows, writing their keys and values past each cache's committed slots."""
