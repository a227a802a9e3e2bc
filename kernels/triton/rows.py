"""What the kernels must know of a forward's rows, on the device, and what they ask of their arguments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantspec.numerics.kv import KVFormat

ALIGNMENT = 16


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of one sequence (see ``types.Batch``) as int32 tensors, so that a captured graph serves any context.

    ``cached [1]`` slots are committed, and row i is written to slot ``cached + i``. It stands at position
    ``cached + depths[i]``, and ``paths[i, : depths[i] + 1]`` are the rows that it attends besides the cached ones: its
    ancestors, root first, and itself.
    """

    cached: Tensor
    depths: Tensor
    paths: Tensor

    @classmethod
    def of(cls, parents: Sequence[int], cached: int, device: torch.device) -> Rows:
        """From one sequence's ``parents`` (-1: the last cached token)."""
        assert parents, "no rows"
        paths: list[list[int]] = []
        for i, parent in enumerate(parents):
            assert -1 <= parent < i, "a parent must stand before its child"
            paths.append([*(paths[parent] if parent >= 0 else ()), i])
        width = max(map(len, paths))
        padded = [path + [0] * (width - len(path)) for path in paths]
        return cls(*(_int32(values, device) for values in ([cached], [len(path) - 1 for path in paths], padded)))

    def __len__(self) -> int:
        return self.depths.shape[0]


def _int32(values: Sequence[object], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def check_layout(*tensors: Tensor) -> None:
    """All on one device, contiguous, and aligned: Triton compiles other code, with other sums, for unaligned data."""
    for tensor in tensors:
        assert tensor.device == tensors[0].device, "tensors on different devices"
        assert tensor.is_contiguous(), "a tensor with gaps"
        assert tensor.data_ptr() % ALIGNMENT == 0, "an unaligned tensor: clone it"


def check_row(kv: Tensor, head_dim: int, form: KVFormat | None) -> None:
    """The rows of ``kv [heads, slots, width]`` hold so many channels, in ``form``, if there is one."""
    assert kv.shape[2] == (head_dim if form is None else form.row_bytes), "a cache of other heads"
    assert (kv.dtype == torch.uint8) == (form is not None), "a cache of another precision"
    assert form is None or form.head_dim == head_dim, "a form of other heads"
