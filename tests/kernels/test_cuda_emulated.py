"""The CUDA kernels' own source on an emulated device (``cuda_emulation/``): numbers, splits, and rows at every width.

What a GPU alone can show stays open: that the instructions are what the manual says, memory order, and speed.
"""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Callable
from ctypes import c_uint32, c_void_p
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from quantspec.errors import Unavailable
from quantspec.kernels.cpu.build import find_compiler
from quantspec.kernels.cuda import linear
from quantspec.kernels.cuda.build import Target, options
from quantspec.kernels.cuda.packed import PackedWeight, Params, pack
from quantspec.kernels.cuda.tile_format import TileFormat
from quantspec.numerics.affine import dequantize, quantize
from quantspec.numerics.scheme import CHANNEL, Scheme

EMULATION = Path(__file__).parent / "cuda_emulation" / "run.cpp"
SEED = 7
ASYNC, BULK = 0, 1
HALF, BFLOAT = torch.float16, torch.bfloat16


Devices = Callable[[TileFormat], ctypes.CDLL]
DEFAULT = TileFormat()


@pytest.fixture(scope="module")
def devices(tmp_path_factory: pytest.TempPathFactory) -> Devices:
    """The emulated device with the kernels for a format, compiled when first asked for."""
    try:
        compiler = find_compiler()
    except Unavailable as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("cuda")
    flags = ["-std=c++17", "-O1", "-fPIC", "-shared", "-ffp-contract=off", "-Wno-unknown-pragmas"]

    @cache
    def device(tile: TileFormat) -> ctypes.CDLL:
        out = folder / f"{tile}.so"
        defines = [option for option in options(Target((9, 0), 0), tile) if option.startswith("-D")]
        subprocess.run([*compiler, *flags, *defines, str(EMULATION), "-o", str(out)], check=True, timeout=120)
        return ctypes.CDLL(str(out))

    return device


@pytest.fixture(scope="module")
def device(devices: Devices) -> ctypes.CDLL:
    return devices(DEFAULT)


def run(
    devices: Devices,
    packed: PackedWeight,
    x: Tensor,
    *,
    blocks: int,
    ring: int = ASYNC,
    float_y: bool = True,
    bias: Tensor | None = None,
    order: list[int] | None = None,
    columns: int | None = None,
) -> Tensor:
    """One launch, its memory poisoned. ``order``: in which the blocks run, one after the other."""
    (n, cols), (row_blocks, k_tiles, _) = x.shape, packed.tiles.shape
    columns = columns or next(count for count in (1, 2, 4, 6, 8) if n <= 8 * count)
    y = torch.full((n + 1, packed.rows), float("nan"), dtype=torch.float32 if float_y else x.dtype)
    workspace = torch.full((2 * blocks * 256 * 8 * columns,), float("nan"))
    arrivals = torch.zeros(row_blocks, dtype=torch.int32)
    params = Params(
        weights=packed.tiles.data_ptr(),
        x=x.data_ptr(),
        y=y.data_ptr(),
        bias=None if bias is None else bias.data_ptr(),
        workspace=workspace.data_ptr(),
        arrivals=arrivals.data_ptr(),
        x_stride=x.stride(0),
        y_stride=y.stride(0),
        n=n,
        rows=packed.rows,
        cols=cols,
        row_blocks=row_blocks,
        k_tiles=k_tiles,
        bfloat_scales=packed.scale_dtype == BFLOAT,
        float_y=float_y,
    )
    ids = np.array(range(blocks) if order is None else order, dtype=np.int32)
    emulate = devices(packed.format).emulate
    kind = (int(x.dtype == BFLOAT), columns, ring)
    status = emulate(*kind, ctypes.byref(params), blocks, c_void_p(ids.ctypes.data), c_uint32(SEED))
    assert status == 0, "threads wait for each other forever"
    assert y[n].isnan().all(), "a row past the last was written"
    assert not arrivals.any(), "the next launch would count wrongly"
    return y[:n]


def inputs(n: int, k: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(n)).to(dtype)


def packed_random(
    rows: int, k: int, bits: int, group: int = 128, dtype: str = "float16", symmetric: bool = True
) -> tuple[PackedWeight, Tensor]:
    weight = torch.randn(rows, k, generator=torch.Generator().manual_seed(rows + k))
    if not symmetric:
        weight += 0.3  # zero points away from the middle
    quantized = quantize(weight, Scheme(bits, group, symmetric, dtype))
    return pack(quantized), dequantize(quantized).double()


def relative_error(y: Tensor, expected: Tensor) -> float:
    return ((y.double() - expected).norm() / expected.norm()).item()


def test_mirrored_struct(device: ctypes.CDLL) -> None:
    assert ctypes.sizeof(Params) == device.params_size()


