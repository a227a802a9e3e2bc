"""Acceptance of drafts, on tokens and probabilities alone.

The rule of the house is ``accept``: a node stands iff it carries the target's own token at its place, so the text does
not depend on the draft at all. ``ratio_accept`` is speculative sampling (Leviathan et al., arXiv 2211.17192) for
chains.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from quantspec.types import Draft

if TYPE_CHECKING:
    from torch import Tensor


def accept(draft: Draft, y: Sequence[int]) -> tuple[int, ...]:
    """The accepted nodes from the root down.

    ``y [n + 1]`` is the target's token after the last committed token (row 0) and after each node. Siblings are
    distinct, so at most one child of a node carries its y.
    """
    path: list[int] = []
    at = -1
    for node, (token, parent) in enumerate(zip(draft.tokens, draft.parents, strict=True)):
        if parent == at and token == y[at + 1]:  # children stand after their parent: one pass finds the whole path
            path.append(node)
            at = node
    return tuple(path)


def residual(p: Tensor, q: Tensor) -> Tensor:
    """``norm(max(p - q, 0))``: what is left of p ``[V]`` after a proposal from q was rejected. Both sum to 1."""
    left = (p - q).clamp_min(0)
    mass = left.sum()
    return left / mass if mass > 0 else p  # p and q differ by rounding alone


def ratio_accept(
    tokens: Sequence[int],
    p: Tensor,
    q: Tensor | None,
    coin: Callable[[int], float],
    draw: Callable[[Tensor, int], int],
) -> tuple[int, int]:
    """How many tokens of a chain stand, and the token that follows them.

    ``p [n + 1, V]`` and ``q [n, V]`` are the warped probabilities; None says that the chain was not sampled, which
    makes q a point mass on each token. Token i stands if ``coin(i) < p_i / q_i``; the first that does not is replaced
    by a ``draw(probabilities, i)`` from the residual; if all stand, the next token is drawn from ``p[n]``.
    """
    for i, token in enumerate(tokens):
        q_row = torch.nn.functional.one_hot(torch.tensor(token), p.shape[1]).to(p) if q is None else q[i].to(p)
        if coin(i) * q_row[token] >= p[i, token]:
            return i, draw(residual(p[i], q_row), i)
    return len(tokens), draw(p[-1], len(tokens))
