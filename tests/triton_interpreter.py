"""What Triton's interpreter lacks: products that treat every row alike, and inline assembly."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint32]


def dot(builder: Any, a: Any, b: Any, c: Any, *options: object) -> Any:
    """``a @ b + c`` with every row of a treated alike, as by an ``mma`` instruction. The interpreter's own product is
    one of BLAS, where a row's bits change with its place, and takes the bits of bf16 for integers."""
    product = np.matmul(_fp32(a)[:, None, :], _fp32(b)[None])[:, 0]
    return type(c)(product + c.data, c.dtype.scalar)


def _fp32(operand: Any) -> NDArray[np.float32]:
    if operand.dtype.scalar.is_bf16():
        return (operand.data.astype(np.uint32) << 16).view(np.float32)
    return operand.data.astype(np.float32)


def inline_asm(builder: Any, asm: str, constraints: str, args: Sequence[Any], types: Any, pure: bool, pack: int) -> Any:
    """Runs the PTX of an elementwise operation on ``pack`` elements at a time: the few instructions that ours use."""
    outputs = constraints.count("=")
    inputs = [words for arg in args for words in np.moveaxis(_registers(arg.data, pack), -1, 0)]
    registers: dict[str, Words] = {f"${outputs + i}": words for i, words in enumerate(inputs)}
    for line in re.findall(r"^\s*(\w[^;]*);", asm, re.MULTILINE):
        operation, operands = line.split(maxsplit=1)
        target, *sources = operands.split(", ")
        values = [registers[name] if name in registers else np.uint32(int(name, 0)) for name in sources]
        registers[target] = INSTRUCTIONS[operation](*values)
    results, first = [], 0
    for result in types:
        dtype = np.dtype(np.float16 if result.scalar.is_fp16() else np.uint16)
        count = pack * dtype.itemsize // 4
        words = np.stack([registers[f"${first + i}"] for i in range(count)], -1)
        results.append(type(args[0])(words.view(dtype).reshape(args[0].data.shape), result.scalar))
        first += count
    return _Results(results)


class _Results(list[Any]):
    def get_result(self, i: int) -> Any:
        return self[i]


def _registers(data: NDArray[Any], pack: int) -> Words:
    return np.ascontiguousarray(data).reshape(-1, pack).view(np.uint32)


def _prmt(a: Words, b: Words, selector: Words) -> Words:
    both = b.astype(np.uint64) << np.uint64(32) | a
    chosen = (both >> np.uint64(8 * (int(selector) >> 4 * i & 7)) & np.uint64(255) for i in range(4))
    return np.asarray(sum(byte << np.uint64(8 * i) for i, byte in enumerate(chosen)), np.uint64).astype(np.uint32)


def _fma_f16x2(a: Words, b: Words, c: Words) -> Words:
    x, y, z = (np.ascontiguousarray(np.broadcast_to(v, a.shape)).view(np.float16).astype(np.float64) for v in (a, b, c))
    return (x * y + z).astype(np.float16).view(np.uint32)


def _fma_bf16x2(a: Words, b: Words, c: Words) -> Words:
    def half(words: Words, shift: int) -> NDArray[np.float32]:
        return np.asarray(words << np.uint32(16 - shift) & np.uint32(0xFFFF0000)).view(np.float32)

    low, high = (np.asarray(half(a, s) * half(b, s) + half(c, s)).view(np.uint32) for s in (0, 16))
    assert not ((low | high) & 0xFFFF).any(), "a result that bf16 would round"
    return low >> np.uint32(16) | high


INSTRUCTIONS = {
    "mov.b32": lambda a: a,
    "and.b32": np.bitwise_and,
    "shr.b32": np.right_shift,
    "prmt.b32": _prmt,
    "fma.rn.f16x2": _fma_f16x2,
    "fma.rn.bf16x2": _fma_bf16x2,
}
