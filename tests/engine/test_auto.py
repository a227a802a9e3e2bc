"""``method="auto"``: the profile's choice is loaded and its text is plain, whatever the widths; profiles that do not
hold are told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_text import PARAMS, PROMPTS, assert_plain_text

import quantspec
from quantspec.engine import here
from quantspec.engine.config import EngineConfig
from quantspec.engine.controller import Controller
from quantspec.engine.costs import (
    PLAIN,
    Candidate,
    CostCurve,
    DraftCost,
    Inner,
    Measured,
    Profile,
    Setting,
    Step,
    Trace,
)
from quantspec.engine.llm import LLM
from quantspec.errors import UsageError
from quantspec.models.fingerprint import fingerprint
from quantspec.types import Budget, SamplingParams

CURVE = CostCurve((0, 200), (1, 64), ((1e-3, 1e-3),) * 2)  # rows cost nothing: whatever is likely at all is drafted
SMALL = CostCurve((0,), (1, 16), ((1e-4, 2e-4),))
GOOD = Trace(tuple(Step((0.9, 0.8, 0.1), (-1, 0, -1), (True, i % 4 > 0, False), 20) for i in range(8)))
WIDEST = {
    "lookup": {"num_speculative_tokens": 8},
    "draft": {"num_speculative_tokens": 6},
    "eagle": {"num_speculative_tokens": 12, "tree_depth": 3, "tree_top_k": 3},
    "cascade": {
        "num_speculative_tokens": 8,
        "min_draft": 6,
        "tree_nodes": 4,
        "tree_depth": 2,
        "tree_top_k": 2,
    },
}
Make = Callable[..., Path]


@pytest.fixture(scope="module")
def parts(family: dict[str, Path]) -> dict[str, dict[str, str]]:
    names = {name: str(folder) for name, folder in family.items()}
    return {
        "none": {},
        "lookup": {},
        "draft": {"draft_model": names["intermediate"]},
        "eagle": {"head": names["target_head"]},
        "cascade": {"draft_model": names["intermediate"], "head": names["intermediate_head"]},
    }


@pytest.fixture
def profile(family: dict[str, Path], parts: dict[str, dict[str, str]], llms: dict[str, LLM], tmp_path: Path) -> Make:
    """Writes a profile of the family's target in which one method is the fastest, the others in order behind it."""

    def make(chosen: str, **changes: Any) -> Path:
        cheap = DraftCost(per_level=2e-5)
        candidates = tuple(
            Candidate(
                method,
                parts[method],
                options,
                cheap,
                GOOD,
                Inner(SMALL, cheap, GOOD) if method == "cascade" else None,
                weights={part: fingerprint(Path(folder)) for part, folder in parts[method].items()},
            )
            for method, options in WIDEST.items()
        )
        settings = [
            Setting(each.method, each.parts, {**each.options, "num_speculative_tokens": 4}) for each in candidates
        ]
        measured = tuple(Measured(each, 9.0, 9.0 - i, 1.0, 10.0) for i, each in enumerate(settings))
        best = next((each for each in settings if each.method == chosen), PLAIN)
        engine = llms["none"]._engine
        kernels = here.kernels_of(engine.model, engine.config)
        made = Profile(
            1, here.machine(EngineConfig()), fingerprint(family["target"]), kernels, "today", CURVE, 1e-4, candidates,
            measured, best,
        )  # fmt: skip
        path = tmp_path / f"{chosen}.json"
        replace(made, **changes).save(path)
        return path

    return make


def load(family: dict[str, Path], path: Path | None, **options: Any) -> tuple[LLM, list[str]]:
    torch.set_num_threads(1)
    told: list[str] = []
    named = {"method": "auto", "profile": None if path is None else str(path), "max_batch": 3, "prompt_lookup_min": 2}
    return quantspec.load(str(family["target"]), notice=told.append, **{**named, **options}), told


# Texts


@pytest.mark.parametrize("method", ["lookup", "draft", "eagle", "cascade"])
def test_the_text_is_plain_with_the_drafter_that_the_profile_chose(
    family: dict[str, Path], llms: dict[str, LLM], profile: Make, method: str
) -> None:
    llm, told = load(family, profile(method))
    assert llm.config.method == method
    assert llm._engine.outlook is not None
    drafted = 0
    for params in PARAMS:
        found, plain = (one.generate(PROMPTS, params) for one in (llm, llms["none"]))
        assert [each.token_ids for each in found] == [each.token_ids for each in plain]
        drafted += sum(each.stats.drafted_tokens for each in found)
    assert drafted > 0  # how much depends on how fast this machine is just now
    assert not [line for line in told if "profile" in line]


