"""What the tokens drafted so far say of a P-EAGLE head's next slot: a small network after its one forward.

A slot's output does not depend on the tokens before it, so that a slot past an unsure one speaks for all of them at
once. Here its logits are corrected by the token right before it, as by the Markov head of DSpark or the path selector
of DFlash2: with h the slot's output and e that token's embedding, ``V down(silu(gate [h, e]) * up [h, e])`` is added.
It is asked once a level of a tree, and reads little: of a rank of 128 a sixteenth of an LM head of width 2048, and what
h gives is computed for all slots together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from quantspec.drafters.head_tensors import Matrix

NAMES = tuple(f"path.{name}.weight" for name in ("gate_proj", "up_proj", "down_proj", "lm_head"))


class PathNetwork:
    """The path network of a head whose outputs have ``width``. ``tensors`` have at least ``NAMES``; ``linear`` makes a
    product ``[n, K] -> [n, N]`` with a weight ``[N, K]``."""

    def __init__(
        self, tensors: Mapping[str, Tensor], width: int, linear: Callable[[Matrix], Callable[[Tensor], Tensor]]
    ) -> None:
        gate, up, down, lm_head = (tensors[name] for name in NAMES)
        self._of_output = linear(torch.cat((gate[:, :width], up[:, :width])))
        self._of_token = linear(torch.cat((gate[:, width:], up[:, width:])))
        self._down, self._lm_head = linear(down), linear(lm_head)

    def read(self, outputs: Tensor) -> Tensor:
        """Of slots with normed ``outputs [n, width]``, what ``after`` needs of each ``[n, R]``."""
        return self._of_output(outputs)

    def after(self, slot: Tensor, embedded: Tensor) -> Tensor:
        """What is added ``[m, draft_vocab_size]`` to the logits of one slot, ``read`` as ``[R]``, after each of m
        tokens ``embedded [m, width]``."""
        gate, up = (slot + self._of_token(embedded)).chunk(2, dim=1)
        return self._lm_head(self._down(F.silu(gate) * up))
