"""What calibration measures on the inputs of linear layers, summed batch by batch."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Need = Literal["hessian", "magnitude", "rows"]
"""What a method or transform must know of a linear layer's inputs."""
_BLOCK = 1024  # columns of one block row of a Hessian


class Hessian:
    """``X^T X / rows`` of a linear layer's inputs ``[.., K]``: ``matrix [K, K]`` in fp32."""

    def __init__(self, k: int, device: str | torch.device = "cpu") -> None:
        self._upper = torch.zeros(k, k, device=device)
        self._mirrored = True
        self.rows = 0

    def add(self, inputs: Tensor) -> None:
        flat = inputs.reshape(-1, inputs.shape[-1]).float()
        # A running mean: the sum over many tokens of a large model would leave fp32's exact range.
        keep, self.rows = self.rows, self.rows + len(flat)
        for start in range(0, len(self._upper), _BLOCK):  # the product is symmetric: half of the work will do
            block = self._upper[start : start + _BLOCK, start:]
            block.addmm_(flat[:, start : start + _BLOCK].T, flat[:, start:], beta=keep / self.rows, alpha=1 / self.rows)
        self._mirrored = False

    @property
    def matrix(self) -> Tensor:
        if not self._mirrored:
            for start in range(0, len(self._upper), _BLOCK):
                end = start + _BLOCK
                self._upper[end:, start:end] = self._upper[start:end, end:].T
            self._mirrored = True
        return self._upper


class Magnitude:
    """Mean and largest absolute value of each input channel: ``mean`` and ``largest`` ``[K]``."""

    def __init__(self, k: int, device: str | torch.device = "cpu") -> None:
        self.mean = torch.zeros(k, device=device)
        self.largest = torch.zeros(k, device=device)
        self.rows = 0

    def add(self, inputs: Tensor) -> None:
        flat = inputs.reshape(-1, inputs.shape[-1]).float().abs()
        self.rows += len(flat)
        self.mean += (flat.sum(0) - self.mean * len(flat)) / self.rows
        self.largest = torch.maximum(self.largest, flat.amax(0))


class SampleRows:
    """Up to ``limit`` input rows, taken evenly from a stream of known length: ``matrix [n, K]`` in fp32."""

    def __init__(self, total: int, limit: int) -> None:
        self.every = max(1, -(-total // limit))
        self._seen = 0
        self._kept: list[Tensor] = []

    def add(self, inputs: Tensor) -> None:
        flat = inputs.reshape(-1, inputs.shape[-1])
        first = -self._seen % self.every
        self._kept.append(flat[first :: self.every].float().clone())
        self._seen += len(flat)

    @property
    def matrix(self) -> Tensor:
        return torch.cat(self._kept)


@dataclass
class Statistics:
    """What was observed on the inputs that a stage's linear layers share; None for what nobody needs."""

    hessian: Hessian | None = None
    magnitude: Magnitude | None = None
    rows: SampleRows | None = None

    @classmethod
    def of(
        cls, needs: Collection[Need], k: int, device: str | torch.device = "cpu", total: int = 0, limit: int = 4096
    ) -> Statistics:
        """Observers for inputs of ``k`` channels; ``total`` rows will come, of which ``limit`` are kept."""
        return cls(
            Hessian(k, device) if "hessian" in needs else None,
            Magnitude(k, device) if "magnitude" in needs else None,
            SampleRows(total, limit) if "rows" in needs else None,
        )

    def add(self, inputs: Tensor) -> None:
        for observer in (self.hessian, self.magnitude, self.rows):
            if observer is not None:
                observer.add(inputs)

    def add_all(self, inputs: Iterable[Tensor]) -> Statistics:
        for batch in inputs:
            self.add(batch)
            del batch  # or it would stand beside the next one, which is made before the name is bound anew
        return self

    @property
    def nbytes(self) -> int:
        """Bytes of the Hessian, next to which the rest is small."""
        return 0 if self.hessian is None else 4 * len(self.hessian._upper) ** 2
