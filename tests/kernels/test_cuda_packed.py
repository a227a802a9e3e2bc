"""Weights in the CUDA kernels' tiles: back again exactly, in the places that the layout's words give, or refused."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from quantspec.errors import ModelError, UsageError
from quantspec.kernels.cuda.packed import CODE_BYTES, TILE_BYTES, TILE_ROWS, pack, refusal, tile_k, unpack
from quantspec.numerics.affine import QuantizedWeight, quantize
from quantspec.numerics.scheme import CHANNEL, Scheme


def weight(n: int, k: int, scheme: Scheme) -> QuantizedWeight:
    return quantize(torch.randn(n, k, generator=torch.Generator().manual_seed(0)), scheme)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(
    "bits, group, n, k",
    [
        (4, 128, 256, 128),
        (4, 128, 300, 384),
        (4, 256, 7, 512),
        (4, CHANNEL, 512, 256),
        (3, 128, 257, 128),
        (8, 64, 256, 64),
        (8, 128, 300, 192),
        (8, CHANNEL, 100, 320),
        (5, 64, 513, 128),
    ],
)
def test_packed_weight_comes_back(bits: int, group: int, n: int, k: int, dtype: str) -> None:
    quantized = weight(n, k, Scheme(bits, group, True, dtype))
    packed = pack(quantized)
    width = tile_k(packed.bits)
    assert packed.tiles.shape == (-(-n // TILE_ROWS), k // width, TILE_BYTES)
    assert packed.nbytes == packed.tiles.numel()
    codes, scales = unpack(packed)
    assert torch.equal(codes, quantized.codes)
    expected = quantized.scale.repeat_interleave(max(1, quantized.scheme.group(k) // width), dim=1)[:, : k // width]
    assert torch.equal(scales, expected)


@pytest.mark.parametrize("bits", [4, 8])
def test_places_are_those_of_the_layout(bits: int) -> None:
    """One code at a time, against the sentences at the top of layout.h, written out independently of ``pack``."""
    width, scheme = tile_k(bits), Scheme(bits, 128, True, "float16")
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


def test_scales_lie_where_lanes_of_a_group_read_them() -> None:
    scale = torch.arange(256).half().view(256, 1)
    tiles = pack(QuantizedWeight(torch.zeros(256, 128, dtype=torch.int8), scale, None, Scheme(4, 128, True, "float16")))
    stored = tiles.tiles[0, 0, CODE_BYTES:].view(torch.float16).view(8, 8, 4)
    assert stored[3, 5].tolist() == [3 * 32 + 8 * slot + 5 for slot in range(4)]


@pytest.mark.parametrize(
    "scheme, k, why",
    [
        (Scheme(4, 64, True, "float16"), 256, "groups of multiples of 128 alone, not of 64"),
        (Scheme(8, 32, True, "float16"), 256, "groups of multiples of 64 alone, not of 32"),
        (Scheme(4, 128, False, "float16"), 256, "no zero points"),
        (Scheme(4, 128, True, "float32"), 256, "16 bits alone"),
        (Scheme(4, CHANNEL, True, "float16"), 192, "inputs of multiples of 128"),
    ],
)
def test_what_the_kernels_lack_is_refused(scheme: Scheme, k: int, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        pack(weight(64, k, scheme))
    assert (refusal(scheme) is None) == ("inputs" in why)


def test_damaged_weights_are_refused() -> None:
    good = weight(64, 256, Scheme(4, 128, True, "float16"))
    with pytest.raises(ModelError, match="not finite"):
        pack(dataclasses.replace(good, scale=good.scale.clone().fill_(float("inf"))))
    with pytest.raises(UsageError, match="are not a weight"):
        pack(dataclasses.replace(good, scale=good.scale[:, :1]))
    with pytest.raises(UsageError, match="are not a weight"):
        pack(dataclasses.replace(good, codes=good.codes.int()))
