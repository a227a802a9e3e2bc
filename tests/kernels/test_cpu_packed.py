"""Packed linear layers: right products, the same bits at any width, thread count and CPU level, and what is refused."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from ctypes import c_int, c_int64, c_void_p
from pathlib import Path

import numpy as np
import pytest
import torch

from quantspec.errors import ModelError, UsageError
from quantspec.kernels.cpu import library
from quantspec.kernels.cpu.build import LEVELS, build, cpu_level
from quantspec.kernels.cpu.packed import Arena, PackedLinear, pack
from quantspec.numerics.affine import QuantizedWeight, dequantize, quantize
from quantspec.numerics.scheme import Scheme

pytestmark = pytest.mark.skipif(library.usable() is not None, reason=str(library.usable()))

SCHEMES = [
    Scheme(4, 128), Scheme(4, 64, symmetric=False), Scheme(4, 32, dtype="float16"), Scheme(4, -1, dtype="float32"),
    Scheme(3, 96), Scheme(2, 256, symmetric=False), Scheme(8, 128), Scheme(8, 32, symmetric=False), Scheme(5, -1),
]  # fmt: skip
SHAPES = [(32, 128), (33, 127), (70, 424), (1, 32), (31, 1)]
"""[N, K]: whole panels and groups, odd N, ragged last groups, and less than one of each."""


def random_weight(n: int, k: int, scheme: Scheme, seed: int = 0) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(seed)
    return quantize(torch.randn(n, k, generator=generator), scheme)


def rows(n: int, k: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed))


def exact(x: torch.Tensor, weight: QuantizedWeight) -> torch.Tensor:
    return x.double() @ dequantize(weight).double().T


def int8_product(x: np.ndarray, weight: QuantizedWeight, group: int) -> np.ndarray:
    """What int8 activations stand for, the slow way: integer sums per group, then one fp32 multiply-add each."""
    n, k = weight.codes.shape
    scale = np.repeat(weight.scale.float().numpy(), weight.scheme.group(k), axis=1)[:, :k]
    codes = weight.codes.numpy().astype(np.int64)
    if weight.zero_point is not None:
        codes -= np.repeat(weight.zero_point.numpy().astype(np.int64), weight.scheme.group(k), axis=1)[:, :k]
    y = np.zeros((len(x), n), np.float32)
    for start in range(0, k, group):
        part = slice(start, min(start + group, k))
        peak = np.abs(x[:, part]).max(axis=1, keepdims=True)
        step = (peak / np.float32(127)).astype(np.float32)
        rounded = np.rint(x[:, part] * (np.float32(1) / step)).astype(np.int64)
        assert np.abs(rounded).max() <= 127
        product = (rounded @ codes[:, part].T).astype(np.float32)
        factor = (scale[None, :, start] * step).astype(np.float32)
        # A fused multiply-add rounds once; fp64 holds the product of two fp32 numbers exactly.
        y = (product.astype(np.float64) * factor + y).astype(np.float32)
    return y


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("n, k", SHAPES)
def test_fp32_activations_give_the_dequantized_product(scheme: Scheme, n: int, k: int) -> None:
    weight, x = random_weight(n, k, scheme), rows(7, k)
    y = pack(weight, integer=False)(x)
    # fp32 sums of K products, each group times its scale, and the oracle's own rounding of scale times code: at most
    # K + 3 roundings of numbers no larger than |x| |w|.
    bound = (x.abs().double() @ dequantize(weight).abs().double().T) * (k + 3) * 2**-24
    assert ((y - exact(x, weight)).abs() <= bound).all()


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("n, k", SHAPES)
def test_int8_activations_follow_their_definition_to_the_bit(scheme: Scheme, n: int, k: int) -> None:
    weight, x = random_weight(n, k, scheme), rows(7, k)
    packed = pack(weight)
    expected = int8_product(x.numpy(), weight, packed.struct.group)
    assert np.array_equal(packed(x).numpy(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("n, k", SHAPES)
def test_dense_weights_and_bias(dtype: torch.dtype, n: int, k: int) -> None:
    weight, bias, x = rows(n, k, seed=3).to(dtype), rows(1, n, seed=4)[0], rows(13, k)
    y = pack(weight, bias)(x)
    bound = (x.abs().double() @ weight.abs().double().T + bias.abs()) * (k + 1) * 2**-24
    assert ((y - (x.double() @ weight.double().T + bias)).abs() <= bound).all()


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(
    "kind", ["q4 int8", "q4 fp32", "q8 int8", "q8 fp32", "asymmetric int8", "q8 asymmetric int8", "bf16", "f32"]
)
def test_rows_have_the_same_bits_at_every_width(kind: str, threads: int) -> None:
    n, k = 203, 424  # odd N, a ragged last group
    x = rows(64, k)
    if kind in ("bf16", "f32"):
        packed = pack(rows(n, k, seed=3).to(torch.bfloat16 if kind == "bf16" else torch.float32))
    else:
        scheme = Scheme(8 if kind.startswith("q8") else 4, 128, symmetric="asymmetric" not in kind)
        packed = pack(random_weight(n, k, scheme), integer=kind.endswith("int8"))
    before = library.bind("qs_threads", c_int, [])()
    library.set_threads(threads)
    try:
        alone = torch.cat([packed(x[i : i + 1].clone()) for i in range(64)])
        for width in range(1, 65):
            assert torch.equal(packed(x[:width]), alone[:width]), width
            assert torch.equal(packed(x[64 - width :]), alone[64 - width :]), width
        assert torch.equal(packed(torch.cat((x, x, x[:9]))), torch.cat((alone, alone, alone[:9])))
    finally:
        library.set_threads(before)


LEVELS_HERE = list(LEVELS)[list(LEVELS).index(cpu_level()) + 1 :]
"""Those below this processor's own."""


