"""Repetition, presence and frequency penalties over the tokens of one path."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from quantspec.types import SamplingParams

Row = NDArray[np.float32]


class History:
    """The distinct tokens of a prompt and an output, and how often each is in the output. Never changed once made."""

    def __init__(self, prompt: Sequence[int], output: Sequence[int]) -> None:
        counts = dict.fromkeys(prompt, 0)
        counts.update(Counter(output))
        self.ids = np.fromiter(counts.keys(), np.int64, len(counts))
        self.counts = np.fromiter(counts.values(), np.float32, len(counts))
        self.place = {token: i for i, token in enumerate(counts)}

    def plus(self, tokens: Sequence[int]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Distinct ids and output counts of the path that goes on with ``tokens``."""
        known, new = self.counts.copy(), dict[int, int]()
        for token in tokens:
            if token in self.place:
                known[self.place[token]] += 1
            else:
                new[token] = new.get(token, 0) + 1
        if not new:
            return self.ids, known
        return np.append(self.ids, list(new.keys())), np.append(known, np.array(list(new.values()), np.float32))


def penalize(row: Row, ids: NDArray[np.int64], counts: NDArray[np.float32], params: SamplingParams) -> None:
    """Lower logits ``[V]`` in place. Entry by entry, so that neither order nor grouping of the ids shows in the result.

    Repetition (arXiv 1909.05858) divides a positive logit and multiplies a negative one, for all ids; presence and
    frequency subtract, for ids with a count.
    """
    values = row[ids]
    if params.repetition_penalty != 1:
        penalty = np.float32(params.repetition_penalty)
        values = np.where(values > 0, values / penalty, values * penalty)
    if params.presence_penalty or params.frequency_penalty:
        values -= np.float32(params.presence_penalty) * (counts > 0) + np.float32(params.frequency_penalty) * counts
    row[ids] = values
