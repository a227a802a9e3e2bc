"""The counter hash: finite, a function of its arguments alone, uniform and independent between its three counters.

The statistical tests are seeded and so never flicker; the rates say how often a *perfect* generator would fail each.
"""

from __future__ import annotations

import math

import numpy as np
import pytest

from quantspec.core.noise import Stream, _log_exponential, _uniform

VOCAB = 4096
KNOWN_KEY = 14220335999556503273
KNOWN_ROW = [-0.1472111, 0.2305809, -4.6494536, -0.6390554, -0.8048812, -0.2131202, -1.634878, -2.1852288]


def uniforms(key: int, positions: range, size: int = VOCAB) -> np.ndarray:
    """u = 1 - exp(-E), in float64, one row per position."""
    rows = np.stack([Stream(key).noise(t, size) for t in positions]).astype(np.float64)
    return -np.expm1(-np.exp(rows))


def test_all_hashes_give_finite_noise() -> None:
    extreme = np.array([0.5, 1.5, 2.0**31, 2.0**32 - 1.5, 2.0**32 - 0.5]) * 2.0**-32
    log_e = _log_exponential(np.minimum(extreme, 1 - 2.0**-24))
    assert np.isfinite(log_e).all()
    assert np.all(np.diff(log_e[:4]) > 0)
    # the ends of E: 2^-33 and 24 log 2, within an fp32 rounding of log E
    assert log_e[[0, -1]] == pytest.approx([-33 * math.log(2), math.log(24 * math.log(2))], rel=1e-6)


def test_large_vocabulary_stays_finite_and_every_u_is_in_range() -> None:
    assert all(np.isfinite(Stream(3).noise(t, 128_256)).all() for t in range(20))
    u = _uniform(np.arange(10**6, dtype=np.uint64))
    assert u.min() >= 2.0**-33
    assert u.max() <= 1 - 2.0**-24


def test_known_values_on_every_machine() -> None:
    """Seeds must keep their meaning: a change of these numbers changes every sampled text."""
    stream = Stream.of((1, 2, 3), 0, 7)
    assert stream.key == KNOWN_KEY
    assert stream.noise(5, 8).tolist() == pytest.approx(KNOWN_ROW, rel=1e-6)  # an fp32 rounding


def test_entries_depend_on_their_own_counters_alone() -> None:
    stream = Stream(11)
    full = stream.noise(9, 1000)
    assert np.array_equal(full[:37], stream.noise(9, 37))
    count, ids = np.array([1, 2, 1]), np.array([999, 0, 5, 36])
    picked = stream.noise_at([9, 4, 9], count, ids)
    assert np.array_equal(picked, [full[999], *stream.noise(4, 10)[[0, 5]], full[36]])


def test_streams_are_told_apart() -> None:
    keys = {
        Stream.of(prompt, sample, seed).key
        for prompt in ((1,), (2,), (1, 0), (0, 1))
        for sample in (0, 1)
        for seed in (0, 1, 2**63 - 1)
    }
    assert len(keys) == 24
    stream = Stream(5)
    assert len({stream.key, stream.domain("coin").key, stream.domain("residual").key, stream.domain("draft").key}) == 4


def test_uniformity() -> None:
    """Chi-square over 1024 bins of a million numbers, for five keys. A perfect generator fails at a rate of 1e-6."""
    for key in range(5):
        u = uniforms(key, range(100, 100 + 256))
        counts = np.bincount((u * 1024).astype(int).ravel(), minlength=1024)
        expected = u.size / 1024
        assert ((counts - expected) ** 2 / expected).sum() < chi_square_bound(1023, 1e-6 / 5)


@pytest.mark.parametrize("axis", ["t", "v", "stream"])
def test_neighbours_are_independent(axis: str) -> None:
    """Chi-square of the joint 32 x 32 histogram of a number and its neighbour, for several distances, for each counter.

    A perfect generator fails at a rate of 1e-6.
    """
    lags = (1, 2, 64)
    for lag in lags:
        if axis == "stream":
            a, b = (np.concatenate([uniforms(key + d, range(4)) for key in range(32)]) for d in (0, lag))
        else:
            u = uniforms(77, range(128))
            a, b = (u[:-lag], u[lag:]) if axis == "t" else (u[:, :-lag], u[:, lag:])
        joint = np.bincount(((a * 32).astype(int) * 32 + (b * 32).astype(int)).ravel(), minlength=1024)
        expected = a.size / 1024
        assert ((joint - expected) ** 2 / expected).sum() < chi_square_bound(1023, 1e-6 / len(lags))


def test_every_counter_bit_flips_half_of_the_output() -> None:
    """Flip one bit of t, v or the key: each of the 32 output bits flips half of the time, within six standard
    deviations (rate for a perfect generator: 2e-9 per bit, below 1e-5 for all 4,000)."""
    v = np.arange(4096)

    def words(key: int, t: int, v: np.ndarray) -> np.ndarray:
        log_e = Stream(key).noise_at([t], np.array([len(v)]), v).astype(np.float64)
        # fp32 log E keeps about 20 good bits of u: the upper 16 are looked at
        return (-np.expm1(-np.exp(log_e)) * 2**16).astype(np.uint32)

    base = words(3, 1000, v)
    flips = [words(3, 1000 ^ 1 << bit, v) for bit in range(16)]
    flips += [words(3, 1000, v ^ 1 << bit) for bit in range(17)]
    flips += [words(3 ^ 1 << bit, 1000, v) for bit in range(64)]
    for other in flips:
        changed = ((base ^ other)[:, None] >> np.arange(16) & 1).mean(axis=0)
        assert np.abs(changed - 0.5).max() < 6 * 0.5 / math.sqrt(len(v))


def chi_square_bound(degrees: int, rate: float) -> float:
    """Exceeded at ``rate`` by a chi-square variable (Wilson and Hilferty's approximation, good to a percent here)."""
    from statistics import NormalDist

    z = NormalDist().inv_cdf(1 - rate)
    return degrees * (1 - 2 / (9 * degrees) + z * math.sqrt(2 / (9 * degrees))) ** 3
