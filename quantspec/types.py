"""Records that pass between the floors: parameters, drafts, verdicts, chunks and ragged batches.

Plain Python on purpose: importing this module never imports torch. Token-level fields are tuples of ints; only fields
that carry model rows (``q_rows``, ``taps``) hold tensors.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import TYPE_CHECKING

from quantspec.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

Tap = int | str
"""A residual stream to hand out: a 0-based layer (the stream *after* it), ``"embed"``, or ``"norm"`` (after the final
norm)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """What the user asks of the text. The output is a function of these, the target, the prompt and the seed alone.

    ``temperature`` 0 is greedy. ``top_k`` 0, ``top_p`` 1 and ``min_p`` 0 are off. ``repetition_penalty`` covers prompt
    and output, ``presence_penalty`` and ``frequency_penalty`` the output. ``seed`` None draws one and reports it.
    ``logprobs`` asks for that many alternatives per token (0: only the token's own), from the raw distribution.
    """

    max_new_tokens: int = 256
    min_new_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    seed: int | None = None
    n: int = 1
    logprobs: int | None = None

    def __post_init__(self) -> None:
        for name, ok, rule in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("min_new_tokens", 0 <= self.min_new_tokens <= self.max_new_tokens, "from 0 to max_new_tokens"),
            ("temperature", self.temperature >= 0 and math.isfinite(self.temperature), "a finite number of at least 0"),
            ("top_k", self.top_k >= 0, "at least 0 (0 is off)"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p < 1, "from 0 to below 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "a finite number above 0"),
            ("presence_penalty", math.isfinite(self.presence_penalty), "finite"),
            ("frequency_penalty", math.isfinite(self.frequency_penalty), "finite"),
            ("n", 1 <= self.n <= 1024, "from 1 to 1024"),
            ("logprobs", self.logprobs is None or 0 <= self.logprobs <= 100, "from 0 to 100"),
            ("stop", not isinstance(self.stop, str) and all(self.stop), "a tuple of strings that are not empty"),
            ("seed", self.seed is None or 0 <= self.seed < 2**63, "from 0 to 2^63 - 1"),
        ):
            if not ok:
                raise UsageError(f"{name} must be {rule}, not {getattr(self, name)!r}")


@dataclass(frozen=True, slots=True)
class Draft:
    """A tree of proposed tokens below the last committed token (which is not in it); a chain is a tree of one branch.

    ``parents[i] < i``, and -1 stands for the last committed token. ``scores[i]`` is the estimated probability that node
    i is accepted (a path product, so never above its parent's). ``stages[i]`` names the level that proposed it.
    Siblings that carry the same token are merged on construction. ``q_rows [n, V]`` is for the ratio rule alone.
    """

    tokens: tuple[int, ...] = ()
    parents: tuple[int, ...] = ()
    scores: tuple[float, ...] = ()
    stages: tuple[str, ...] = ()
    q_rows: Tensor | None = None

    def __post_init__(self) -> None:
        n = len(self.tokens)
        assert len(self.parents) == len(self.scores) == len(self.stages) == n, "ragged draft"
        assert all(-1 <= parent < i for i, parent in enumerate(self.parents)), "a parent must stand before its child"
        if len(set(zip(self.parents, self.tokens, strict=True))) < n:
            self._merge_duplicate_siblings()

    def _merge_duplicate_siblings(self) -> None:
        kept: dict[tuple[int, int], int] = {}
        keep: list[tuple[int, int]] = []
        new_id = {-1: -1}
        for i, (parent, token) in enumerate(zip(self.parents, self.tokens, strict=True)):
            key = (new_id[parent], token)
            if key not in kept:
                kept[key] = len(keep)
                keep.append((i, new_id[parent]))
            new_id[i] = kept[key]
        rows = [i for i, _ in keep]
        object.__setattr__(self, "parents", tuple(parent for _, parent in keep))
        for name in ("tokens", "scores", "stages"):
            values = getattr(self, name)
            object.__setattr__(self, name, tuple(values[i] for i in rows))
        if self.q_rows is not None:
            object.__setattr__(self, "q_rows", self.q_rows[rows])

    def __len__(self) -> int:
        return len(self.tokens)

    @classmethod
    def chain(
        cls, tokens: Sequence[int], scores: Sequence[float], stages: Sequence[str], q_rows: Tensor | None = None
    ) -> Draft:
        """A draft of one branch."""
        return cls(tuple(tokens), tuple(range(-1, len(tokens) - 1)), tuple(scores), tuple(stages), q_rows)

    @property
    def is_chain(self) -> bool:
        return self.parents == tuple(range(-1, len(self.tokens) - 1))

    def depths(self) -> list[int]:
        """Depth of each node; a child of the last committed token has depth 1."""
        depths: list[int] = []
        for parent in self.parents:
            depths.append(depths[parent] + 1 if parent >= 0 else 1)
        return depths

    def select(self, nodes: Sequence[int]) -> Draft:
        """The draft of these nodes alone, in this (ascending) order; the parent of each must be among them."""
        new_id = {-1: -1, **{node: i for i, node in enumerate(nodes)}}
        return Draft(
            tuple(self.tokens[node] for node in nodes),
            tuple(new_id[self.parents[node]] for node in nodes),
            tuple(self.scores[node] for node in nodes),
            tuple(self.stages[node] for node in nodes),
            None if self.q_rows is None else self.q_rows[list(nodes)],
        )

    def best_chain(self) -> Draft:
        """The branch that takes the child with the best score at every node."""
        best: dict[int, int] = {}
        for node, parent in enumerate(self.parents):
            if parent not in best or self.scores[node] > self.scores[best[parent]]:
                best[parent] = node
        chain, at = [], -1
        while at in best:
            at = best[at]
            chain.append(at)
        return self.select(chain)


