"""The planner on curves and traces whose best setting is known or can be found by force."""

import random
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantspec.engine.costs import PLAIN, Candidate, CostCurve, DraftCost, Inner, Profile, Setting, Step, Trace
from quantspec.engine.planner import Costs, Speed, best_setting, dinkelbach, edges, predict, rank, speed_of, trust_of

TILES = (4, 8, 16, 32, 64)
STAIRS = CostCurve((0,), (1, 64), ((1.0, 1.0),), tiles=TILES)
FREE = DraftCost()


def stairs(*seconds: float) -> CostCurve:
    """A staircase with one height per tile of ``TILES``."""
    return CostCurve((0,), (1, *TILES), ((seconds[0], *seconds),), tiles=TILES)


def tree_step(rng: random.Random, depth: int, width: int, sure: float) -> Step:
    """A tree whose scores are the true probabilities that its nodes are accepted."""
    scores, parents, level, path = list[float](), list[int](), [(-1, 1.0)], -1
    accepted = list[bool]()
    for _ in range(depth):
        grown, right = list[tuple[int, float]](), path
        for parent, score in level[:width]:
            left, coin = 1.0, rng.random()
            for _ in range(width):
                share = left * rng.uniform(0.3, sure)
                won = parent == right and 1 - left <= coin < 1 - left + share
                left -= share
                grown.append((len(scores), score * share))
                scores.append(score * share)
                parents.append(parent)
                accepted.append(won)
                path = len(scores) - 1 if won else path
        if path == right:
            path = -2  # nothing is accepted below
        level = sorted(grown, key=lambda each: -each[1])
    return Step(tuple(scores), tuple(parents), tuple(accepted), 0)


def trees(seed: int, count: int = 60, depth: int = 4, width: int = 3, sure: float = 0.9) -> Trace:
    rng = random.Random(seed)
    return Trace(tuple(tree_step(rng, depth, width, sure) for _ in range(count)))


def chains(rate: float, length: int = 8, count: int = 400, seed: int = 0) -> Trace:
    """Chains of which each token is accepted with ``rate``, as their scores say."""
    rng, steps = random.Random(seed), []
    for _ in range(count):
        run = next((i for i in range(length) if rng.random() >= rate), length)
        scores = tuple(rate ** (i + 1) for i in range(length))
        steps.append(Step(scores, tuple(range(-1, length - 1)), tuple(i < run for i in range(length)), 10))
    return Trace(tuple(steps))


def candidate(trace: Trace, cost: DraftCost = FREE, **options: int) -> Candidate:
    return Candidate("eagle", {"head": "h"}, options or {"num_speculative_tokens": 40, "tree_depth": 4}, cost, trace)


def test_the_traces_of_these_tests_have_scores_that_come_true() -> None:
    # 24000 nodes of which about 1 in 15 is accepted: 3 standard deviations are under 8%.
    assert trust_of(trees(1, count=600)) == pytest.approx(1.0, abs=0.08)
    assert trust_of(chains(0.7)) == pytest.approx(1.0, abs=0.08)


# Edges


