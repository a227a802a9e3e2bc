"""What the verification core asks of a model and its cache. The native decoder, ``HFModel`` and the tests' table model
all answer to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from quantspec.types import Batch, PendingDraft, Tap

if TYPE_CHECKING:
    from torch import Tensor

    from quantspec.kernels.draws import Layout


@dataclass(frozen=True, slots=True)
class Output:
    """``logits [sum(num_logits), V]`` in fp32, per asked tap one row ``[n, H]`` for *every* row of the batch, and of a
    model that draws the ``draws`` of each row with logits, int32 ``[sum(num_logits), layout.width]``."""

    logits: Tensor
    taps: Mapping[Tap, Tensor] = field(default_factory=dict)
    draws: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Draw:
    """How one sequence's tokens are drawn: the key of its noise (None: temperature 0), and whether the host still has
    to truncate its rows, which puts off the noise until then."""

    key: int | None = None
    temperature: float = 1.0
    truncates: bool = False


NO_DRAW = Draw()


@dataclass(frozen=True, slots=True)
class Drawing:
    """What a model that draws is asked besides logits: one ``Draw`` per sequence, the ``layout`` of what it hands out,
    and the drafts that only the device knows, by sequence. The last rows of those are stand-ins in the batch."""

    draws: Sequence[Draw]
    layout: Layout
    pending: Mapping[int, PendingDraft] = field(default_factory=dict)


class Cache(Protocol):
    """Keys and values of one sequence. Slots ``0..length-1`` are committed; a forward writes past them."""

    length: int
    """Committed slots. A forward with ``Batch.cached == length`` appends its rows provisionally."""
    chains_only: bool
    """True where rejected rows cannot be skipped (a recurrent or foreign cache): such a model is sent chains only."""

    @property
    def nbytes(self) -> int:
        """Bytes that it takes, rows in flight included."""

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


@runtime_checkable
class DrawingModel(Protocol):
    """A ``CausalModel`` that draws where its logits are, so that a step brings its verdicts to the host and nothing
    else."""

    vocab_size: int

    def draw(self, batch: Batch, caches: Sequence[Cache], taps: Sequence[Tap], drawing: Drawing) -> Output:
        """``forward``, and the draws of its rows. The table stays on the device, like the logits."""
