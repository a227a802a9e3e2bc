"""One large weight of a shape-scaled model: random content, the small model's weight inside, and zero where it must be.

What a real input would add to a padded output is zero, and so is what a padded one would add to a real output, since
its input is: columns that read padded inputs hold random content. Packed weights keep random codes everywhere and take
their zeros from the scales of whole groups, so that they are read and multiplied like any others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from quantspec.errors import UsageError
from quantspec.models.weights import to_dense
from quantspec.numerics.affine import QuantizedWeight, quantize
from quantspec.numerics.packing import pack_codes
from quantspec.numerics.scheme import Scheme

_WORD = 32
_HINT = "scale it with --bits 16, which has no groups"


class Sheet(Protocol):
    """A weight ``[N, K]`` of linear layer. It starts with random content."""

    def silence(self, cols: Tensor) -> None:
        """Columns from which no output gets anything."""

    def put(self, weight: Tensor | QuantizedWeight, rows: Tensor, cols: Tensor) -> None:
        """The small weight ``[n, k]``, in silenced columns: output i at ``rows[i]``, input j at ``cols[j]``."""

    def mark(self, rows: Tensor, col: int, value: float) -> None:
        """A power of two (times -1) in one silenced column, whose group has no other input than zeros."""

    def tensors(self, module: str) -> dict[str, Tensor]:
        """What stands for it in a checkpoint."""


SheetOf = Callable[[int, int], Sheet]
"""A random sheet with N rows and K columns."""


class Noise:
    """Random content without end; the same for the same ``seed``."""

    def __init__(self, seed: int) -> None:
        self._bits = np.random.SFC64(seed)

    def words(self, rows: int, cols: int) -> Tensor:
        """int32 ``[rows, cols]``, all bits random."""
        count = rows * cols
        drawn = self._bits.random_raw(-(-count // 2)).view(np.int32)[:count]
        return torch.from_numpy(drawn).view(rows, cols)

    def floats(self, rows: int, cols: int) -> Tensor:
        """bfloat16 ``[rows, cols]`` of either sign, whose products with a row of size 1 have about size 1."""
        count = rows * cols
        bits = self.words(1, -(-count // 2)).view(torch.int16)[0, :count]
        exponent = int(np.floor(np.log2(cols**-0.5 / 1.5))) + 127  # values lie between 2^e and 2^(e + 1)
        bits &= -0x7F81  # sign and mantissa, 0x807f
        bits |= exponent << 7
        return bits.view(torch.bfloat16).view(rows, cols)


@dataclass(frozen=True, slots=True)
class Packed:
    """Makes sheets of one symmetric scheme, in compressed-tensors' ``pack-quantized`` form."""

    scheme: Scheme
    noise: Noise

    def __call__(self, rows: int, cols: int) -> PackedSheet:
        return PackedSheet(rows, cols, self.scheme, self.noise)


class PackedSheet:
    """See ``Sheet``."""

    def __init__(self, rows: int, cols: int, scheme: Scheme, noise: Noise) -> None:
        assert scheme.symmetric
        assert cols % scheme.group_size == 0, "whole groups"
        self._shape, self._scheme = (rows, cols), scheme
        self._per_group = scheme.group_size * scheme.bits // _WORD
        self._words = noise.words(rows, cols * scheme.bits // _WORD)
        scale = 12**0.5 / 2**scheme.bits / cols**0.5  # uniform codes have a deviation of 2^bits / sqrt(12)
        self._scale = torch.full((rows, cols // scheme.group_size), scale, dtype=getattr(torch, scheme.dtype))

    def silence(self, cols: Tensor) -> None:
        self._scale[:, torch.unique(cols // self._scheme.group_size)] = 0

    def put(self, weight: Tensor | QuantizedWeight, rows: Tensor, cols: Tensor) -> None:
        if isinstance(weight, Tensor):
            weight = quantize(weight.float(), self._scheme)
        assert weight.order is None
        assert weight.scheme.bits == self._scheme.bits
        size, old = self._scheme.group_size, weight.scheme.group(weight.codes.shape[1])
        for group in torch.unique(cols // size).tolist():
            inside = (cols // size == group).nonzero()[:, 0]
            source, *others = torch.unique(inside // old).tolist()
            if others:
                raise UsageError("groups of the small model's weights do not stay together in that shape", hint=_HINT)
            codes = torch.zeros(len(rows), size, dtype=torch.int8)
            codes[:, cols[inside] - group * size] = weight.codes[:, inside]
            self._write(rows, group, codes, weight.scale[:, source].to(self._scale.dtype))

    def mark(self, rows: Tensor, col: int, value: float) -> None:
        group, place = divmod(col, self._scheme.group_size)
        codes = torch.zeros(len(rows), self._scheme.group_size, dtype=torch.int8)
        code = self._scheme.q_min if value < 0 else -self._scheme.q_min // 2
        codes[:, place] = code
        self._write(rows, group, codes, torch.tensor(value / code, dtype=self._scale.dtype))

    def _write(self, rows: Tensor, group: int, codes: Tensor, scale: Tensor) -> None:
        part = slice(group * self._per_group, (group + 1) * self._per_group)
        self._words[rows, part] = pack_codes(codes, self._scheme.bits)
        self._scale[rows, group] = scale

    def tensors(self, module: str) -> dict[str, Tensor]:
        return {
            f"{module}.weight_packed": self._words,
            f"{module}.weight_scale": self._scale,
            f"{module}.weight_shape": torch.tensor(self._shape, dtype=torch.int64),
        }


@dataclass(frozen=True, slots=True)
class Dense:
    """Makes sheets in bfloat16."""

    noise: Noise

    def __call__(self, rows: int, cols: int) -> DenseSheet:
        return DenseSheet(self.noise.floats(rows, cols))


class DenseSheet:
    """See ``Sheet``."""

    def __init__(self, content: Tensor) -> None:
        self._content = content

    def silence(self, cols: Tensor) -> None:
        self._content[:, cols] = 0

    def put(self, weight: Tensor | QuantizedWeight, rows: Tensor, cols: Tensor) -> None:
        self._content[rows[:, None], cols] = to_dense(weight).to(self._content.dtype)

    def mark(self, rows: Tensor, col: int, value: float) -> None:
        self._content[rows, col] = value

    def tensors(self, module: str) -> dict[str, Tensor]:
        return {f"{module}.weight": self._content}
