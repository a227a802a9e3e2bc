"""Weights in the CUDA kernels' tiles: back again exactly, in the places that the layout's words give, or refused."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from quantspec.errors import ModelError, UsageError
from quantspec.kernels.cuda.packed import pack, refusal, unpack
from quantspec.kernels.cuda.tile_format import CODE_BYTES, TILE_ROWS, TileFormat
from quantspec.numerics.affine import QuantizedWeight, dequantize, quantize
from quantspec.numerics.scheme import CHANNEL, Scheme


def weight(n: int, k: int, scheme: Scheme) -> QuantizedWeight:
    return quantize(torch.randn(n, k, generator=torch.Generator().manual_seed(0)), scheme)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize(
    "bits, group, n, k, stored",
    [
        (4, 128, 256, 128, 128),
        (4, 128, 300, 384, 128),
        (4, 256, 7, 512, 128),
        (4, 64, 300, 256, 64),
        (4, 32, 31, 224, 32),
        (4, 96, 31, 224, 32),
        (4, 128, 31, 333, 128),
        (4, 64, 31, 20, 128),
        (4, CHANNEL, 512, 200, 128),
        (3, 192, 257, 400, 64),
        (8, 64, 256, 64, 64),
        (8, 32, 100, 65, 32),
        (8, 128, 300, 192, 64),
        (8, CHANNEL, 100, 320, 64),
        (5, 64, 513, 128, 64),
    ],
)
def test_packed_weight_comes_back(
    bits: int, group: int, n: int, k: int, stored: int, dtype: str, symmetric: bool
) -> None:
    quantized = weight(n, k, Scheme(bits, group, symmetric, dtype))
    packed = pack(quantized)
    tile = packed.format
    assert tile == TileFormat(4 if bits <= 4 else 8, stored, not symmetric, 4 if dtype == "float32" else 2)
    assert packed.tiles.shape == (-(-n // TILE_ROWS), -(-k // tile.k), tile.nbytes)
    assert packed.nbytes == packed.tiles.numel()
    back = unpack(packed)
    assert torch.equal(back.codes, quantized.codes)
    assert torch.equal(dequantize(back), dequantize(quantized))


@pytest.mark.parametrize("bits", [4, 8])
def test_places_are_those_of_the_layout(bits: int) -> None:
    """One code at a time, against the sentences at the top of layout.h, written out independently of ``pack``."""
    width, scheme = TileFormat(bits).k, Scheme(bits, 128, True, "float16")
    blank = QuantizedWeight(torch.zeros(512, 256, dtype=torch.int8), torch.zeros(512, 2).half(), None, scheme)
    empty = pack(blank).tiles
    for row, k in [(0, 0), (1, 1), (9, 3), (31, 7), (45, 12), (255, 250), (256, 5), (300, 130), (511, 255), (26, 94)]:
        codes = torch.zeros(512, 256, dtype=torch.int8)
        codes[row, k] = 5
        changed = (pack(dataclasses.replace(blank, codes=codes)).tiles != empty).nonzero().tolist()
        warp, slot, g = row % 256 // 32, row % 32 // 8, row % 8
        chunk, t, i = k % width // 32, k % 32 // 8, k % 8
        vector = (warp * (width // 32) + chunk) * (bits // 4)
        if bits == 4:
            place = (vector * 32 + 4 * g + t) * 16 + 4 * slot + [0, 2, 4, 6, 1, 3, 5, 7].index(i) // 2
        else:
            place = ((vector + slot // 2) * 32 + 4 * g + t) * 16 + 8 * (slot % 2) + i
        assert changed == [[row // 256, k // width, place]]


def test_scales_and_zero_points_lie_where_lanes_of_a_group_read_them() -> None:
    scale = torch.arange(512).view(256, 2)
    zeros = (torch.arange(512) % 16 - 8).to(torch.int8).view(256, 2)
    codes, scheme = torch.zeros(256, 128, dtype=torch.int8), Scheme(4, 64, False, "float32")
    tile = pack(QuantizedWeight(codes, scale.float(), zeros, scheme)).tiles[0, 0]
    scales, zeros_end = tile[CODE_BYTES:].split((2048, 512))
    stored = scales.view(torch.float32).view(2, 8, 8, 4)
    assert stored[1, 3, 5].tolist() == [2 * (3 * 32 + 8 * slot + 5) + 1 for slot in range(4)]
    assert zeros_end.view(2, 8, 8, 4)[1, 3, 5].tolist() == [value % 16 for value in stored[1, 3, 5].tolist()]


def test_groups_the_kernels_lack_are_refused() -> None:
    scheme = Scheme(4, 48, True, "float16")
    with pytest.raises(UsageError, match="groups of multiples of 32 alone, not of 48"):
        pack(weight(64, 256, scheme))
    assert refusal(scheme) == "has groups of multiples of 32 alone, not of 48"
    assert refusal(Scheme(4, 32, False, "float32")) is None


def test_damaged_weights_are_refused() -> None:
    good = weight(64, 256, Scheme(4, 128, False, "float16"))
    assert good.zero_point is not None
    with pytest.raises(ModelError, match="scales that are not finite"):
        pack(dataclasses.replace(good, scale=good.scale.clone().fill_(float("inf"))))
    with pytest.raises(ModelError, match="zero points far from its codes"):
        pack(dataclasses.replace(good, zero_point=good.zero_point - 9))
    for damaged in (
        dataclasses.replace(good, scale=good.scale[:, :1]),
        dataclasses.replace(good, scale=good.scale.double()),
        dataclasses.replace(good, codes=good.codes.int()),
        dataclasses.replace(good, zero_point=None),
        dataclasses.replace(good, scheme=Scheme(4, 128, True, "float16")),
        QuantizedWeight(good.codes[:, :0], good.scale[:, :0], good.zero_point[:, :0], good.scheme),
    ):
        with pytest.raises(UsageError, match="are not a weight"):
            pack(damaged)
