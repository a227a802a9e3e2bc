"""The draw: argmax over the vocabulary of scores minus position-keyed noise (the Gumbel trick with a key)."""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from quantspec.kernels.triton.rows import check_layout

_BLOCK = 2048


@triton.jit
def _mix(z: tl.tensor) -> tl.tensor:
    """SplitMix64's finalizer without its last step (Steele, Lea and Flood, 2014)."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    return (z ^ (z >> 27)) * 0x94D049BB133111EB


@triton.jit
def _log_exponential(key: tl.tensor, t: tl.tensor, token: tl.tensor) -> tl.tensor:
    """``log E(key, t, token)``, as ``quantspec.core.noise`` defines it; in fp64, so that rounding to fp32 hides how a
    machine's log rounds."""
    seed = _mix(key)
    seed = _mix((seed ^ (seed >> 31)) ^ (t * 0x9E3779B97F4A7C15))
    seed = seed ^ (seed >> 31)
    high = _mix(seed + (token + 1).to(tl.uint64) * 0x9E3779B97F4A7C15) >> 32
    u = tl.minimum((high.to(tl.float64) + 0.5) * 2.0**-32, 1 - 2.0**-24)
    return tl.log(-tl.log(1 - u)).to(tl.float32)


@triton.jit
def _best_of_blocks(
    logits: tl.tensor, key: tl.tensor, positions: tl.tensor, values: tl.tensor, tokens: tl.tensor,
    VOCAB: tl.constexpr, BLOCK: tl.constexpr, NOISE: tl.constexpr,
) -> None:  # fmt: skip
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token = block * BLOCK + tl.arange(0, BLOCK)
    score = tl.load(logits + row * VOCAB + token, mask=token < VOCAB, other=float("-inf")).to(tl.float32)
    if NOISE:
        stream, t = tl.load(key).to(tl.uint64, bitcast=True), tl.load(positions + row).to(tl.uint64, bitcast=True)
        score -= _log_exponential(stream, t, token)
    # Comparisons lose a NaN; infinity wins them, and is refused as well.
    score = tl.where(score == score, score, float("inf"))
    value, place = tl.max(score, 0, return_indices=True, return_indices_tie_break_left=True)
    tl.store(values + row * tl.num_programs(1) + block, value)
    tl.store(tokens + row * tl.num_programs(1) + block, block * BLOCK + place)


@triton.jit
def _best_of_row(
    values: tl.tensor, tokens: tl.tensor, value: tl.tensor, token: tl.tensor,
    BLOCKS: tl.constexpr, PADDED: tl.constexpr,
) -> None:  # fmt: skip
    row, block = tl.program_id(0), tl.arange(0, PADDED)
    at = row * BLOCKS + block
    best, place = tl.max(
        tl.load(values + at, mask=block < BLOCKS, other=float("-inf")),
        0, return_indices=True, return_indices_tie_break_left=True,
    )  # fmt: skip
    tl.store(value + row, best)
    tl.store(token + row, tl.load(tokens + row * BLOCKS + place).to(tl.int64))


def key_tensor(key: int, device: torch.device) -> Tensor:
    """A ``core.noise.Stream``'s 64-bit key, ``[1]`` int64 (the same bits)."""
    return torch.from_numpy(np.array([key], dtype=np.uint64).view(np.int64)).to(device)


def best_tokens(logits: Tensor, key: Tensor | None, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Per row of log scores ``[n, V]`` the token that wins ``logits - log E(key, positions[i], .)`` (int64 ``[n]``, the
    lowest id on ties), and its value (fp32 ``[n]``).

    ``key [1]`` from ``key_tensor`` (None: no noise, which is greedy), ``positions [n]`` int64. A value that is not
    finite means that the row has a NaN, an infinity or no finite entry: whoever brings the values to the host refuses
    it (``core.truncation.check_finite``), since a check here would wait for the device.
    """
    n, vocab = logits.shape
    assert 0 < vocab < 2**31 - _BLOCK, "token ids are counted in 32 bits"
    assert positions.shape == (n,), "one position per row"
    assert positions.dtype == torch.int64, "positions are int64"
    noise = positions if key is None else key
    check_layout(logits, positions, noise)
    blocks = triton.cdiv(vocab, _BLOCK)
    values = logits.new_empty(n, blocks, dtype=torch.float32)
    tokens = logits.new_empty(n, blocks, dtype=torch.int32)
    value, token = logits.new_empty(n, dtype=torch.float32), logits.new_empty(n, dtype=torch.int64)
    if n:
        _best_of_blocks[n, blocks](logits, noise, positions, values, tokens, vocab, _BLOCK, key is not None)
        _best_of_row[n,](values, tokens, value, token, blocks, triton.next_power_of_2(blocks), num_warps=1)
    return token, value


def eager_best_tokens(logits: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor]:
    """``best_tokens`` by torch, with the noise ``log E [n, V]`` (see ``core.noise.Stream.noise``) handed in."""
    scores = logits.float() if noise is None else logits.float() - noise
    scores = torch.where(scores.isnan(), torch.inf, scores)
    token = scores.argmax(-1)
    return token, scores.gather(-1, token[:, None])[:, 0]