@pytest.mark.parametrize("ring", [ASYNC, BULK])
@pytest.mark.parametrize("dtype", [HALF, BFLOAT])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("n, rows, k, blocks", [(1, 256, 128, 1), (3, 300, 640, 4), (11, 520, 384, 7)])
def test_product(
    devices: Devices, bits: int, dtype: torch.dtype, ring: int, n: int, rows: int, k: int, blocks: int
) -> None:
    """Scales of the other 16-bit type than the inputs, so that nothing may mix them up."""
    packed, weight = packed_random(rows, k, bits, dtype="bfloat16" if dtype == HALF else "float16")
    x = inputs(n, k, dtype)
    y = run(devices, packed, x, blocks=blocks, ring=ring)
    # Codes and inputs are exact and sums are fp32: an error of some units of 2^-24, whatever the type.
    assert relative_error(y, x.double() @ weight.T) < 3e-7


@pytest.mark.parametrize("ring", [ASYNC, BULK])
def test_widest(devices: Devices, ring: int) -> None:
    packed, weight = packed_random(257, 512, 4, CHANNEL)
    x = inputs(61, 512, HALF)
    y = run(devices, packed, x, blocks=3, ring=ring)
    assert relative_error(y, x.double() @ weight.T) < 3e-7  # as above


@pytest.mark.parametrize("dtype, bound", [(HALF, 2**-11), (BFLOAT, 2**-8)])
def test_output_is_rounded_once(devices: Devices, dtype: torch.dtype, bound: float) -> None:
    packed, weight = packed_random(256, 384, 4)
    x, bias = inputs(5, 384, dtype), torch.randn(256, generator=torch.Generator().manual_seed(1))
    exact = run(devices, packed, x, blocks=2, bias=bias)
    assert relative_error(exact, x.double() @ weight.T + bias) < 3e-7  # as above
    rounded = run(devices, packed, x, blocks=2, bias=bias, float_y=False)
    assert torch.equal(rounded, exact.to(dtype))
    # Half a unit in the last place of each value is the most that one rounding may cost.
    assert ((rounded.double() - exact.double()).abs() <= bound * exact.double().abs()).all()


def test_rows_of_a_larger_tensor(devices: Devices) -> None:
    packed, weight = packed_random(256, 256, 4)
    wide = torch.full((4, 512), float("nan"), dtype=HALF)
    wide[:, 256:] = inputs(4, 256, HALF)
    y = run(devices, packed, wide[:, 256:], blocks=1)
    assert relative_error(y, wide[:, 256:].double() @ weight.T) < 3e-7  # as above


@pytest.mark.parametrize("bits, dtype", [(4, HALF), (4, BFLOAT), (8, BFLOAT)])
def test_a_row_is_the_same_at_every_width(devices: Devices, bits: int, dtype: torch.dtype) -> None:
    """Alone and among others, in every kernel, with blocks in another order: to the bit."""
    packed, _ = packed_random(300, 384, bits)
    x = inputs(64, 384, dtype)
    widest = run(devices, packed, x, blocks=3)
    for n, ring, order in [(1, ASYNC, [2, 1, 0]), (9, BULK, [1, 2, 0]), (17, ASYNC, [0, 2, 1]), (47, BULK, [2, 0, 1])]:
        assert torch.equal(run(devices, packed, x[-n:], blocks=3, ring=ring, order=order), widest[-n:])


def test_the_split_decides_the_bits(devices: Devices) -> None:
    """The test above compares something: another number of blocks adds in another order."""
    packed, _ = packed_random(256, 1024, 4)
    x = inputs(4, 1024, HALF)
    assert not torch.equal(run(devices, packed, x, blocks=3), run(devices, packed, x, blocks=8))


def test_saturated_codes_and_extreme_scales(devices: Devices) -> None:
    weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(2)).sign() * 6e4
    weight[:128] *= 1e-9
    quantized = quantize(weight, Scheme(4, 128, True, "bfloat16"))
    x = inputs(2, 256, BFLOAT)
    expected = x.double() @ dequantize(quantized).double().T
    y = run(devices, pack(quantized), x, blocks=2)
    for half in (slice(0, 128), slice(128, 256)):
        assert relative_error(y[:, half], expected[:, half]) < 3e-7  # as above


