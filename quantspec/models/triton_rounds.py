"""A batch as rounds of a bounded number of rows per sequence."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from quantspec.kernels.spans import is_chain
from quantspec.types import Batch

MOST_ROWS = 256
"""Rows of a chain in a round: bounds attention's workspace, which grows with rows times slots. Trees go in one."""


@dataclass(slots=True)
class Round:
    """Rows of some sequences that go through the layers together. ``sequences`` and, for each, ``parents`` (counted
    from its first row here) and ``cached`` slots before that row; ``tokens`` and ``rows``, their numbers in the batch;
    ``with_logits``, which of this round's rows get logits, and ``logits``, where among the batch's those go."""

    sequences: list[int] = field(default_factory=list)
    parents: list[tuple[int, ...]] = field(default_factory=list)
    cached: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    with_logits: list[int] = field(default_factory=list)
    logits: list[int] = field(default_factory=list)

    @property
    def n(self) -> int:
        return len(self.tokens)


def rounds_of(batch: Batch) -> Iterator[Round]:
    """The batch's rows in an order in which every row comes after its ancestors."""
    left = [(s, start) for s, start in enumerate(batch.seq_starts[:-1]) if start < batch.seq_starts[s + 1]]
    first_logit = [sum(batch.num_logits[:s]) for s in range(len(batch.num_logits))]
    while left:
        part, later = Round(), []
        for s, start in left:
            begin, end = batch.seq_starts[s], batch.seq_starts[s + 1]
            parents = batch.parents[begin:end]
            stop = min(start + MOST_ROWS, end) if is_chain(parents) else end
            if stop < end:
                later.append((s, stop))
            silent = end - batch.num_logits[s]
            for row in range(max(start, silent), stop):
                part.with_logits.append(part.n + row - start)
                part.logits.append(first_logit[s] + row - silent)
            part.sequences.append(s)
            part.parents.append(parents[: stop - start])  # a chain's parents, from wherever they are counted
            part.cached.append(batch.cached[s] + start - begin)
            part.tokens.extend(batch.tokens[start:stop])
            part.rows.extend(range(start, stop))
        yield part
        left = later
