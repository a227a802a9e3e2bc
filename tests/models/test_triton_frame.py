"""The inputs of a forward on Triton's kernels, as one buffer."""

from __future__ import annotations

import random

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from quantspec.kernels.triton.rows import ALIGNMENT, Rows
from quantspec.models.base import Draw
from quantspec.models.triton_frame import Frame


def test_a_frame_holds_its_rows_and_dials() -> None:
    """Of any number of sequences; of one with rows to fill it up, which hang on its last cached token."""
    rng, cpu = random.Random(0), torch.device("cpu")
    for _ in range(60):
        sizes = [rng.randrange(1, 30) for _ in range(rng.choice([1, 1, 2, 3]))]
        parents = [[rng.choice((-1, i - 1, rng.randrange(-1, i))) for i in range(n)] for n in sizes]
        if len(sizes) == 1:
            del parents[0][rng.randrange(1, sizes[0] + 1) :]
        cached, tokens = [rng.randrange(99) for _ in sizes], [rng.randrange(9) for each in parents for _ in each]
        draws = [rng.choice((Draw(), Draw(2**64 - 2, 0.7), Draw(5, 1.2, truncates=True))) for _ in sizes]
        frame = Frame(sizes, cpu)
        frame.fill(tokens, parents, cached, draws)
        assert frame.tokens[: len(tokens)].tolist() == tokens
        dials = frame.dials
        for rows, their_parents, n, length in zip(frame.rows, parents, sizes, cached, strict=True):
            expected = Rows.of([*their_parents, *[-1] * (n - len(their_parents))], length, cpu)
            width = expected.paths.shape[1]
            assert rows.cached.tolist() == [length]
            assert torch.equal(rows.depths, expected.depths)
            assert torch.equal(rows.paths[:, :width], expected.paths)
            assert not rows.paths[:, width:].any()
        for i, (draw, n) in enumerate(zip(draws, sizes, strict=True)):
            keys, temperatures, noisy = (
                dial.split(sizes)[i].tolist() for dial in (dials.keys, dials.temperatures, dials.noisy)
            )
            assert [key & (2**64 - 1) for key in keys] == [draw.key or 0] * n
            assert temperatures == [pytest.approx(draw.temperature)] * n
            assert noisy == [draw.key is not None and not draw.truncates] * n
        assert all(each.data_ptr() % ALIGNMENT == 0 for each in (dials.keys, dials.temperatures, dials.noisy))
        positions = [length + rows.depths + 1 for length, rows in zip(cached, frame.rows, strict=True)]
        assert torch.equal(frame.positions(), torch.cat(positions))
