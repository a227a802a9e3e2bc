"""The records of a profile: what they compute, and what they refuse."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantspec.engine.costs import (
    Candidate,
    CostCurve,
    DraftCost,
    Inner,
    Measured,
    Profile,
    Setting,
    Step,
    Trace,
    file_name,
)
from quantspec.errors import ModelError
from quantspec.types import Budget

STAIRS = CostCurve((0,), (1, 16, 32, 64), ((1.0, 1.0, 1.6, 3.0),), tiles=(16, 32, 48, 64))
CURVE = CostCurve((0, 1000), (1, 2, 4, 8), ((1.0, 0.98, 1.3, 2.6), (2.0, 2.0, 2.6, 5.2)))
TREE = Step((0.6, 0.3, 0.5, 0.2), (-1, -1, 0, 1), (True, False, True, False), 10)


def profile() -> Profile:
    inner = Inner(CURVE, DraftCost(fixed=0.1), None)
    candidates = (
        Candidate("eagle", {"head": "h"}, {"num_speculative_tokens": 4}, DraftCost(per_level=0.1), Trace((TREE,))),
        Candidate("cascade", {"head": "h", "draft_model": "d"}, {"min_draft": 9}, DraftCost(), None, inner, "no file"),
    )
    chosen = Setting("eagle", {"head": "h"}, {"num_speculative_tokens": 3})
    return Profile(
        format_version=1,
        machine={"cpu": "z", "cores": 2},
        model="m" * 64,
        kernels="k",
        created="2026-01-01",
        target=CURVE,
        overhead=0.01,
        candidates=candidates,
        measured=(Measured(chosen, 9.0, 10.0, 9.5, 10.5),),
        chosen=chosen,
    )


def test_what_a_setting_and_a_candidate_cannot_do_without() -> None:
    with pytest.raises(ModelError, match="there is no part 'foot'"):
        Setting.from_dict({"method": "eagle", "parts": {"foot": "f"}, "options": {}})
    bare = profile().candidates[0].as_dict() | {"options": {"tree_depth": 4}}
    with pytest.raises(ModelError, match="must have num_speculative_tokens"):
        Candidate.from_dict(bare)


def test_a_curve_is_linear_between_measurements_and_never_falls() -> None:
    assert CURVE.at(2, 0) == 1.0, "a measured dip is noise"
    assert CURVE.at(3, 0) == pytest.approx(1.15)
    assert CURVE.at(3, 500) == pytest.approx((1.15 + 2.3) / 2)
    assert CURVE.at(16, 0) == pytest.approx(2.6 + 8 * (2.6 - 1.3) / 4), "the last slope goes on"
    assert CURVE.at(1, 3000) == pytest.approx(4.0)
    assert CURVE.relative(8, 1000) == pytest.approx(2.6)


def test_a_staircase_costs_its_tiles_ends() -> None:
    assert [STAIRS.at(rows, 0) for rows in (1, 16, 17, 32)] == pytest.approx([1.0, 1.0, 1.6, 1.6])
    assert STAIRS.at(65, 0) == STAIRS.at(128, 0) == pytest.approx(3.0 + 64 * 1.4 / 32)
    assert STAIRS.edges(0) == (16, 32, 48, 64)


def test_edges_of_a_smooth_curve_are_all_widths_that_cost() -> None:
    assert CURVE.edges(0) == (2, 3, 4, 5, 6, 7, 8)  # up to 2 rows cost nothing more


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"widths": (2, 4)}, "begin with 1"),
        ({"widths": (1, 1)}, "widths must rise"),
        ({"tiles": ()}, "tiles must rise"),
        ({"seconds": ((1.0,),)}, "a value per width"),
        ({"seconds": ((1.0, 0.0),)}, "above 0"),
        ({"seconds": ((1.0, float("nan")),)}, "finite"),
        ({"seconds": ((1.0, "2"),)}, r"seconds\[0\]\[1\] must be a finite number"),
        ({"extra": 1}, "unknown 'extra'"),
    ],
)
def test_a_false_curve_is_refused_in_one_line(changes: dict, words: str) -> None:
    good = {"contexts": [0], "widths": [1, 2], "seconds": [[1, 2.0]], "tiles": None}
    assert CostCurve.from_dict(good).at(2, 0) == 2.0
    with pytest.raises(ModelError, match=words):
        CostCurve.from_dict({**good, **changes})


def test_a_draft_costs_its_parts_and_none_costs_nothing() -> None:
    cost = DraftCost(fixed=1.0, per_level=0.5, per_node=0.25)
    assert cost.at(2, 4) == 3.0
    assert cost.at(0, 0) == 0.0


def test_narrower_settings_follow_from_the_widest_trace() -> None:
    assert TREE.kept(Budget(4, 9)) == [0, 2, 1, 3]
    assert TREE.tokens(Budget(4, 9)) == 3
    assert TREE.tokens(Budget(1, 9)) == 2
    assert TREE.tokens(Budget(4, 1)) == 2
    assert TREE.tokens(Budget(4, 9, min_score=0.55)) == 2
    assert TREE.tokens(Budget(0, 0)) == 1
    assert Trace((TREE, Step((), (), (), 12))).length(Budget(4, 9)) == 2.0


def test_acceptance_by_position_counts_only_steps_that_got_there() -> None:
    wrong = Step((0.6, 0.4), (-1, 0), (False, False), 11)
    short = Step((0.9,), (-1,), (True,), 12)
    assert Trace((TREE, wrong, short)).acceptance_by_position() == pytest.approx((2 / 3, 1.0))
    assert Trace(()).acceptance_by_position() == ()


@given(
    st.lists(st.floats(0, 1), max_size=12).map(lambda scores: sorted(scores, reverse=True)),
    st.lists(st.floats(0, 0.5), max_size=12),
    st.integers(0, 12),
)
@settings(deadline=None)
def test_the_nodes_worth_keeping_gain_most(scores: list[float], prices: list[float], most: int) -> None:
    budget = Budget(most, 9, min_score=0.1, prices=tuple(prices))
    gains = [0.0]
    for k, score in enumerate(scores[:most], 1):
        gains.append(gains[-1] + score - budget.price(k))
    # Equal gains may part in the last bits of their sums of at most 12 numbers below 1.
    assert gains[budget.worth(scores)] == pytest.approx(max(gains), abs=1e-12)


def test_a_profile_survives_its_file(tmp_path) -> None:
    profile().save(tmp_path / "p.json")
    assert Profile.load(tmp_path / "p.json") == profile()
    assert profile().candidate(profile().chosen) == profile().candidates[0]
    assert profile().candidate(Setting("draft")) is None


def test_a_damaged_or_foreign_profile_is_one_line(tmp_path) -> None:
    path = tmp_path / "p.json"
    for text, words in (
        ("{", "is not JSON"),
        ("[]", "is not a JSON object"),
        ("{}", "is no profile: Profile has no format_version"),
        (json.dumps({**profile().as_dict(), "format_version": 9}), "version 9, this quantspec reads 1"),
        (json.dumps({**profile().as_dict(), "overhead": "much"}), "Profile.overhead must be a finite number"),
    ):
        path.write_text(text)
        with pytest.raises(ModelError, match=words) as caught:
            Profile.load(path)
        assert caught.value.hint == "run quantspec tune again"
    with pytest.raises(ModelError, match="cannot read"):
        Profile.load(tmp_path / "none.json")


def test_a_profile_holds_for_its_own_machine_model_and_kernels() -> None:
    own = profile()
    assert own.refusal({"cores": 2, "cpu": "z"}, "m" * 64, "k") is None
    assert "another model" in str(own.refusal({"cpu": "z", "cores": 2}, "n", "k"))
    assert "cores: 2, here 4" in str(own.refusal({"cpu": "z", "cores": 4}, "m" * 64, "k"))
    assert "other kernels (k, here l)" in str(own.refusal({"cpu": "z", "cores": 2}, "m" * 64, "l"))
    assert file_name("m" * 64, {"a": 1, "b": 2}) == file_name("m" * 64, {"b": 2, "a": 1}) != file_name("m" * 64, {})