@given(st.lists(st.floats(0.0, 1.5), min_size=4, max_size=4), st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_a_staircase_is_planned_with_tile_edges_only(steps: list[float], seed: int) -> None:
    heights = [1.0]
    for step in steps:
        heights.append(heights[-1] + step)
    curve = stairs(*heights)
    plan = best_setting(curve, 0.0, candidate(trees(seed)))
    assert plan.setting.options["num_speculative_tokens"] + 1 in (*TILES, 41)


def test_prices_of_a_staircase_buy_whole_tiles() -> None:
    costs = Costs.of(stairs(1.0, 1.4, 2.4, 4.4, 8.4), FREE, 0.0, 40, 0)
    trace = trees(3)
    for rho in (0.5, 1.0, 2.0, 3.0):
        budget = costs.budget(rho, 40, 9)
        widths = {len(step.kept(budget)) + 1 for step in trace.steps}
        assert widths <= {*TILES, 40}, "all rows of a tile cost what its first does"


def test_edges_are_counted_per_sequence_of_a_batch() -> None:
    assert edges(stairs(1, 2, 3, 4, 5), 0, 63) == [3, 7, 15, 31, 63]
    assert edges(stairs(1, 2, 3, 4, 5), 0, 40, batch=4) == [1, 3, 7, 15]
    assert edges(STAIRS, 0, 5) == [5], "flat: as many as there are"


# Optimal stopping


@given(
    st.lists(st.floats(0.01, 1.0), min_size=1, max_size=7).map(lambda scores: sorted(scores, reverse=True)),
    st.lists(st.floats(0.0, 0.6), min_size=7, max_size=7),
)
@settings(deadline=None)
def test_dinkelbach_finds_the_best_ratio_that_brute_force_does(scores: list[float], rises: list[float]) -> None:
    verify = [1.0]
    for rise in rises:
        verify.append(verify[-1] + rise)
    costs = Costs(verify, DraftCost(per_node=0.01), 0.1)
    brute = max(
        (1 + sum(chosen)) / costs.step(size, 0)
        for size in range(len(scores) + 1)
        for chosen in combinations(scores, size)
    )

    def policy(rho: float) -> Speed:
        kept = costs.budget(rho, len(scores), 9).worth(scores)
        return Speed(1 + sum(scores[:kept]), costs.step(kept, 0))

    assert dinkelbach(policy, costs.plain.rate) == pytest.approx(brute, rel=1e-5)


def test_widths_that_follow_the_scores_are_faster_than_any_fixed_width() -> None:
    curve = CostCurve((0,), (1, 9), ((1.0, 2.6),))
    mixed = Trace(chains(0.95, seed=1).steps + chains(0.3, seed=2).steps)
    plan = best_setting(curve, 0.0, candidate(mixed, num_speculative_tokens=8))
    assert plan.rate > plan.speed.rate * 1.1
    assert plan.speed.rate > 1.0


def test_a_chain_is_as_long_as_its_steps_pay() -> None:
    curve = CostCurve((0,), (1, 16, 17), ((1.0, 1.0, 3.0),))
    lengths = {}
    for rate, cost in ((0.6, 0.02), (0.75, 0.1), (0.9, 0.1)):
        measured = candidate(chains(rate, 12, 2000), DraftCost(per_level=cost), num_speculative_tokens=12)
        plan = best_setting(curve, 0.0, measured)
        lengths[rate] = plan.setting.options["num_speculative_tokens"]
        expected = max((1 - rate ** (n + 1)) / (1 - rate) / (n * cost + 1) for n in range(13))
        assert plan.speed.rate == pytest.approx(expected, rel=0.05)  # a standard error of 1.5%
    assert lengths[0.75] < lengths[0.9]


# Predictions


def profile(*candidates: Candidate, target: CostCurve = STAIRS, overhead: float = 0.25) -> Profile:
    return Profile(1, {}, "m", "k", "today", target, overhead, candidates, (), PLAIN)


def test_plain_decoding_is_a_forward_and_the_overhead() -> None:
    assert predict(profile(), PLAIN) == Speed(1.0, 1.25)
    assert predict(profile(), PLAIN, batch=4).rate == pytest.approx(4 / 1.25)


def test_a_hopeless_drafter_ranks_below_plain_decoding() -> None:
    hopeless = candidate(chains(0.0), DraftCost(per_level=0.1), num_speculative_tokens=8)
    broken = Candidate("draft", {"draft_model": "d"}, {}, FREE, failure="does not fit")
    plans = rank(profile(hopeless, broken))
    assert [plan.setting.method for plan in plans] == ["none", "eagle"]


def test_what_a_setting_leaves_open_is_the_candidates() -> None:
    measured = candidate(chains(0.8), DraftCost(per_level=0.1), num_speculative_tokens=8)
    own = profile(measured)
    narrow = predict(own, Setting("eagle", {"head": "h"}, {"num_speculative_tokens": 2}))
    assert narrow == speed_of(STAIRS, 0.25, measured, {"num_speculative_tokens": 2})
    assert narrow.tokens == pytest.approx(1 + 0.8 + 0.64, abs=0.1)
    assert narrow.seconds == pytest.approx(1.25 + 0.2)
    assert predict(own, Setting("eagle", {"head": "h"})).tokens > narrow.tokens


def test_a_batch_pays_for_all_its_rows() -> None:
    curve = CostCurve((0,), (1, 8, 16, 64), ((1.0, 1.0, 2.0, 8.0),))
    measured = candidate(chains(0.8), num_speculative_tokens=7)
    alone, four = (speed_of(curve, 0.0, measured, {}, batch=batch) for batch in (1, 4))
    assert alone.seconds == 1.0
    assert four.seconds == pytest.approx(4.0)  # 32 rows
    assert best_setting(curve, 0.0, measured, batch=4).setting.options["num_speculative_tokens"] < 7


# Cascades


def cascade(inner_rate: float, outer_rate: float, inner_cost: float = 0.13, head: float = 0.015) -> Candidate:
    curve = CostCurve((0,), (1, 16), ((inner_cost, inner_cost),))
    options = {"num_speculative_tokens": 15, "min_draft": 12, "tree_nodes": 8, "tree_depth": 8}
    inner = Inner(curve, DraftCost(per_level=head), chains(inner_rate, 8, 1000, seed=1))
    return Candidate("cascade", {"head": "h", "draft_model": "d"}, options, FREE, chains(outer_rate, 15, 1000), inner)


def test_a_cascade_is_as_fast_as_its_three_levels_say() -> None:
    # The published example on a curve that is flat to 16 rows: 3.88 by a formula that leaves out the surplus that a
    # draft cut at 15 loses, and the step that an accepted draft costs the intermediate.
    flat = CostCurve((0,), (1, 16, 17), ((1.0, 1.05, 1.6),))
    plan = best_setting(flat, 0.0, cascade(0.75, 0.88))
    assert 3.3 < plan.speed.rate < 4.1
    assert 7 <= plan.setting.options["min_draft"] <= 12
    assert plan.setting.options["tree_depth"] < 8, "the inner drafter's depth is planned too"


def test_a_cascade_falls_with_its_intermediates_agreement_and_cost() -> None:
    flat = CostCurve((0,), (1, 16, 17), ((1.0, 1.05, 1.6),))
    rates = [best_setting(flat, 0.0, each).rate for each in (cascade(0.75, 0.9), cascade(0.75, 0.6))]
    assert rates[0] > rates[1]
    assert best_setting(flat, 0.0, cascade(0.75, 0.9, inner_cost=0.5)).rate < rates[0]


def test_one_inner_token_a_round_is_a_plain_draft_model() -> None:
    flat = CostCurve((0,), (1, 16, 17), ((1.0, 1.0, 1.6),))
    made = cascade(0.0, 0.8, head=0.0)
    alone = candidate(made.trace, DraftCost(per_level=0.13), num_speculative_tokens=15)
    # The cascade has one token left over when a draft is accepted whole, and pays its step for it.
    assert speed_of(flat, 0.0, made, {"min_draft": 4, "num_speculative_tokens": 4}).rate == pytest.approx(
        speed_of(flat, 0.0, alone, {"num_speculative_tokens": 4}).rate, rel=0.1
    )
