"""Do Hopper's two tensor core instructions agree? ``mma.sync`` serves few rows, ``wgmma`` would serve many faster; rows
can have the same bits at every n with both only if they add up alike. A device has to say; nothing documents it.
"""

from __future__ import annotations

import ctypes
from ctypes import c_void_p
from functools import cache

import torch
from torch import Tensor

from quantspec.errors import Unavailable, VerificationError
from quantspec.kernels.cuda import driver
from quantspec.kernels.cuda.build import Target, build_probe

SHAPE = (64, 128)
"""Of both operands: weights [64, K] and tokens [64, K]."""
_TYPES = {torch.float16: "half", torch.bfloat16: "bfloat"}
_TRIALS = 32
_BOUND = 2**-18  # of the sum of |a b|: 128 additions that each lose a few of fp32's 24 bits


class _Params(ctypes.Structure):
    """``ProbeParams`` of ``src/probe.cu``."""

    _fields_ = (("a", c_void_p), ("b", c_void_p), ("out", c_void_p))


def agree(device: int = 0) -> bool:
    """Whether all sums have the same bits. Raises as ``differences`` does."""
    return not any(differences(device).values())


def differences(device: int = 0) -> dict[str, float]:
    """The share of sums whose bits differ, for both types, with weights that are 4-bit codes and that are any numbers.

    Raises ``Unavailable`` without a Hopper GPU or a compiler, ``VerificationError`` where a product is wrong.
    """
    if not torch.cuda.is_available():
        raise Unavailable("there is no CUDA device that torch can use")
    found: dict[str, float] = {}
    for dtype in _TYPES:
        for kind in ("codes", "numbers"):
            pairs = [_pair(dtype, kind, seed, device) for seed in range(_TRIALS)]
            differing = sum(int((one != other).sum()) for one, other in pairs)
            name = str(dtype).removeprefix("torch.")
            found[f"{name} {kind}"] = differing / sum(one.numel() for one, _ in pairs)
    return found


def _pair(dtype: torch.dtype, kind: str, seed: int, device: int) -> tuple[Tensor, Tensor]:
    """One product by both instructions, each compared with fp64 first."""
    a, b = _operands(dtype, kind, seed)
    exact = a.double() @ b.double().T
    size = a.double().abs() @ b.double().abs().T
    pair = product("mma", a, b, device), product("wgmma", a, b, device)
    for name, out in zip(("mma.sync", "wgmma"), pair, strict=True):
        if not ((out.double() - exact).abs() <= _BOUND * size).all():
            raise VerificationError(f"{name} gave a wrong product of {dtype}: the probe says nothing")
    return pair


def _operands(dtype: torch.dtype, kind: str, seed: int) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    codes = torch.randint(-8, 8, SHAPE, generator=random)
    numbers = torch.randn(2, *SHAPE, generator=random)
    # Magnitudes that differ by 2^12 within a row, so that it shows where bits are lost.
    spread = torch.exp2(torch.randint(-6, 7, (2, *SHAPE), generator=random).float())
    a, b = (numbers * spread).to(dtype)
    return (codes.to(dtype) if kind == "codes" else a), b


def product(instruction: str, a: Tensor, b: Tensor, device: int) -> Tensor:
    """``a [64, 128] @ b [64, 128].T`` in fp32 by ``"mma"`` or ``"wgmma"``, from and to the CPU."""
    with torch.cuda.device(device):
        function = _module(device).function(f"qs_probe_{instruction}_{_TYPES[a.dtype]}", 0)
        there = [tensor.to(f"cuda:{device}") for tensor in (a, b, torch.full((64, 64), float("nan")))]
        params = _Params(*(tensor.data_ptr() for tensor in there))
        driver.launch(function, 1, 128, 0, params, torch.cuda.current_stream().cuda_stream)
        return there[2].cpu()


@cache
def _module(device: int) -> driver.Module:
    target = Target(torch.cuda.get_device_capability(device), driver.shared_memory(device))
    return driver.Module(build_probe(target).path)
