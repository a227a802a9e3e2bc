"""A whole tune: its profile, what it resumes, what it refuses, and how it is explained."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from quantspec.calibrate.cost import curve, explain, picture, run
from quantspec.calibrate.cost.config import TuneConfig
from quantspec.calibrate.cost.race import Race, Run
from quantspec.calibrate.cost.work import Work
from quantspec.calibrate.cost.workbench import Workbench
from quantspec.engine.costs import PLAIN, Profile, Setting
from quantspec.engine.engine import Engine
from quantspec.errors import ModelError, ResourceError, UsageError
from quantspec.models.fingerprint import fingerprint
from quantspec.models.resolve import FAMILY

HEAD, DRAFT = str(FAMILY / "eagle-target"), str(FAMILY / "intermediate-w4")
Quick = Callable[..., TuneConfig]


@pytest.fixture
def tuned(quick: Quick, tmp_path: Path) -> run.Tuned:
    """With a head of another model among the drafters."""
    stray = tmp_path / "stray"
    stray.symlink_to(FAMILY / "eagle-intermediate")
    return run.tune(quick(head=(HEAD, str(stray))), tmp_path / "profile.json", tmp_path, lambda line: None)


def test_the_profile(tuned: run.Tuned, tmp_path: Path) -> None:
    profile = Profile.load(tuned.path)
    assert profile == tuned.profile
    assert profile.refusal(profile.machine, profile.model, profile.kernels) is None
    assert profile.target.contexts == (64,)
    assert [each.method for each in profile.candidates] == ["lookup", "eagle", "stray"]
    assert profile.candidates[2].failure
    assert "for a model of width" in profile.candidates[2].failure
    settings = [each.setting for each in profile.measured]
    assert PLAIN in settings
    assert {each.method for each in settings} == {"none", "lookup", "eagle"}
    assert all(each.weights.keys() == each.parts.keys() for each in profile.candidates)
    assert profile.chosen == max(profile.measured, key=lambda each: each.tokens_per_second).setting
    assert all(each.low <= each.tokens_per_second <= each.high for each in profile.measured)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["profile.json", "questions.jsonl", "stray"]


def test_it_is_explained(tuned: run.Tuned) -> None:
    found = explain.rows(tuned.profile)
    speeds = [row.measured for row in found if row.measured is not None]
    assert speeds == sorted(speeds, reverse=True)
    assert [row.chosen for row in found] == [True, *[False] * (len(found) - 1)]
    plain = next(row for row in found if row.drafter == "none")
    assert plain.speedup == pytest.approx(1)
    assert found[-1].cells()[0] == "stray"
    assert found[-1].cells()[-1].startswith("fails: ")
    assert all(row.error == pytest.approx(row.predicted / row.measured - 1) for row in found if row.measured)
    page = explain.html(tuned.profile)
    assert page.count("<svg") == page.count("</svg>") == 2
    assert not re.search(r"<script|https?://|src=|@import", page)
    assert picture.why_not() or picture.png(tuned.profile).startswith(b"\x89PNG")


def test_an_interrupted_tune_goes_on(quick: Quick, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped while a drafter is measured, and again in the race: nothing finished is measured twice."""
    config, out = quick(head=(HEAD,)), tmp_path / "profile.json"

    def go(stop: str) -> list[str]:
        said: list[str] = []

        def note(line: str) -> None:
            said.append(line)
            if line.startswith(stop):
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run.tune(config, out, tmp_path, note)
        return said

    assert go("measuring eagle")[-2:] == ["measuring lookup", "measuring eagle-target"]
    second = go("running")
    assert second[0].startswith("going on")
    assert not any(line.startswith(("timing", "measuring lookup")) for line in second)
    assert not out.exists()
    ran = []
    one = Race._one
    monkeypatch.setattr(Race, "_one", lambda self, *arguments: (ran.append(arguments[:2]), one(self, *arguments)))
    kept = run.Work.put
    count = 0

    def put(self: Work, name: str, value: object) -> None:
        nonlocal count
        kept(self, name, value)
        count += name == "race"
        if count == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(run.Work, "put", put)
    with pytest.raises(KeyboardInterrupt):
        run.tune(config, out, tmp_path, lambda line: None)
    first, ran = set(ran), []
    monkeypatch.setattr(run.Work, "put", kept)
    tuned = run.tune(config, out, tmp_path, lambda line: None)
    assert len(first) == 3
    assert len(tuned.profile.measured) == 3
    assert not (tmp_path / "profile.json.partial").exists()


