"""Linear layers on the CUDA kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from quantspec.errors import UsageError
from quantspec.kernels.cuda.library import THREADS, WIDTHS, kernel_name, load
from quantspec.kernels.cuda.packed import PackedWeight, Params

MAX_ROWS = WIDTHS[-1]
_MAX_ROW_BLOCKS = 1 << 16


class Workspace:
    """Where blocks leave partial sums: for any number of layers, as long as one runs at a time. 17 MB on 132
    multiprocessors, whatever the layers, so that graphs captured with it stay valid."""

    def __init__(self, device: torch.device) -> None:
        self.library = load(_index(device))
        # Two slots for each block, of a tile's rows times the most tokens: 64 values a thread.
        slots = 2 * self.library.multiprocessors
        self.partials = torch.empty(slots, THREADS * MAX_ROWS, dtype=torch.float32, device=device)
        self.arrivals = torch.zeros(_MAX_ROW_BLOCKS, dtype=torch.int32, device=device)


class CudaLinear:
    """``x [n, K] @ weight [N, K].T + bias [N]`` for fp16 or bf16 ``x`` on the device of the packed weight, n <= 64.

    A row of the output has the same bits for every n: the work is cut by shape and device alone, and partial sums are
    added in one order.
    """

    def __init__(self, weight: PackedWeight, workspace: Workspace, bias: Tensor | None = None) -> None:
        self.weight, self.device = weight, weight.tiles.device
        assert workspace.partials.device == self.device
        self.bias = None if bias is None else bias.to(self.device, torch.float32).contiguous()
        self._workspace, self._library = workspace, workspace.library
        with torch.cuda.device(self.device):
            self._library.prepare(weight.format)
            # Kernels copy weights before they wait for the one before them, which must not still be writing these.
            torch.cuda.current_stream(self.device).synchronize()
        self._blocks = blocks_for(weight.tiles.shape[0] * weight.tiles.shape[1], self._library.multiprocessors)

    def __call__(self, x: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
        """``[n, K]`` to ``[n, N]`` in the type of x or in fp32. Raises ``UsageError`` for another shape, type or
        device."""
        weight, types = self.weight, (torch.float16, torch.bfloat16)
        if x.dim() != 2 or x.shape[1] != weight.cols or x.dtype not in types or x.device != self.device:
            raise UsageError(
                f"a packed weight [{weight.rows}, {weight.cols}] on {self.device} needs rows [n, {weight.cols}] of "
                f"float16 or bfloat16 there, not {list(x.shape)} of {x.dtype} on {x.device}"
            )
        n = x.shape[0]
        if n > MAX_ROWS:
            raise UsageError(f"the CUDA kernels take {MAX_ROWS} rows at a time, not {n}")
        out_dtype = out_dtype or x.dtype
        assert out_dtype in (x.dtype, torch.float32)
        y = x.new_empty(n, weight.rows, dtype=out_dtype)
        if n:
            x = x if _copyable(x) else _copied(x)
            stream = torch.cuda.current_stream(self.device).cuda_stream
            with torch.cuda.device(self.device):
                params = self._params(x, y)
                self._library.launch(weight.format, kernel_name(x.dtype, n), self._blocks, params, stream)
        return y

    def _params(self, x: Tensor, y: Tensor) -> Params:
        row_blocks, k_tiles, _ = self.weight.tiles.shape
        assert row_blocks <= _MAX_ROW_BLOCKS
        return Params(
            weights=self.weight.tiles.data_ptr(),
            x=x.data_ptr(),
            y=y.data_ptr(),
            bias=None if self.bias is None else self.bias.data_ptr(),
            workspace=self._workspace.partials.data_ptr(),
            arrivals=self._workspace.arrivals.data_ptr(),
            x_stride=x.stride(0),
            y_stride=y.stride(0),
            n=x.shape[0],
            rows=self.weight.rows,
            cols=-(-self.weight.cols // 8) * 8,
            row_blocks=row_blocks,
            k_tiles=k_tiles,
            bfloat_scales=self.weight.scale_dtype == torch.bfloat16,
            float_y=y.dtype == torch.float32,
        )


def blocks_for(tiles: int, multiprocessors: int) -> int:
    """How many blocks share the tiles: the fewest whose longest run is as short as it can be, and never more for more
    rows, since a row's bits depend on it."""
    longest = -(-tiles // multiprocessors)
    return -(-tiles // longest)


def _copyable(x: Tensor) -> bool:
    """Whether rows can be copied 16 bytes at a time."""
    return x.shape[1] % 8 == 0 and x.stride(1) == 1 and x.data_ptr() % 16 == 0 and x.stride(0) % 8 == 0


def _copied(x: Tensor) -> Tensor:
    """The same values in rows of whole 16 bytes, filled up with zeros."""
    (n, k), filled = x.shape, -(-x.shape[1] // 8) * 8
    out = x.new_zeros(n, filled)
    out[:, :k] = x
    return out


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index