EMPTY_DRAFT = Draft()
"""No proposal: the step becomes one step of plain decoding."""


@dataclass(frozen=True, slots=True)
class PendingDraft:
    """A tree that a drafter has put together on the device and nobody on the host has seen.

    ``record`` int32 ``[1 + 3 * capacity]`` holds the number of nodes, then ``capacity`` each of tokens, parents (-1:
    the last committed token) and the bits of fp32 scores, as in ``Draft``; behind the nodes stand token 0 and parent
    -1. Siblings are distinct, tokens are the target's, and no node is deeper than ``max_depth``.
    """

    record: Tensor
    capacity: int
    max_depth: int
    stage: str

    @property
    def tokens(self) -> tuple[int, ...]:
        """Stand-ins: as many tokens as there may be."""
        return (0,) * self.capacity

    @property
    def parents(self) -> tuple[int, ...]:
        """Stand-ins: every node a child of the last committed token."""
        return (-1,) * self.capacity

    def resolve(self, host_record: Sequence[int] | None = None) -> Draft:
        """The draft itself, from a copy of ``record`` on the host (None: copy it now, which waits for the device)."""
        numbers: Sequence[int] = self.record.tolist() if host_record is None else host_record
        n, size = numbers[0], self.capacity
        assert len(numbers) == 1 + 3 * size, "the record of another draft"
        assert 0 <= n <= size, "a damaged record of a draft"
        tokens, parents, bits = (tuple(numbers[at : at + n]) for at in (1, 1 + size, 1 + 2 * size))
        draft = Draft(tokens, parents, struct.unpack(f"{n}f", struct.pack(f"{n}i", *bits)), (self.stage,) * n)
        assert len(draft) == n, "a draft on the device has equal siblings"
        return draft


Proposal = Draft | PendingDraft
"""What a drafter may propose."""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Raw log-probability of an emitted token and of the most likely alternatives at its position, best first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the verifier made of one draft.

    ``path`` are the accepted nodes from the root down, ``tokens`` their tokens, and ``next_token`` the target's own
    draw after them: ``emitted`` is all of these, never empty. ``y [n + 1]`` is the target's token after the last
    committed token (row 0) and after each node, rejected ones too. ``draft`` is what was verified, after any cut:
    ``path``, ``y`` and ``top`` count its nodes. ``top`` is ``(ids, scores)``, each ``[n + 1, k]``. ``taps`` has, for
    each asked tap, one row ``[H]`` per newly cached token, in order. ``finish`` is set by trimming.
    """

    path: tuple[int, ...]
    tokens: tuple[int, ...]
    next_token: int
    y: tuple[int, ...]
    stages: tuple[str, ...]
    draft: Draft = EMPTY_DRAFT
    top: tuple[Tensor, Tensor] | None = None
    taps: Mapping[Tap, Tensor] = field(default_factory=dict)
    logprobs: tuple[TokenLogprob, ...] = ()
    finish: str | None = None

    @property
    def emitted(self) -> tuple[int, ...]:
        return (*self.tokens, self.next_token)

    def cut(self, length: int, finish: str | None = None) -> Verdict:
        """The same verdict as if the draft had ended sooner: its first ``length`` (at least 1) emitted tokens."""
        emitted = self.emitted
        assert 1 <= length <= len(emitted)
        dropped = len(emitted) - length
        return replace(
            self,
            path=self.path[: length - 1],
            tokens=self.tokens[: length - 1],
            next_token=emitted[length - 1],
            stages=self.stages[:length],
            taps={tap: rows[: rows.shape[0] - dropped] for tap, rows in self.taps.items()},
            logprobs=self.logprobs[:length],
            finish=finish,
        )


@dataclass(frozen=True, slots=True)
class Chunk:
    """What one step adds to a stream. ``text`` may lag behind ``tokens`` while a character or stop string is
    incomplete."""

    tokens: tuple[int, ...]
    stages: tuple[str, ...]
    text: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: str | None = None
    index: int = 0


@dataclass(frozen=True, slots=True)
class Needs:
    """What a drafter asks of its verifier's forward: residual streams (``taps``) and the ``top_k`` of every row."""

    taps: tuple[Tap, ...] = ()
    top_k: int = 0