@pytest.mark.parametrize("method", ["draft", "eagle", "cascade"])
def test_the_text_is_plain_while_drafting_goes_off_and_on_and_widths_change(
    family: dict[str, Path], llms: dict[str, LLM], profile: Make, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    off, tile = Budget(0, 0), Budget(7, 4, prices=(0.0,) * 3 + (0.2, 0.0, 0.0, 0.0), level_price=0.01)
    budgets = cycle([tile, off, off, Budget(2, 2), off, off, off, off, tile, Budget(5, 1), Budget(12, 6)])
    monkeypatch.setattr(Controller, "budget", lambda self, context, batch: next(budgets))
    assert_plain_text(load(family, profile(method))[0], llms["none"])


def test_a_drafter_that_loses_rests_and_the_text_stays_plain(
    family: dict[str, Path], llms: dict[str, LLM], profile: Make
) -> None:
    params = SamplingParams(max_new_tokens=120, ignore_eos=True, temperature=1.3, seed=4)
    slow = profile("eagle")
    made = Profile.load(slow)
    steep = CostCurve((0,), (1, 2, 16), ((1e-3, 3e-3, 4e-2),))  # a second row costs two more
    replace(made, target=steep, chosen=made.chosen).save(slow)
    llm, told = load(family, slow)
    llm._engine.outlook = replace(llm._engine.outlook, speed=replace(llm._engine.outlook.speed, tokens=9.0))
    found, plain = (one.generate(PROMPTS, params) for one in (llm, llms["none"]))
    assert [each.token_ids for each in found] == [each.token_ids for each in plain]
    assert any("does not pay here" in line for line in told)
    assert all(each.stats.drafted_tokens < 60 for each in found)


def test_plain_decoding_can_be_the_choice(family: dict[str, Path], profile: Make) -> None:
    llm, told = load(family, profile("none"))
    assert (llm.config.method, llm._engine.outlook, told) == ("none", None, [])


# What is chosen


def test_drafts_have_room_for_the_widest_that_was_measured(family: dict[str, Path], profile: Make) -> None:
    eagle = load(family, profile("eagle"))[0].config
    assert (eagle.num_speculative_tokens, eagle.tree_depth, eagle.tree_top_k) == (12, 3, 3)
    cascade = load(family, profile("cascade"))[0].config
    assert (cascade.num_speculative_tokens, cascade.min_draft, cascade.tree_nodes) == (8, 6, 4)


def test_no_method_is_auto_once_there_is_a_profile(family: dict[str, Path], profile: Make) -> None:
    assert load(family, profile("draft"), method=None)[0].config.method == "draft"
    llm, told = load(family, None, method=None)
    assert llm.config.method == "lookup"
    assert not [line for line in told if "profile" in line]


def test_named_parts_and_options_come_before_the_profile(
    family: dict[str, Path], parts: dict[str, dict[str, str]], profile: Make
) -> None:
    path = profile("eagle")
    assert load(family, path, **parts["draft"])[0].config.method == "draft", "measured first of those with this model"
    assert load(family, path, method=None, **parts["cascade"])[0].config.method == "cascade"
    narrow = load(family, path, method=None, num_speculative_tokens=3, **parts["draft"])[0]
    assert (narrow.config.method, narrow._engine.outlook) == ("draft", None)
    with pytest.raises(UsageError, match="auto chooses tree_depth itself"):
        load(family, path, tree_depth=2)
    with pytest.raises(UsageError, match="exact rule"):
        load(family, path, rule="ratio")


# Profiles that do not hold


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": "0" * 64}, "another model"),
        ({"machine": {"processor": "another"}}, "another machine"),
        ({"kernels": "older"}, "other kernels"),
    ],
)
def test_a_profile_of_something_else_is_one_line_and_todays_default(
    family: dict[str, Path], llms: dict[str, LLM], profile: Make, changes: dict[str, Any], words: str
) -> None:
    llm, told = load(family, profile("eagle", **changes))
    assert llm.config.method == "lookup"
    lines = [line for line in told if "profile" in line]
    assert len(lines) == 1
    assert words in lines[0]
    assert "quantspec tune" in lines[0]
    assert llm.generate("She sold", PARAMS[0]).token_ids == llms["none"].generate("She sold", PARAMS[0]).token_ids


def test_no_profile_a_damaged_one_and_unknown_parts_are_told(
    family: dict[str, Path], parts: dict[str, dict[str, str]], profile: Make, tmp_path: Path
) -> None:
    assert any("no profile of" in line for line in load(family, None)[1])
    (tmp_path / "bad.json").write_text("{")
    assert any("is not JSON" in line for line in load(family, tmp_path / "bad.json")[1])
    head = {"head": parts["cascade"]["head"]}
    bare = profile("eagle", candidates=(), measured=())
    llm, told = load(family, bare, **parts["draft"])
    assert llm.config.method == "draft"
    assert any("knows no drafter of these parts" in line for line in told), head


def test_a_drafter_that_is_gone_or_was_never_measured_is_told(
    family: dict[str, Path], parts: dict[str, dict[str, str]], profile: Make, tmp_path: Path
) -> None:
    path = profile("eagle")
    made, gone = Profile.load(path), Setting("eagle", {"head": str(tmp_path / "gone")})
    trained_on = replace(made.candidates[2], weights={"head": "0" * 64})
    kept = Candidate("eagle", gone.parts, WIDEST["eagle"], DraftCost(), GOOD)
    edited = Candidate("lookup", {}, {"num_speculative_tokens": 8, "prompt_lookup_max": 0}, DraftCost(), GOOD)
    for chosen, candidates, words in (
        (gone, (kept,), "no model folder at"),
        (gone, (), "it holds nothing of the eagle that it chose"),
        (Setting("eagle", parts["eagle"]), (trained_on,), "has other weights than were measured"),
        (Setting("lookup"), (edited,), "prompt_lookup_max must be"),
    ):
        replace(made, chosen=chosen, candidates=candidates).save(path)
        llm, told = load(family, path, method=None)
        assert llm.config.method == "lookup", "as without a profile"
        assert [words in line and "quantspec tune" in line for line in told if "profile" in line] == [True]


def test_a_profile_that_a_method_or_option_overrides_is_told(family: dict[str, Path], profile: Make) -> None:
    for options, words in (({"method": "none"}, "method none"), ({"method": None, "tree_depth": 2}, "tree_depth 2")):
        told = load(family, profile("eagle"), **options)[1]
        assert [f"not used: {words} was asked for" in line for line in told if "profile" in line] == [True]