def test_parts_of_another_tune_are_not_taken(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    with Work(path, {"model": "a"}) as work:
        work.put("target", 1)
    with Work(path, {"model": "a"}) as work:
        assert work.resumed
        assert work.get("target") == 1
        with pytest.raises(UsageError, match="another run"), Work(path, {"model": "a"}):
            pass
    with Work(path, {"model": "b"}) as work:
        assert not work.resumed
    work.path.write_text("{")
    with Work(path, {"model": "a"}) as work:
        assert work.get("target") is None


@pytest.mark.parametrize("noisy", ["forward", "text"])
def test_a_noisy_machine_keeps_its_profile(
    quick: Quick, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, noisy: str
) -> None:
    out = tmp_path / "profile.json"
    out.write_text("as it was")
    said: list[str] = []
    if noisy == "forward":
        monkeypatch.setattr(run, "noise", lambda times: 0.5)
    else:
        monkeypatch.setattr(Race, "noise", lambda self: 0.5)
        monkeypatch.setattr(run, "noise", lambda times: 0.0)
    with pytest.raises(ResourceError, match=f"too noisy to measure: times of the same {noisy} differ by 50%") as error:
        run.tune(quick(max_noise=0.2), out, tmp_path, said.append)
    assert "stays as it is" in str(error.value)
    assert "--max-noise" in str(error.value.hint)
    assert out.read_text() == "as it was"
    if noisy == "forward":
        assert sum("timing more of them" in line for line in said) == 2
    else:  # the next tune runs them again, and only them
        assert json.loads((tmp_path / "profile.json.partial").read_text())["parts"]["race"] is None


def test_a_profile_that_holds_is_taken(
    tuned: run.Tuned, quick: Quick, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it need not be measured again: not if drafters, machine, kernels or the file are others."""
    said: list[str] = []
    monkeypatch.setattr(run._Tuning, "profile", lambda *arguments: pytest.fail("measured"))

    def take(heads: tuple[str, ...]) -> Profile:
        said.clear()
        return run.tune(quick(head=heads), tuned.path, tmp_path, said.append, again=False).profile

    heads = (HEAD, str(tmp_path / "stray"))
    assert take(heads) == tuned.profile
    text = tuned.path.read_text()
    for heads_then, change, complaint in (
        ((HEAD,), ("", ""), "other drafters"),
        (heads, (tuned.profile.model, "0" * 64), "another model"),
        (heads, ('"threads": 1', '"threads": 7'), "another machine"),
        (heads, ("sources ", "sources 0"), "other kernels"),
        (heads, (fingerprint(Path(HEAD)), "0" * 64), "other drafters"),
        (heads, ("{", "["), "measured anew"),
    ):
        tuned.path.write_text(text.replace(*change))
        with pytest.raises(pytest.fail.Exception):
            take(heads_then)
        assert any(complaint in line for line in said), complaint


def test_prompts_longer_than_the_context(quick: Quick, tmp_path: Path, prompts: Path) -> None:
    said: list[str] = []
    config = quick(max_context=40)
    with pytest.raises(ModelError, match=r"no prompt of .* leaves room for 16 new tokens in a context of 40"):
        run.tune(config, tmp_path / "p.json", tmp_path, said.append)
    with prompts.open("a") as file:
        file.write(json.dumps({"question": "How many? " * 100}) + "\n")
    run.tune(quick(max_context=128), tmp_path / "p.json", tmp_path, said.append)
    assert "left out 1 of 3 prompts: longer than the context of 128 tokens" in said


def test_a_drafter_that_fails_late_is_left_out(quick: Quick, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was measured, and then fails in the race."""
    failure = Workbench.failure

    def fail(self: Workbench, engine: Engine, setting: object) -> str | None:
        racing = engine.config.method == "lookup" and said[-1].startswith("running")
        return "gone" if racing else failure(self, engine, setting)  # type: ignore[arg-type]

    said: list[str] = []
    monkeypatch.setattr(Workbench, "failure", fail)
    tuned = run.tune(quick(), tmp_path / "p.json", tmp_path, said.append)
    assert [each.setting for each in tuned.profile.measured] == [PLAIN]
    assert tuned.profile.chosen == PLAIN
    assert "lookup fails: gone" in said
    assert [(row.drafter, row.failure) for row in explain.rows(tuned.profile)] == [("none", None), ("lookup", "gone")]


def test_settings_race_as_auto_runs_them(tuned: run.Tuned, quick: Quick) -> None:
    """As wide as was measured, with a controller that narrows each draft."""
    bench = Workbench(run.build(quick().engine(), lambda line: None))
    race = Race(bench, tuned.profile, [PLAIN, Setting("eagle", {"head": HEAD}, {"num_speculative_tokens": 1})], [1, 1])
    plain, eagle = race._engines[0], race._engines[1]
    widest = next(each for each in tuned.profile.candidates if each.method == "eagle").options
    assert plain.outlook is None
    assert eagle.outlook is not None
    assert eagle.budget.max_nodes == eagle.outlook.nodes == widest["num_speculative_tokens"] > 1


def test_times_of_a_race() -> None:
    """The least time of each step counts; rounds with other steps are averaged with them."""
    race = Race.__new__(Race)
    race.runs = [
        Run(0, 0, (1, 2), (1.0, 9.0)),
        Run(0, 0, (1, 2), (5.0, 1.0)),
        Run(0, 0, (1, 1, 1), (0.1, 0.1, 0.1)),
        Run(0, 1, (4,), (2.0,)),
        Run(1, 0, (3,), (1.0,)),
    ]
    assert race.speed(0).value == pytest.approx((3 + 3 + 4) / (2.0 + 0.3 + 2.0))
    assert race.speed(1).value == 3
    assert race.noise() == pytest.approx(10 / 6 - 1)


@pytest.mark.parametrize(
    "wrong",
    [{"seconds": 0.0}, {"max_noise": 0.0}, {"contexts": ()}, {"contexts": (0,)}, {"max_new_tokens": 2}, {"threads": 0}],
)
def test_options_that_are_wrong(wrong: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        TuneConfig(**wrong)  # type: ignore[arg-type]


def test_contexts_end_at_the_models_limit(quick: Quick, tuned: run.Tuned) -> None:
    bench = run.build(quick().engine(), lambda line: None)
    forwards = curve.Forwards(bench.verifier, (64, 100_000, 200_000), (1, 2), 1, 0)
    assert forwards.contexts == (64, bench.model.max_positions - 3)


def test_who_runs_on() -> None:
    """Plain decoding, and whoever was fast or was planned to be."""
    race = Race.__new__(Race)
    race._settings = [Setting(method) for method in ("none", "lookup", "draft", "eagle")]
    race._planned = [100.0, 220.0, 50.0, 250.0]
    race._engines = dict.fromkeys(range(4))  # type: ignore[assignment]
    race.runs = [Run(number, 0, (speed,), (1.0,)) for number, speed in enumerate((90, 80, 70, 300))]
    assert race._hopeful(range(4)) == [0, 1, 3]