@dataclass(frozen=True, slots=True)
class Budget:
    """What a draft may cost. ``price(k)`` is what the k-th extra row costs, in accepted tokens: nodes are added, the
    best first, while their scores together gain over their prices. 0 nodes ask for an empty draft.

    ``prices`` are those of rows 1, 2, ... from a cost curve (beyond them, and without them: ``min_score``).
    ``level_price`` is what one more level of a tree costs: it is not grown if it promises no more.
    """

    max_nodes: int
    max_depth: int
    min_score: float = 0.0
    prices: tuple[float, ...] = ()
    level_price: float = 0.0

    def price(self, k: int) -> float:
        """What the ``k``-th extra row (1-based) costs; infinite past ``max_nodes``."""
        if k > self.max_nodes:
            return math.inf
        return self.prices[k - 1] if k <= len(self.prices) else self.min_score

    def worth(self, scores: Sequence[float]) -> int:
        """How many of the nodes with these falling scores to keep: those that together gain most over their prices.

        One that does not pay alone is kept where those after it pay for both, as at the start of a kernel's tile.
        """
        scores, count, own = scores[: self.max_nodes], 0, len(self.prices)
        if not own:
            return next((k for k, score in enumerate(scores) if score <= self.min_score), len(scores))
        gain = best = 0.0
        for k, score in enumerate(scores):
            gain += score - (self.prices[k] if k < own else self.min_score)
            if gain > best:
                best, count = gain, k + 1
        return count

    def floors(self) -> list[float]:
        """For each row the least price from it on: a node that does not exceed it is not worth keeping, whatever else
        is grown."""
        beyond = [self.min_score] * (self.max_nodes - len(self.prices))
        return [*accumulate(reversed([*self.prices[: self.max_nodes], *beyond]), min)][::-1]


@dataclass(frozen=True, slots=True)
class Batch:
    """Ragged rows for one forward of ``b`` sequences, without padding: sequence s owns rows
    ``seq_starts[s]:seq_starts[s+1]``.

    Within a sequence rows are numbered from 0; row i's token is ``tokens``, its parent row ``parents`` (-1: the last
    cached token), and it is written to cache slot ``cached[s] + i``. A row attends slots ``0..cached[s]-1``, its
    ancestor rows, and itself, in that order, which is depth order. ``num_logits[s]`` trailing rows of each sequence get
    logits.
    """

    tokens: tuple[int, ...]
    parents: tuple[int, ...]
    cached: tuple[int, ...]
    seq_starts: tuple[int, ...]
    num_logits: tuple[int, ...]

    @classmethod
    def of(
        cls,
        rows: Sequence[tuple[Sequence[int], Sequence[int]]],
        cached: Sequence[int],
        num_logits: Sequence[int] | None = None,
    ) -> Batch:
        """From one ``(tokens, parents)`` pair per sequence; by default every row gets logits."""
        tokens = tuple(token for sequence, _ in rows for token in sequence)
        parents = tuple(parent for _, sequence in rows for parent in sequence)
        lengths = [len(sequence) for sequence, _ in rows]
        return cls(
            tokens,
            parents,
            tuple(cached),
            (0, *accumulate(lengths)),
            tuple(lengths if num_logits is None else num_logits),
        )

    @classmethod
    def chain(cls, tokens: Sequence[int], cached: int = 0, num_logits: int | None = None) -> Batch:
        """One sequence of consecutive tokens."""
        rows = [(tokens, range(-1, len(tokens) - 1))]
        return cls.of(rows, [cached], None if num_logits is None else [num_logits])

    def ancestors(self) -> tuple[tuple[int, ...], ...]:
        """Per row, the rows (numbered within the sequence) it attends besides the cached prefix: root first, itself
        last."""
        result: list[tuple[int, ...]] = []
        for start, end in zip(self.seq_starts, self.seq_starts[1:], strict=False):
            for i in range(start, end):
                parent = self.parents[i]
                result.append((*(result[start + parent] if parent >= 0 else ()), i - start))
        return tuple(result)

    def positions(self) -> tuple[int, ...]:
        """Absolute position of each row: the cached length plus its depth."""
        result: list[int] = []
        for s, (start, end) in enumerate(zip(self.seq_starts, self.seq_starts[1:], strict=False)):
            for i in range(start, end):
                parent = self.parents[i]
                result.append(result[start + parent] + 1 if parent >= 0 else self.cached[s])
        return tuple(result)

    def slots(self) -> tuple[int, ...]:
        """Cache slot of each row in its own sequence's cache."""
        return tuple(
            self.cached[s] + i - start
            for s, (start, end) in enumerate(zip(self.seq_starts, self.seq_starts[1:], strict=False))
            for i in range(start, end)
        )
