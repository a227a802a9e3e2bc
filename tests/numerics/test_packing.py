"""The compressed-tensors bit layout: round trips of every width, and the layout itself spelled out bit by bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantspec.errors import ModelError
from quantspec.numerics.affine import quantize
from quantspec.numerics.packing import byte_weight, pack_codes, pack_weight, unpack_codes, unpack_weight
from quantspec.numerics.scheme import Scheme

widths = st.integers(2, 8)
shapes = st.tuples(st.integers(1, 6), st.integers(1, 150))


def random_codes(bits: int, shape: tuple[int, int], seed: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), shape, generator=g, dtype=torch.int8)


@settings(max_examples=150, deadline=None)
@given(bits=widths, shape=shapes, seed=st.integers(0, 2**31))
def test_round_trip_and_layout(bits: int, shape: tuple[int, int], seed: int) -> None:
    codes = random_codes(bits, shape, seed)
    words = pack_codes(codes, bits)
    assert words.dtype == torch.int32
    assert words.shape == (shape[0], -(-shape[1] * bits // 32))
    assert torch.equal(unpack_codes(words, bits, shape[1]), codes)
    # The row as one long number: code i, made unsigned, at bit i * bits.
    number = sum((code + 2 ** (bits - 1)) << (i * bits) for i, code in enumerate(codes[0].tolist()))
    expected = [number >> (32 * i) & 0xFFFFFFFF for i in range(words.shape[1])]
    assert [word & 0xFFFFFFFF for word in words[0].tolist()] == expected


@settings(max_examples=100, deadline=None)
@given(
    bits=widths,
    shape=shapes,
    group_size=st.sampled_from([-1, 16, 32, 100]),
    symmetric=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_weight_round_trip(bits: int, shape: tuple[int, int], group_size: int, symmetric: bool, seed: int) -> None:
    scheme = Scheme(bits, group_size, symmetric)
    quantized = quantize(torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + 0.3, scheme)
    tensors = pack_weight(quantized)
    back = unpack_weight(tensors, scheme)
    assert torch.equal(back.codes, quantized.codes)
    assert torch.equal(back.scale, quantized.scale)
    assert tensors["weight_shape"].tolist() == list(shape)
    assert tensors["weight_scale"].dtype == torch.bfloat16
    if symmetric:
        assert back.zero_point is None
        assert "weight_zero_point" not in tensors
    else:
        assert back.zero_point is not None
        assert torch.equal(back.zero_point, quantized.zero_point)  # type: ignore[arg-type]
        groups = scheme.num_groups(shape[1])
        assert tensors["weight_zero_point"].shape == (-(-shape[0] * bits // 32), groups)  # packed along the channels


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("group_size", [-1, 32])
def test_codes_of_one_byte(bits: int, group_size: int) -> None:
    scheme = Scheme(bits, group_size)
    quantized = quantize(torch.randn(7, 50, generator=torch.Generator().manual_seed(bits)), scheme)
    tensors = byte_weight(quantized)
    assert {name: tensor.dtype for name, tensor in tensors.items()} == {
        "weight": torch.int8,
        "weight_scale": torch.bfloat16,
    }
    back = unpack_weight(tensors, scheme)
    assert torch.equal(back.codes, quantized.codes)
    assert torch.equal(back.scale, quantized.scale)
    assert back.zero_point is None


def test_codes_of_one_byte_are_checked() -> None:
    scheme = Scheme(4, 32)
    tensors = byte_weight(quantize(torch.randn(4, 64, generator=torch.Generator().manual_seed(0)), scheme))
    with pytest.raises(ModelError, match="codes from -8 to 8 are not of 4 bits"):
        unpack_weight(tensors | {"weight": tensors["weight"].clone().index_fill_(1, torch.tensor([3]), 8)}, scheme)
    with pytest.raises(ModelError, match=r"scales \[4, 1\] do not go with codes \[4, 64\]"):
        unpack_weight(tensors | {"weight_scale": tensors["weight_scale"][:, :1]}, scheme)
    with pytest.raises(ModelError, match="does not hold symmetric codes of one byte"):
        unpack_weight(tensors | {"weight": tensors["weight"].float()}, scheme)
    with pytest.raises(ModelError, match="does not hold symmetric codes of one byte"):
        unpack_weight(tensors, Scheme(4, 32, symmetric=False))
    with pytest.raises(ModelError, match="packed weight without weight_shape"):
        unpack_weight({"weight_packed": tensors["weight"]}, scheme)


def test_known_words() -> None:
    # Eight 4-bit codes: stored 0..7 from the lowest nibble up.
    assert pack_codes(torch.arange(-8, 0, dtype=torch.int8)[None], 4).tolist() == [[0x76543210]]
    # The eleventh 3-bit code crosses the word border: two of its bits end word 0, the third begins word 1.
    codes = torch.tensor([[-4] * 10 + [3]], dtype=torch.int8)
    assert [word & 0xFFFFFFFF for word in pack_codes(codes, 3)[0].tolist()] == [0xC0000000, 0x1]


def test_contradictory_shapes_are_refused() -> None:
    scheme = Scheme(4, 32)
    tensors = pack_weight(quantize(torch.randn(4, 64), scheme))
    with pytest.raises(ModelError, match="words a row"):
        unpack_weight(tensors | {"weight_packed": tensors["weight_packed"][:, :-1]}, scheme)
    with pytest.raises(ModelError, match="does not hold"):
        unpack_weight(tensors | {"weight_scale": tensors["weight_scale"][:, :-1]}, scheme)
    with pytest.raises(ModelError, match="zero_point"):
        unpack_weight(tensors, Scheme(4, 32, symmetric=False))
    skewed = Scheme(4, 32, symmetric=False)
    tensors = pack_weight(quantize(torch.randn(16, 96, generator=torch.Generator().manual_seed(0)), skewed))
    with pytest.raises(ModelError, match=r"zero points \[16, 2\]"):
        unpack_weight(tensors | {"weight_zero_point": tensors["weight_zero_point"][:, :-1]}, skewed)