@pytest.mark.parametrize("level", LEVELS_HERE)
def test_levels_agree_to_the_bit(level: str) -> None:
    """Portable and vector code: sums of integers are free in their order, and fp32 ones have one order everywhere."""
    other = library.open_library(build(level).path)
    arguments = [c_void_p, c_void_p, c_int64, c_int, c_void_p, c_int64, c_int, c_int]
    matmul = library.bind("qs_matmul", None, arguments, other)
    n, k = 70, 424
    weights = [pack(random_weight(n, k, scheme)) for scheme in SCHEMES] + [pack(rows(n, k).bfloat16())]
    for packed in weights:
        for width in (1, 2, 3, 5, 11, 14, 15, 29):  # tiles of every length are in test_rows_have_the_same_bits
            x, y = rows(width, k), torch.empty(width, n)
            for integer in (True, False):
                packed.integer = integer
                matmul(ctypes.byref(packed.struct), x.data_ptr(), k, width, y.data_ptr(), n, 0, int(integer))
                assert torch.equal(packed(x), y), (packed.struct.format, width, integer)


@pytest.mark.parametrize("bits", [4, 8])
def test_largest_codes_do_not_overflow(bits: int) -> None:
    """Every partial sum at its bound: all weights at the end of the range, all activations at +-127."""
    least = -(2 ** (bits - 1))
    for code, sign in ((-least - 1, 1.0), (least, 1.0), (-least - 1, -1.0), (least, -1.0)):
        codes = torch.full((32, 256), code, dtype=torch.int8)
        weight = QuantizedWeight(codes, torch.ones(32, 2), None, Scheme(bits, 128, dtype="float32"))
        y = pack(weight)(torch.full((5, 256), sign * 127.0))
        assert (y == sign * 127 * code * 256).all()


def test_a_group_of_zeros_and_tiny_or_huge_activations() -> None:
    weight = random_weight(32, 256, Scheme(4, 128))
    weight.codes[:, :128] = 0
    packed = pack(weight)
    x = torch.zeros(4, 256)
    x[1] = 1e-44  # its scale would be a subnormal number
    x[2], x[3, 200] = 3e35, -2e35
    y = packed(x)
    assert (y[:2] == 0).all()
    expected = exact(x[2:], weight)
    # A group of equal values, or of one value and zeros, loses nothing but a few roundings of its scale and sums.
    assert ((y[2:] - expected).abs() <= expected.abs().amax() * 1e-6).all()


