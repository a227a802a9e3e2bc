"""Packed linear layers in Triton: right products, the same bits for every n, what is refused, and what the compiler
makes of the kernel for devices that are not here."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch.utils import deterministic

from quantspec.errors import ModelError, UsageError
from quantspec.numerics.affine import QuantizedWeight, dequantize, expand_groups, quantize
from quantspec.numerics.scheme import Scheme

pytest.importorskip("triton", reason="triton is not installed")

from quantspec.kernels.triton import linear
from quantspec.kernels.triton.linear import TritonLinear

pytestmark = [
    pytest.mark.usefixtures("triton_device"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # the interpreter's numpy, of faults that tests put there
]

SCHEMES = [
    Scheme(4, 128), Scheme(4, 64, symmetric=False), Scheme(4, 32, dtype="float16"), Scheme(4, -1, dtype="float32"),
    Scheme(3, 96), Scheme(2, 256, symmetric=False), Scheme(8, 128), Scheme(8, 32, symmetric=False), Scheme(5, -1),
]  # fmt: skip
SHAPES = [(128, 256), (33, 127), (1, 300), (31, 1)]
"""[N, K]: whole tiles and blocks, odd N, ragged last groups over one and several blocks, and less than one of each."""
STEP = {torch.float32: 2**-23, torch.float16: 2**-10, torch.bfloat16: 2**-7}
"""From one number of a type to the next, relatively: Triton's interpreter cuts where a GPU rounds."""


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fresh tensors hold NaN, so that what a kernel leaves out shows, as does what it should not have read."""
    before, filled = torch.are_deterministic_algorithms_enabled(), deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    deterministic.fill_uninitialized_memory = True
    try:
        assert torch.empty(2, 2).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        deterministic.fill_uninitialized_memory = filled


def random_weight(n: int, k: int, scheme: Scheme, seed: int = 0) -> QuantizedWeight:
    return quantize(rows(n, k, seed=seed) + 0.1, scheme)


def rows(n: int, k: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(n, k, generator=generator, device="cpu").to(torch.get_default_device(), dtype)


def check(y: torch.Tensor, x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None = None) -> None:
    # In fp64, where the largest scale times a code is still finite.
    wide = QuantizedWeight(weight.codes, torch.ones_like(weight.scale), weight.zero_point, weight.scheme)
    dense = dequantize(wide).double() * expand_groups(weight.scale.double(), x.shape[1], weight.scheme)
    more = torch.zeros(len(dense)) if bias is None else bias
    exact = x.double() @ dense.T + more
    # At most K + 4 roundings of fp32 sums no larger than |x| |codes - zero| scale, and one more to the type of y.
    bound = (x.double().abs() @ dense.abs().T + more.abs()) * (x.shape[1] + 4) * 2**-24
    assert y.dtype == x.dtype
    assert y.shape == exact.shape
    assert ((y.double() - exact).abs() <= bound + exact.abs() * STEP[x.dtype] + torch.finfo(x.dtype).tiny).all()


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("n, k", SHAPES)
def test_gives_the_dequantized_product(scheme: Scheme, n: int, k: int) -> None:
    weight = random_weight(n, k, scheme)
    packed, dtypes = TritonLinear(weight), list(STEP)
    x = rows(5, k, dtypes[(n + scheme.bits) % 3])
    check(packed(x), x, weight)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", STEP, ids=str)
@pytest.mark.parametrize("n", [1, 15, 16, 67])
def test_any_number_of_rows_with_a_bias(dtype: torch.dtype, n: int) -> None:
    weight, bias = random_weight(70, 200, Scheme(4, 64)), rows(1, 70, seed=3)[0]
    wide = torch.full((n, 208), float("nan"), dtype=dtype)  # rows of a wider tensor, which ends in faults
    wide[:, :200] = rows(n, 200, dtype)
    check(TritonLinear(weight, bias)(wide[:, :200]), wide[:, :200], weight, bias)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("bits, symmetric", [(4, True), (4, False), (8, True)])
def test_k_in_several_splits(monkeypatch: pytest.MonkeyPatch, bits: int, symmetric: bool) -> None:
    weight, bias = random_weight(130, 300, Scheme(bits, 32, symmetric)), rows(1, 130, seed=3)[0]
    x = rows(19, 300)
    for processors in (1, 3, 99):
        monkeypatch.setattr(linear, "_processors", lambda _, count=processors: count)
        packed = TritonLinear(weight, bias)
        blocks = packed._planes.shape[1]
        assert blocks == (5 if bits == 4 else 10)  # neither is a multiple of what the splits take
        assert packed._split_blocks == {1: blocks, 3: 2 if bits == 4 else 4, 99: 2}[processors]
        check(packed(x), x, weight, bias)


@pytest.mark.parametrize(
    "scheme, dtype",
    [
        (Scheme(4, 128), torch.bfloat16), (Scheme(4, 64), torch.float16), (Scheme(8, 64), torch.bfloat16),
        (Scheme(4, 32, symmetric=False), torch.float32), (Scheme(8, 64, symmetric=False), torch.float32),
    ],
    ids=str,
)  # fmt: skip
def test_rows_have_the_same_bits_for_every_n(scheme: Scheme, dtype: torch.dtype) -> None:
    packed, x = TritonLinear(random_weight(33, 168, scheme)), rows(64, 168, dtype)
    every = packed(x)
    for n in (1, 5, 16, 33):
        assert torch.equal(packed(x[:n]), every[:n]), n
    for n in (1, 17):
        assert torch.equal(packed(x[64 - n :]), every[64 - n :]), n
    order = torch.randperm(64)
    assert torch.equal(packed(x[order]), every[order])


def test_more_rows_than_one_launch_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    packed, x = TritonLinear(random_weight(33, 200, Scheme(4, 32))), rows(37, 200)
    whole = packed(x)
    monkeypatch.setattr(linear, "_MOST_ROWS", 16)
    assert torch.equal(packed(x), whole)
    assert packed(x[:0]).shape == (0, 33)


def test_the_kernels_did_it(monkeypatch: pytest.MonkeyPatch, launches: Callable[..., Counter[str]]) -> None:
    """One launch each, and no product of torch's."""
    monkeypatch.setattr(linear, "_processors", lambda _: 4)
    weight, x = random_weight(130, 300, Scheme(4, 32)), rows(19, 300)
    packed, counts = TritonLinear(weight), launches(linear, "_matmul", "_add_splits")
    with monkeypatch.context() as without:
        for name in ("mm", "matmul", "addmm", "einsum", "bmm"):
            without.delattr(torch, name)
        y = packed(x)
    assert counts == {"_matmul": 1, "_add_splits": 1}
    check(y, x, weight)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", STEP, ids=str)
