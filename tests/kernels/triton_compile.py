"""Compiles the Triton kernels for NVIDIA GPUs, which takes none: the interpreter accepts more than the compiler does.
Prints one line per kernel. Run by ``test_triton_compile.py`` in a process where no interpreter is chosen."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

from triton import compile as compile_for
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from quantspec.kernels.triton import attention, cache, dense, drafting, graft, norm, rope, sampling, swiglu
from quantspec.numerics.kv import KVFormat

PLAIN = {"BITS": 0, "CODE_BYTES": 0, "ROW": 128}
ATTEND = {"GROUP": 4, "D": 128, "TILE": 16, "CHUNK": 256, "STEP": 64, "BLOCK": 128, **PLAIN}
HEADS = {"HEADS": 32, "KV_HEADS": 8, "D": 128, "BLOCK": 128}


def build(capability: int, kernel: Any, pointers: str, floats: str = "", **constants: object) -> None:
    """``pointers``: the type behind each pointer argument, in order (those come first); other numbers are int32."""
    types = pointers.split()
    signature = {}
    for i, name in enumerate(kernel.arg_names):
        scalar = "fp32" if name in floats.split() else "i32"
        signature[name] = f"*{types[i]}" if i < len(types) else "constexpr" if name in constants else scalar
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(len(types))}
    built = compile_for(ASTSource(kernel, signature, constants, aligned), target=GPUTarget("cuda", capability, 32))
    products = "mma" if "mma.sync" in built.asm["ptx"] else "-"
    spilled = spills(built.asm["ptx"], capability) if products == "mma" else 0
    sys.stdout.write(f"{kernel.__name__} {capability} {products} {spilled} {built.metadata.shared}\n")


def spills(ptx: str, capability: int) -> int:
    """Bytes that a thread writes for want of registers."""
    target = f"-arch=sm_{capability}{'a' if capability == 90 else ''}"
    command = [knobs.nvidia.ptxas.path, "-v", target, "-o", os.devnull, "/dev/stdin"]
    said = subprocess.run(command, input=ptx, text=True, capture_output=True, check=True).stderr
    return int(said.split(" bytes spill stores")[0].split()[-1])


chunk, combined = "bf16 bf16 bf16 i32 i32 i32 fp32 fp32 fp32", "fp32 fp32 fp32 i32 i32 bf16"
build(80, attention._attend_chunk, chunk, WINDOW=0, **ATTEND)
build(90, attention._attend_chunk, chunk, WINDOW=1000, **ATTEND)
wide = {**ATTEND, "D": 80, "STEP": 32, "ROW": 80}
build(90, attention._attend_chunk, chunk.replace("bf16", "fp32"), WINDOW=0, **wide)
for bits in (8, 4):
    form = KVFormat(bits, 128)
    coded = {"BITS": bits, "CODE_BYTES": form.code_bytes, "ROW": form.row_bytes}
    for capability in (80, 90):
        over_codes = chunk.replace("bf16 bf16 bf16", "bf16 u8 u8")
        build(capability, attention._attend_chunk, over_codes, WINDOW=1000, **ATTEND | coded)
    build(90, rope._rope, "bf16 fp32 fp32 bf16 i32 i32 bf16 u8", "eps scale", NORM=True, **HEADS | coded)
build(90, attention._combine, combined, WINDOW=1000, D=80, CHUNK=256, BLOCK=128)
build(90, norm._rms_norm, "bf16 bf16 bf16 bf16 bf16", "eps", WIDTH=4096, BLOCK=4096, ADD=True)
build(90, swiglu._swiglu, "bf16 bf16", WIDTH=14336, BLOCK=1024)
build(90, rope._rope, "bf16 fp32 fp32 bf16 i32 i32 bf16 bf16", "eps scale", NORM=True, **HEADS | PLAIN)
build(90, cache._commit, "bf16 i32 i32", D=80, BLOCK=16, COLUMNS=32)
build(90, sampling._best_of_blocks, "fp32 i64 i32 fp32 i32 fp32 i32 fp32", VOCAB=128256, BLOCK=2048, RANKED=2)
row = {"BLOCKS": 63, "PADDED": 64, "RANKED": 8, "SPREAD": 512, "WIDTH": 18}
build(90, sampling._best_of_row, "fp32 i32 fp32 i32", **row)
build(90, graft._graft, "i32 i32 i32 i32", BLOCK=64)
tile = {"ROWS": 64, "COLUMNS": 32, "DEPTH": 64}
build(80, dense._dense, "bf16 bf16 fp32 fp32", HAS_BIAS=True, **tile)
build(90, dense._dense, "fp32 fp32 fp32 fp32", HAS_BIAS=False, **{**tile, "DEPTH": 32})
race = {"VOCAB": 128256, "BLOCK": 2048}
build(90, drafting._best_of_blocks, "fp32 i32 i64 fp32 fp32 i32 fp32 fp32", K=4, WARM=True, NOISE=True, **race)
blocks = {"BLOCKS": 63, "PADDED": 64, "K": 4}
build(90, drafting._best_of_row, "fp32 i32 fp32 fp32 i32 fp32", SIZE=256, **blocks)
build(90, drafting._best_of_kept, "fp32 i64 fp32 fp32 i32 i64 fp32 i32 fp32", SIZE=64, **blocks)
grown = "i32 fp32 i32 i32 fp32 i32 i32 fp32 i32 i32 i32 i32 fp32 i32 i32"
tree = {"K": 10, "WIDTH": 10, "DEPTH": 7, "CAPACITY": 60, "STOPS": 8, "SIZE": 1024, "LEVEL": 128, "SLOTS": 16}
build(80, drafting._grow, grown, STEPS=8, PART=32, LAST=False, **tree)
build(90, drafting._grow, grown, STEPS=8, PART=32, LAST=True, **tree)
