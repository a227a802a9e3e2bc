"""Costs of drafts, recovered from times that were made of known ones."""

from __future__ import annotations

import random

import pytest

from quantspec.calibrate.cost.curve import low, noise
from quantspec.calibrate.cost.fit import fit

SHAPES = [(1, 1), (1, 2), (2, 4), (4, 8), (6, 15), (8, 15), (3, 9)]


def samples(fixed: float, level: float, node: float, seed: int = 0) -> list[tuple[int, int, float]]:
    """Eight times of each shape: most of them up to 1% longer than they are, one in four drawn out tenfold."""
    rng = random.Random(seed)
    found = []
    for levels, nodes in SHAPES:
        for number in range(8):
            slower = 10.0 if number % 4 == 3 else 1 + rng.random() / 100
            found.append((levels, nodes, slower * (fixed + levels * level + nodes * node)))
    return found


def test_all_parts_are_found() -> None:
    cost = fit(samples(1e-3, 5e-4, 1e-4), prefill_per_token=2e-5)
    # Times are up to 1% too long, and the lower quartile is not the least: a few percent of each part.
    assert cost.fixed == pytest.approx(1e-3, rel=0.06)
    assert cost.per_level == pytest.approx(5e-4, rel=0.06)
    assert cost.per_node == pytest.approx(1e-4, rel=0.06)
    assert cost.prefill_per_token == 2e-5


def test_a_part_that_is_not_there_is_not_below_zero() -> None:
    cost = fit(samples(0.0, 5e-4, 0.0))
    assert min(cost.fixed, cost.per_node) >= 0
    assert cost.at(8, 15) == pytest.approx(4e-3, rel=0.03)  # of times up to 1% too long


def test_a_chain_has_levels_alone() -> None:
    """Its nodes are its levels: one of the two columns explains all."""
    chains = [(n, n, 1e-3 + 2e-4 * n) for n in (1, 2, 5, 10) for _ in range(3)]
    cost = fit(chains)
    assert cost.at(7, 7) == pytest.approx(1e-3 + 14e-4)
    assert (cost.fixed, cost.per_level, cost.per_node) == pytest.approx((1e-3, 2e-4, 0.0))


def test_one_shape_and_none() -> None:
    assert fit([(3, 3, 0.5)]).at(3, 3) == pytest.approx(0.5)
    assert fit([]).at(5, 5) == 0.0


def test_noise_is_what_does_not_repeat() -> None:
    quiet = {(1, n): [1.0, 1.001] * 8 for n in range(5)}
    assert noise(quiet) < 0.01
    # A peak now and then does no harm; a second half that is slower throughout does.
    peaks = {key: [*times[:-1], 50.0] for key, times in quiet.items()}
    assert noise(peaks) < 0.01
    slower = {key: [*times[:8], *(1.5 * each for each in times[8:])] for key, times in quiet.items()}
    assert noise(slower) == pytest.approx(0.5, abs=0.01)
    assert low([3.0, 1.0, 2.0]) < 2.0