@pytest.mark.parametrize("bfloat", [0, 1])
def test_every_code_less_its_zero_point_is_that_integer(devices: Devices, bfloat: int) -> None:
    out = np.zeros(4, dtype=np.uint32)
    dtype = BFLOAT if bfloat else HALF

    def expand(bits: int, low: int, high: int, zero: int) -> list[float]:
        device = devices(DEFAULT if bits == 4 else TileFormat(8, 64))
        device.expand(bfloat, *map(c_uint32, (low, high, zero)), c_void_p(out.ctypes.data))
        return torch.from_numpy(out.view(np.int16).copy()).view(dtype).tolist()

    for zero in range(64):
        for i, k in enumerate([0, 2, 4, 6, 1, 3, 5, 7]):
            values = [float(-zero)] * 8
            values[k] = i + 5 - zero
            assert expand(4, i + 5 << 4 * i, 0, zero) == values
    for code in range(256):
        zero = (code * 37 + 128) % 256
        word = code | (code ^ 1) << 8 | (code ^ 2) << 16 | (code ^ 3) << 24
        values = [float((code ^ i) - zero) for i in range(4)]
        assert expand(8, word, 0, zero) == [*values, *[float(-zero)] * 4]
        assert expand(8, 0, word, zero) == [*[float(-zero)] * 4, *values]
    for code in range(16):
        assert expand(4, code * 0x11111111, 0, 8) == [code - 8.0] * 8


KINDS = [  # bits, group, symmetric, scales
    (4, 32, False, "float16"),
    (4, 64, True, "float32"),
    (4, 128, False, "bfloat16"),
    (8, 32, False, "float32"),
    (4, 96, False, "float16"),  # three groups of 32
]


@pytest.mark.parametrize("ring", [ASYNC, BULK])
@pytest.mark.parametrize("n, rows, k, blocks", [(2, 270, 384, 3), (12, 40, 328, 2), (5, 256, 72, 1)])
@pytest.mark.parametrize("bits, group, symmetric, scales", KINDS)
def test_groups_zero_points_scales_and_ragged_k(
    devices: Devices, bits: int, group: int, symmetric: bool, scales: str, n: int, rows: int, k: int, blocks: int,
    ring: int,
) -> None:  # fmt: skip
    packed, weight = packed_random(rows, k, bits, group, scales, symmetric)
    for dtype in (HALF, BFLOAT):
        wide = torch.full((n, k + 8), float("nan"), dtype=dtype)  # past k: never read
        x = wide[:, :k].copy_(inputs(n, k, dtype))
        # As above: codes less zero points are exact too, up to 255, and sums are fp32.
        assert relative_error(run(devices, packed, x, blocks=blocks, ring=ring), x.double() @ weight.T) < 3e-7


def test_a_row_is_the_same_at_all_64_widths(devices: Devices) -> None:
    """Groups in a loop (wide kernels) and unrolled (narrow ones), k ragged, a row block shared by three blocks."""
    packed, _ = packed_random(24, 300, 4, 32, "float16", symmetric=False)
    x = linear._copied(inputs(64, 300, BFLOAT))
    blocks = packed.tiles.shape[1]
    widest = run(devices, packed, x, blocks=blocks)
    for n in range(1, 64):
        order = [(block + n) % blocks for block in range(blocks)]
        narrow = run(devices, packed, x[64 - n :], blocks=blocks, ring=n % 2, order=order)
        assert torch.equal(narrow, widest[64 - n :])


SHAPES = [(1, 1), (1, 7), (3, 5), (16, 32), (24, 112), (125, 32), (112, 64), (9, 1)]
MULTIPROCESSORS = [1, 2, 7, 82, 108, 128, 132]


@pytest.mark.parametrize("row_blocks, k_tiles", SHAPES)
@pytest.mark.parametrize("multiprocessors", MULTIPROCESSORS)
def test_split_covers_every_tile_once(device: ctypes.CDLL, row_blocks: int, k_tiles: int, multiprocessors: int) -> None:
    tiles = row_blocks * k_tiles
    blocks = min(tiles, multiprocessors)
    firsts = [device.split_first(tiles, blocks, block) for block in range(blocks + 1)]
    assert (firsts[0], firsts[-1]) == (0, tiles)
    lengths = [end - first for first, end in pairwise(firsts)]
    assert min(lengths) >= 1
    assert max(lengths) - min(lengths) <= 1
    for block in range(blocks):
        for tile in (firsts[block], firsts[block + 1] - 1):
            assert device.split_block_of(tiles, blocks, tile) == block


@pytest.mark.parametrize("row_blocks, k_tiles", SHAPES)
@pytest.mark.parametrize("multiprocessors", MULTIPROCESSORS)
def test_no_two_partial_sums_share_a_slot(
    device: ctypes.CDLL, row_blocks: int, k_tiles: int, multiprocessors: int
) -> None:
    tiles = row_blocks * k_tiles
    blocks = min(tiles, multiprocessors)
    slots = []
    for row_block in range(row_blocks):
        first = device.split_block_of(tiles, blocks, row_block * k_tiles)
        last = device.split_block_of(tiles, blocks, (row_block + 1) * k_tiles - 1)
        if first != last:
            slots += [device.slot(tiles, blocks, k_tiles, block, row_block) for block in range(first, last + 1)]
    assert len(set(slots)) == len(slots)
    assert all(0 <= slot < 2 * blocks for slot in slots)
