"""The draw: argmax over the vocabulary of scores minus position-keyed noise (the Gumbel trick with a key)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantspec.kernels.draws import MOST_RUNNERS_UP, Layout
from quantspec.kernels.triton.rows import check_layout

_BLOCK = 2048


@dataclass(frozen=True, slots=True)
class Dials:
    """Per row what its race is made of: ``keys [n]`` int64 (the bits of ``core.noise.Stream.key``), ``temperatures
    [n]`` fp32 (1 at temperature 0), and ``noisy [n]`` int32, 0 where the scores race without noise."""

    keys: Tensor
    temperatures: Tensor
    noisy: Tensor

    def select(self, rows: Tensor) -> Dials:
        """Those of some rows, by number."""
        return Dials(*(dial.index_select(0, rows) for dial in (self.keys, self.temperatures, self.noisy)))


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
    logits: tl.tensor, keys: tl.tensor, positions: tl.tensor, temperatures: tl.tensor, noisy: tl.tensor,
    values: tl.tensor, tokens: tl.tensor, masses: tl.tensor,
    VOCAB: tl.constexpr, BLOCK: tl.constexpr, RANKED: tl.constexpr,
) -> None:  # fmt: skip
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    place = tl.arange(0, BLOCK)
    token = block * BLOCK + place
    score = tl.load(logits + row * VOCAB + token, mask=token < VOCAB, other=float("-inf")).to(tl.float32)
    # As IEEE rounds, and so as the host does: a faster division would tie, or part, other tokens.
    score = tl.div_rn(score, tl.load(temperatures + row))
    if tl.load(noisy + row) != 0:
        stream, t = tl.load(keys + row).to(tl.uint64, bitcast=True), tl.load(positions + row).to(tl.uint64)
        score -= _log_exponential(stream, t, token)
    # Comparisons lose a NaN; infinity wins them, and is refused as well.
    score = tl.where(score == score, score, float("inf"))
    at = row * tl.num_programs(1) + block
    most = tl.max(score, 0)
    tl.store(masses + at, tl.sum(tl.exp(score - tl.where(most == float("-inf"), 0.0, most)), 0))
    for i in tl.static_range(RANKED):
        value, best = tl.max(score, 0, return_indices=True, return_indices_tie_break_left=True)
        tl.store(values + at * RANKED + i, value)
        tl.store(tokens + at * RANKED + i, block * BLOCK + best)
        score = tl.where(place == best, float("-inf"), score)


@triton.jit
def _best_of_row(
    values: tl.tensor, tokens: tl.tensor, masses: tl.tensor, table: tl.tensor,
    BLOCKS: tl.constexpr, PADDED: tl.constexpr, RANKED: tl.constexpr, SPREAD: tl.constexpr, WIDTH: tl.constexpr,
) -> None:  # fmt: skip
    row, block, place = tl.program_id(0).to(tl.int64), tl.arange(0, PADDED), tl.arange(0, SPREAD)
    at, real = row * BLOCKS + block, block < BLOCKS
    most = tl.load(values + at * RANKED, mask=real, other=float("-inf"))
    value = tl.max(most, 0)
    mass = tl.sum(tl.load(masses + at, mask=real, other=0.0) * tl.exp(most - value), 0)
    words = table + row * WIDTH
    tl.store(words, value.to(tl.int32, bitcast=True))
    tl.store(words + 1, mass.to(tl.int32, bitcast=True))
    # Blocks ascend, and so do the ids of equal values in one: the leftmost of equal values has the lowest id.
    ranked = tl.load(values + row * BLOCKS * RANKED + place, mask=place < BLOCKS * RANKED, other=float("-inf"))
    for i in tl.static_range(RANKED):
        best, winner = tl.max(ranked, 0, return_indices=True, return_indices_tie_break_left=True)
        tl.store(words + 2 + i, tl.load(tokens + row * BLOCKS * RANKED + winner))
        tl.store(words + 2 + RANKED + i, (best - value - tl.log(mass)).to(tl.int32, bitcast=True))
        ranked = tl.where(place == winner, float("-inf"), ranked)


def draw(logits: Tensor, dials: Dials, positions: Tensor, layout: Layout) -> Tensor:
    """Per row of logits ``[n, V]`` the best tokens of its race ``logits / temperature - log E(key, positions[i], .)``:
    int32 ``[n, layout.width]``, which ``kernels.draws.Drawn`` reads on the host.

    ``positions [n]`` int32 are those of the tokens that are drawn. Ties go to the lowest id. A row that has a NaN, an
    infinity or no finite entry has a best value that is not finite: whoever brings it to the host refuses it
    (``core.truncation.check_finite``), since a check here would wait for the device.
    """
    n, vocab = logits.shape
    assert 0 < vocab < 2**31 - _BLOCK, "token ids are counted in 32 bits"
    assert 1 <= layout.ranked <= MOST_RUNNERS_UP, "more of a race than the kernel ranks"
    assert all(dial.shape == (n,) for dial in (dials.keys, dials.temperatures, dials.noisy, positions)), "one per row"
    assert positions.dtype == torch.int32, "positions are int32"
    check_layout(logits, dials.keys, dials.temperatures, dials.noisy, positions)
    blocks, ranked = triton.cdiv(vocab, _BLOCK), layout.ranked
    values = logits.new_empty(n, blocks, ranked, dtype=torch.float32)
    tokens = logits.new_empty(n, blocks, ranked, dtype=torch.int32)
    masses = logits.new_empty(n, blocks, dtype=torch.float32)
    table = logits.new_empty(n, layout.width, dtype=torch.int32)
    if n:
        _best_of_blocks[n, blocks](
            logits, dials.keys, positions, dials.temperatures, dials.noisy, values, tokens, masses,
            vocab, _BLOCK, ranked,
        )  # fmt: skip
        padded, spread = triton.next_power_of_2(blocks), triton.next_power_of_2(blocks * ranked)
        _best_of_row[n,](values, tokens, masses, table, blocks, padded, ranked, spread, layout.width, num_warps=1)
    if layout.candidates:
        # Which of several equal logits are among them is open; the host keeps none that equals the last.
        best = logits.float().topk(layout.candidates)
        table[:, layout.head : -layout.candidates] = best.indices
        table[:, -layout.candidates :] = best.values.view(torch.int32)
    return table


def eager_races(logits: Tensor, temperature: float, noise: Tensor | None) -> Tensor:
    """The races of ``draw``, fp32 ``[n, V]``, by torch, with the noise ``log E [n, V]`` handed in."""
    scores = logits.float() / torch.tensor(temperature, dtype=torch.float32, device=logits.device)
    return scores if noise is None else scores - noise