def test_codes_at_the_ends_of_their_range(bits: int, dtype: torch.dtype) -> None:
    """Codes and zero points at opposite ends: differences of 15 and 255, the largest, are exact in every type."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    for code, zero in ((low, high), (high, low), (low, low), (high, high)):
        codes, zeros = torch.full((33, 64), code, dtype=torch.int8), torch.full((33, 2), zero, dtype=torch.int8)
        weight = QuantizedWeight(codes, torch.ones(33, 2), zeros, Scheme(bits, 32, symmetric=False, dtype="float32"))
        y = TritonLinear(weight)(torch.ones(3, 64, dtype=dtype))
        # 64 * 255 needs 14 bits, but is 255 * 2^6: bf16 holds it.
        assert (y == 64 * (code - zero)).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_saturated_and_tiny_scales(dtype: str) -> None:
    """Scales at both ends of their type, next to a group of zeros: none turns into infinity, zero or a neighbour's."""
    limits = torch.finfo(getattr(torch, dtype))
    codes = torch.randint(-8, 8, (33, 96), dtype=torch.int8)
    codes[:, 32:64] = 0
    scale = torch.tensor([limits.max, limits.max, limits.tiny]).to(getattr(torch, dtype)).expand(33, 3).contiguous()
    weight = QuantizedWeight(codes, scale, None, Scheme(4, 32, dtype=dtype))
    packed = TritonLinear(weight)
    for part in (slice(0, 32), slice(32, 64), slice(64, 96)):
        x = torch.zeros(2, 96)
        x[0, part], x[1, part] = 2**-10, rows(1, 32)[0] * 2**-10
        check(packed(x), x, weight)


@pytest.mark.parametrize("dtype", STEP, ids=str)
def test_huge_tiny_and_zero_activations(dtype: torch.dtype) -> None:
    weight = random_weight(33, 256, Scheme(4, 128, dtype="float32"))
    weight.codes[:, :128] = 0
    x = torch.zeros(4, 256, dtype=dtype)
    x[1] = torch.finfo(dtype).tiny
    x[2, 200], x[3, 5] = torch.finfo(dtype).max / 64, torch.finfo(dtype).max / 2
    y = TritonLinear(weight)(x)
    assert (y[0] == 0).all()
    assert (y[3] == 0).all()
    check(y, x, weight)


