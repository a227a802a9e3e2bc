"""Triton's other kernels on a GPU against fp64: norm, rotary embedding, SwiGLU, attention, dense layers, the cache's
commit and the draw, at sizes of Llama 3.1 8B and at ragged ones."""

from __future__ import annotations

from collections.abc import Callable

import torch

from quantspec.benchmarks.gpu_kernels import BOUNDS, name_of, poisoned, relative_error
from quantspec.core.noise import Stream
from quantspec.errors import VerificationError
from quantspec.kernels.draws import Drawn, Layout
from quantspec.kernels.spans import round_up
from quantspec.kernels.triton.attention import CHUNK, attention, eager_attention
from quantspec.kernels.triton.cache import commit
from quantspec.kernels.triton.dense import TritonDense
from quantspec.kernels.triton.norm import rms_norm
from quantspec.kernels.triton.rope import rope
from quantspec.kernels.triton.rows import Rows
from quantspec.kernels.triton.sampling import Dials, draw
from quantspec.kernels.triton.swiglu import swiglu
from quantspec.numerics.kv import KVFormat

TREE = (-1, -1, 0, 0, 2, 4, 4, 1, 3, 8, 9)
Check = Callable[[torch.device, torch.dtype], float]


def norm_error(device: torch.device, dtype: torch.dtype, width: int = 4096, eps: float = 1e-5) -> float:
    x, residual, weight = (torch.randn(size, device=device).to(dtype) for size in ((9, width), (9, width), (width,)))
    normed, total = rms_norm(x, weight, eps, residual)
    # Of the sum as it goes on, rounded.
    row = total.double()
    expected = row * (row.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.double()
    return max(relative_error(total, x.double() + residual.double()), relative_error(normed, expected))


def swiglu_error(device: torch.device, dtype: torch.dtype, width: int = 14336) -> float:
    gate_up = (4 * torch.randn(9, 2 * width, device=device)).to(dtype)
    gate, up = gate_up.double().chunk(2, dim=-1)
    return relative_error(swiglu(gate_up), gate / (1 + torch.exp(-gate)) * up)


def rope_error(device: torch.device, dtype: torch.dtype, heads: int = 32, kv_heads: int = 8, d: int = 128) -> float:
    n, cached = len(TREE), 1000
    qkv = torch.randn(n, heads + 2 * kv_heads, d, device=device).to(dtype)
    kv = torch.zeros(2 * kv_heads, cached + n + 5, d, device=device, dtype=dtype)
    angles = torch.arange(kv.shape[1], device=device)[:, None] * torch.rand(d // 2, device=device)
    cos, sin = angles.cos().repeat(1, 2), torch.cat((-angles.sin(), angles.sin()), 1)
    rows = Rows.of(TREE, cached, device)
    q = rope(qkv, cos, sin, rows, kv)
    at = (rows.cached + rows.depths).long()
    turned = qkv[:, : heads + kv_heads].double()
    turned = turned * cos[at][:, None].double() + turned.roll(d // 2, -1) * sin[at][:, None].double()
    own = torch.cat((turned[:, heads:], qkv[:, heads + kv_heads :].double()), 1).transpose(0, 1)
    errors = relative_error(q, turned[:, :heads] * d**-0.5), relative_error(kv[:, cached : cached + n], own)
    kv[:, cached : cached + n] = 0
    assert_all(bool((kv == 0).all()), "rope writes outside its rows")
    return max(errors)


def attention_error(device: torch.device, dtype: torch.dtype) -> float:
    """The worst of an empty prefix, a long one, windows, and head sizes that are no power of two."""
    worst = 0.0
    for heads, kv_heads, d, cached, window in (
        (32, 8, 128, 1000, None), (32, 8, 128, 0, None), (5, 1, 80, 511, None), (6, 2, 64, 700, 300), (3, 1, 64, 20, 2),
    ):  # fmt: skip
        n, slots = len(TREE), cached + len(TREE) + 5
        q = (torch.randn(n, heads, d, device=device) * d**-0.5).to(dtype)
        keys, values = (torch.randn(kv_heads, slots, d, device=device).to(dtype) for _ in range(2))
        rows = Rows.of(TREE, cached, device)
        expected = eager_attention(q.double(), keys.double(), values.double(), rows, window)
        worst = max(worst, relative_error(attention(q, keys, values, rows, window), expected))
    return worst


def coded_error(device: torch.device, dtype: torch.dtype, kv_heads: int = 8, cached: int = 700) -> float:
    """Attention over rows in 8 and 4 bits; infinite if a byte is not the oracle's."""
    worst, n, heads, slots = 0.0, len(TREE), 4 * kv_heads, round_up(cached + len(TREE), CHUNK)
    for d, bits, window in ((128, 8, None), (128, 4, 300), (64, 8, 2), (96, 4, None)):
        form, rows = KVFormat(bits, d), Rows.of(TREE, cached, device)
        qkv = torch.randn(n, heads + 2 * kv_heads, d, device=device).to(dtype)
        # On the CPU: elsewhere torch divides by a number as it multiplies by its inverse.
        kv = form.encode(torch.randn(2 * kv_heads, slots, d, device="cpu")).to(device)
        plain = torch.zeros(2 * kv_heads, slots, d, device=device)
        cos, sin = torch.ones(2, slots, d, device=device)
        q = rope(qkv, cos, sin, rows, kv, form=form)
        rope(qkv, cos, sin, rows, plain)
        own = slice(cached, cached + n)
        if not torch.equal(kv[:, own].cpu(), form.encode(plain[:, own].cpu())):
            return float("inf")
        held = form.decode(kv).to(dtype).double()
        expected = eager_attention(q.double(), held[:kv_heads], held[kv_heads:], rows, window)
        found = attention(q, kv[:kv_heads], kv[kv_heads:], rows, window, form)
        worst = max(worst, relative_error(found, expected))
    return worst


def dense_error(device: torch.device, dtype: torch.dtype) -> float:
    worst = 0.0
    for n_out, k in ((4096, 4096), (300, 200)):
        x, weight = (torch.randn(size, device=device).to(dtype) for size in ((70, k), (n_out, k)))
        expected = x.double() @ weight.double().T
        worst = max(worst, relative_error(TritonDense(weight, out_dtype=torch.float32)(x), expected))
    return worst


def commit_error(device: torch.device, dtype: torch.dtype) -> float:
    """0, or 1 if a single number is out of its place."""
    kv = torch.randn(4, 16, 400, 128, device=device).to(dtype)
    kept, length = [0, 2, 5, 6, 30, 63], 300
    expected = kv.clone()
    expected[:, :, length : length + len(kept)] = kv[:, :, [length + row for row in kept]]
    rows = torch.tensor([*kept, -1, -1], dtype=torch.int32, device=device)
    commit(kv, torch.tensor([length], dtype=torch.int32, device=device), rows)
    return float(not torch.equal(kv, expected))


def draw_error(device: torch.device, dtype: torch.dtype, vocab: int = 128_256, temperature: float = 0.7) -> float:
    """Share of tokens that are not those of the noise on the host."""
    n, key = 6, Stream.of([1, 2, 3], 0, 7).key
    logits = 3 * torch.randn(n, vocab, device=device)
    positions = torch.arange(100, 100 + n, dtype=torch.int32, device=device)
    keys = torch.full((n,), key - (1 << 64 if key >= 1 << 63 else 0), dtype=torch.int64, device=device)
    noisy = torch.tensor([1, 1, 1, 1, 0, 0], dtype=torch.int32, device=device)
    dials = Dials(keys, torch.full((n,), temperature, device=device), noisy)
    table = draw(logits, dials, positions, Layout())
    found = Drawn.read(table.cpu().numpy(), Layout()).ids[:, 0].tolist()
    scores = logits.cpu() / temperature
    for row in range(4):
        scores[row] -= torch.from_numpy(Stream(key).noise(100 + row, vocab).copy())
    return sum(a != b for a, b in zip(found, scores.argmax(-1).tolist(), strict=True)) / n


CHECKS: dict[str, Check] = {
    "rms_norm": norm_error,
    "swiglu": swiglu_error,
    "rope": rope_error,
    "attention": attention_error,
    "attention over 8 and 4 bits": coded_error,
    "dense": dense_error,
    "commit": commit_error,
    "draw": draw_error,
}


def assert_all(right: bool, otherwise: str) -> None:
    if not right:
        raise VerificationError(otherwise)


def check(device: torch.device, dtypes: tuple[torch.dtype, ...] = tuple(BOUNDS)) -> dict[str, float]:
    """Relative errors by kernel and dtype. Raises ``VerificationError`` where one is too large."""
    found = {}
    with poisoned():
        for name, error_of in CHECKS.items():
            for dtype in dtypes if name != "draw" else dtypes[:1]:
                error = found[f"{name} {name_of(dtype)}"] = error_of(device, dtype)
                assert_all(error <= BOUNDS[dtype], f"{name} in {name_of(dtype)}: error {error:.2e} against fp64")
    return found
