"""The simulator held against what ``quantspec tune`` measured: each setting that it timed, simulated from the costs and
traces of the same profile."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median

from quantspec.benchmarks.simulate import build
from quantspec.benchmarks.simulate_stacks import profiled, stack_of
from quantspec.engine.costs import PLAIN, Candidate, Measured, Profile
from quantspec.engine.records import Record
from quantspec.errors import ModelError

LIMIT = 0.1
"""Of the median error."""


@dataclass(frozen=True)
class Checked(Record):
    """A measured setting: tokens per second as simulated and as measured with its interval, and the error over the
    latter."""

    profile: str
    method: str
    options: Mapping[str, int]
    simulated: float
    measured: float
    low: float
    high: float
    error: float


@dataclass(frozen=True)
class Check(Record):
    """All settings of one or more profiles."""

    rows: tuple[Checked, ...]
    median_error: float
    limit: float


def run(profiles: tuple[str, ...]) -> Check:
    """Raises ``ModelError`` for a profile that cannot be read, or that has nothing measured in it."""
    rows = [row for name in profiles for row in check(Profile.load(name), Path(name).stem)]
    if not rows:
        raise ModelError("nothing was measured in these profiles", hint="run quantspec tune to its end")
    return Check(tuple(rows), median(abs(row.error) for row in rows), LIMIT)


def check(profile: Profile, name: str) -> list[Checked]:
    """Every setting that was measured."""
    return [_checked(profile, measured, name) for measured in profile.measured]


def _checked(profile: Profile, measured: Measured, name: str) -> Checked:
    setting = measured.setting
    traced = [each for each in profile.candidates if each.trace and each.trace.steps and not each.failure]
    candidate = profile.candidate(setting) or next(iter(traced), None)
    if candidate is None:  # plain decoding of a model without drafters
        stack, options = profiled(profile, name)[0], dict[str, int]()
    else:
        stack, options = stack_of(profile, candidate, name), {**candidate.options, **setting.options}
    plain = setting.method == PLAIN.method
    simulated = build(stack, setting.method, options, _context(candidate)).tokens_per_second()
    error = simulated / measured.tokens_per_second - 1
    return Checked(
        name, setting.method, {} if plain else options, simulated, measured.tokens_per_second, measured.low,
        measured.high, error,
    )  # fmt: skip


def _context(candidate: Candidate | None) -> int:
    """The mean of those at which its drafts were taken."""
    steps = candidate.trace.steps if candidate and candidate.trace else ()
    return round(fmean([step.context for step in steps])) if steps else 0