@pytest.mark.parametrize("fault", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", STEP, ids=str)
def test_a_fault_in_an_activation_shows_in_its_row_alone(fault: float, dtype: torch.dtype) -> None:
    packed, x = TritonLinear(random_weight(40, 424, Scheme(4, 128))), rows(18, 424, dtype)
    clean = packed(x)
    x[3, 200] = fault
    y = packed(x)
    assert not y[3].isfinite().any()
    kept = [row for row in range(18) if row != 3]
    assert torch.equal(y[kept], clean[kept])


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(3, 127), torch.zeros(128), torch.zeros(2, 3, 128), torch.zeros(3, 128).double(),
        torch.zeros(128, 3).T, torch.zeros(3, 256)[:, ::2], torch.zeros(3, 128, device="meta"),
    ],
    ids=["width", "one dimension", "three dimensions", "fp64", "transposed", "strided", "device"],
)  # fmt: skip
def test_inputs_that_do_not_fit_are_refused(x: torch.Tensor) -> None:
    packed = TritonLinear(random_weight(33, 128, Scheme()))
    with pytest.raises(UsageError, match=r"\[33, 128\] needs rows \[n, 128\] of float32, float16 or bfloat16 on c"):
        packed(x)


def refused(weight: QuantizedWeight, words: str, bias: torch.Tensor | None = None) -> None:
    with pytest.raises(UsageError, match=words):
        TritonLinear(weight, bias)


def test_weights_that_do_not_fit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = random_weight(33, 256, Scheme())
    refused(random_weight(33, 120, Scheme(4, 40)), "groups of multiples of 32 alone, not of 40")
    refused(QuantizedWeight(whole.codes[:, :0], whole.scale, None, whole.scheme), r"\[33, 0\]")
    refused(QuantizedWeight(whole.codes, whole.scale[:, :1], None, whole.scheme), r"scales \[33, 1\]")
    refused(QuantizedWeight(whole.codes.int(), whole.scale, None, whole.scheme), "int32")
    refused(QuantizedWeight(whole.codes, whole.scale.double(), None, whole.scheme), "float64")
    refused(whole, r"bias \[3\]", torch.zeros(3))
    monkeypatch.setattr(linear, "_INTERPRETED", False)
    with pytest.raises(UsageError, match="on cpu: they run on cuda alone"):
        TritonLinear(whole, device="cpu")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scales_that_are_not_finite_are_refused(value: float) -> None:
    weight = random_weight(33, 128, Scheme())
    weight.scale[7, 0] = value
    with pytest.raises(ModelError, match=r"\[33, 128\] has scales that are not finite"):
        TritonLinear(weight)


COMPILE = """
import re
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from quantspec.kernels.triton import linear

pointers = {"planes": "*u8", "scales": "*bf16", "zeros": "*u8", "bias": "*fp32", "out": "*fp32"}
sizes = dict.fromkeys(("n", "k", "columns", "x_stride", "blocks", "split_blocks"), "i32")
for capability, dtype, bits, group, zeros in (
    (80, "bf16", 4, 128, False), (89, "fp32", 4, 128, True), (90, "fp16", 8, 32, True), (90, "bf16", 4, 128, False),
):
    constants = dict(
        BITS=bits, GROUP=group, HAS_ZEROS=zeros, HAS_BIAS=False, ROWS=linear.ROWS, COLUMNS=linear.COLUMNS,
    )
    signature = {"x": "*" + dtype, **pointers, **sizes, **dict.fromkeys(constants, "constexpr")}
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(12) if i != 6}
    source = ASTSource(linear._matmul, signature=signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": linear._WARPS, "num_stages": linear._STAGES}
    kernel = compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    ptx = kernel.asm["ptx"]
    assert kernel.metadata.shared <= 99 * 1024, kernel.metadata.shared  # what a block may have on the smallest of them
    assert "mma.sync.aligned.m16n8k16" in ptx and "cp.async.cg" in ptx
    assert not re.search(r"\\b(wgmma|atom|red)\\.", ptx)
    print(capability, dtype, bits)
"""


def test_compiles_for_devices_that_are_not_here(tmp_path: Path) -> None:
    """One family of tensor core instructions, asynchronous copies, no atomics, and memory that fits."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["80 bf16 4", "89 fp32 4", "90 fp16 8", "90 bf16 4"]