@pytest.mark.parametrize("fault", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("at", [0, 5, 200, 423])
def test_a_fault_in_an_activation_shows_in_its_row_alone(fault: float, at: int) -> None:
    packed, x = pack(random_weight(40, 424, Scheme(4, 128))), rows(6, 424)
    clean = packed(x)
    x[3, at] = fault
    y = packed(x)
    assert y[3].isnan().all()
    kept = [0, 1, 2, 4, 5]
    assert torch.equal(y[kept], clean[kept])


def test_rows_of_the_weight_come_back() -> None:
    ids = torch.tensor([0, 69, 33, 33], dtype=torch.int32)
    for scheme in SCHEMES:
        weight = random_weight(70, 424, scheme)
        assert torch.equal(pack(weight).rows(ids), dequantize(weight)[ids])
    dense = rows(70, 424).half()
    assert torch.equal(pack(dense).rows(ids), dense[ids].float())


def test_memory_is_shared_out_and_counted() -> None:
    arena = Arena(2**21)
    first, second = pack(random_weight(32, 128, Scheme()), arena=arena), pack(rows(33, 5), arena=arena)
    assert first.nbytes == 32 * 64 + 64  # codes and bf16 scales
    assert second.nbytes == 64 * 5 * 4  # 33 rows take two panels
    assert first.struct.panels % 64 == second.struct.panels % 64 == 0
    assert arena.take(2**22).shape == (2**22,)  # more than a chunk


def test_no_rows_make_no_output() -> None:
    assert pack(random_weight(33, 128, Scheme()))(torch.empty(0, 128)).shape == (0, 33)


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(3, 127), torch.zeros(128), torch.zeros(2, 3, 128), torch.zeros(3, 128).double(),
        torch.zeros(3, 128).bfloat16(), torch.zeros(128, 3).T, torch.zeros(3, 256)[:, ::2],
        torch.zeros(3, 128, device="meta"),
    ],
    ids=["width", "one dimension", "three dimensions", "fp64", "bf16", "transposed", "strided", "device"],
)  # fmt: skip
def test_inputs_that_do_not_fit_are_refused(x: torch.Tensor) -> None:
    packed = pack(random_weight(33, 128, Scheme()))
    with pytest.raises(UsageError, match=r"\[33, 128\] needs rows \[n, 128\] of float32"):
        packed(x)


def test_rows_of_a_wider_tensor_need_no_copy() -> None:
    packed, wide = pack(random_weight(33, 128, Scheme())), rows(5, 200)
    assert torch.equal(packed(wide[:, :128]), packed(wide[:, :128].contiguous()))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scales_that_are_not_finite_are_refused(value: float) -> None:
    weight = random_weight(33, 128, Scheme())
    weight.scale[7, 0] = value
    with pytest.raises(ModelError, match=r"\[33, 128\] has scales that are not finite"):
        pack(weight)


def refused(weight: QuantizedWeight | torch.Tensor, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        pack(weight)


def test_weights_that_do_not_fit_are_refused() -> None:
    refused(random_weight(33, 120, Scheme(4, 40)), "groups of multiples of 32 alone, not of 40")
    refused(torch.zeros(3, 0), r"\[3, 0\]")
    refused(torch.zeros(3), r"\[3\]")
    refused(torch.zeros(3, 3).double(), "float64")
    whole = random_weight(33, 256, Scheme())
    refused(QuantizedWeight(whole.codes, whole.scale[:, :1], None, whole.scheme), r"scales \[33, 1\]")
    refused(QuantizedWeight(whole.codes.int(), whole.scale, None, whole.scheme), "int32")
    refused(QuantizedWeight(whole.codes, whole.scale.double(), None, whole.scheme), "float64")
    skewed = random_weight(33, 256, Scheme(4, 128, symmetric=False))
    assert skewed.zero_point is not None
    refused(QuantizedWeight(skewed.codes, skewed.scale, skewed.zero_point[:, :1], skewed.scheme), r"points \[33, 1\]")


@pytest.mark.parametrize("bias", [torch.zeros(32), torch.zeros(33, 1), torch.zeros(33, device="meta")])
def test_a_bias_that_does_not_fit_is_refused(bias: torch.Tensor) -> None:
    for weight in (torch.zeros(33, 128), random_weight(33, 128, Scheme())):
        with pytest.raises(UsageError, match=r"bias .* does not fit a weight \[33, 128\]"):
            pack(weight, bias)


def test_more_rows_than_are_taken_at_a_time() -> None:
    packed, x = pack(random_weight(33, 128, Scheme())), rows(600, 128)
    assert torch.equal(packed(x), torch.cat([packed(x[i : i + 50]) for i in range(0, 600, 50)]))


LITTLE_MEMORY = """
import resource, torch
from quantspec.kernels.cpu.packed import pack
packed, x = pack(torch.ones(1, 1 << 20, dtype=torch.bfloat16)), torch.ones(1 << 20)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
limits = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (used + (256 << 20), limits[1]))
try:
    packed(x.expand(200, -1))  # whose inputs take 800 MB in the kernel's order
except MemoryError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_AS, limits)
print(packed(x.expand(2, -1)).tolist())
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")
def test_too_little_memory_is_an_error_and_no_more() -> None:
    done = subprocess.run([sys.executable, "-c", LITTLE_MEMORY], capture_output=True, text=True, check=True)
    assert done.stdout == "no memory for the CPU kernels to work in\n[[1048576.0], [1048576.0]]\n"


def test_a_packed_weight_outlives_its_source() -> None:
    def make() -> PackedLinear:
        return pack(rows(64, 32), rows(1, 64)[0])

    packed, x = make(), rows(2, 32)
    first = packed(x)
    filler = [torch.full((64, 32), 7.0) for _ in range(50)]
    assert torch.equal(packed(x), first)
    assert filler
