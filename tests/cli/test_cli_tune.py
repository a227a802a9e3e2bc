"""``quantspec tune``: its profile, table and pictures, and one line for each thing that can be wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from quantspec.calibrate.cost.race import Race
from quantspec.engine.costs import Profile

QUICK = ("--contexts", "16,32", "--max-new-tokens", 12, "--seconds", 1, "--threads", 1)
ANY_NOISE = ("--max-noise", 1e9)  # tests run on busy machines


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"a baker has {n} rolls"}) + "\n" for n in (3, 24)))
    return path


def test_a_profile_and_its_explanation(call, tiny: Path, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "tiny.json"
    options = (*QUICK, *ANY_NOISE, "--head", tmp_path / "missing", "--out", out, "--explain")
    result = call("tune", tiny, *options, "--prompts", prompts, "--json")
    assert result.code == 0, result.err
    report, profile = json.loads(result.out), Profile.load(out)
    assert report["profile"] == str(out)
    assert report["chosen"] == profile.chosen.as_dict()
    assert {row["drafter"] for row in report["rows"]} == {"none", "lookup", "missing"}
    assert "no model folder" in next(row["failure"] for row in report["rows"] if row["drafter"] == "missing")
    assert report["median_error"] >= 0
    assert [Path(path).suffix for path in report["pictures"]][:1] == [".html"]
    assert all(Path(path).stat().st_size for path in report["pictures"])
    assert "note: timing forwards" in result.err
    assert profile.target.contexts == (16, 32)
    # What is there and holds is explained and not measured again.
    again = call("tune", tiny, *options)
    assert again.code == 0, again.err
    assert "timing" not in again.err
    assert "measured, tokens/s" in again.out
    assert "chosen: " in again.out
    assert f"profile: {out}" in again.out
    assert "\x1b" not in again.out


def test_the_default_place(call, tiny: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And an interruption: the same command goes on, and the profile is where generate looks for it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    command = ("tune", tiny, *QUICK, *ANY_NOISE, "--prompts", prompts)
    with monkeypatch.context() as patched:

        def stop(*arguments: object) -> None:
            raise KeyboardInterrupt

        patched.setattr(Race, "run", stop)
        stopped = call(*command)
    assert stopped.code == 130
    assert "what is finished is kept" in stopped.error
    assert f"go on with: quantspec tune {tiny}" in stopped.error
    places = list((tmp_path / "cache" / "quantspec" / "profiles").iterdir())
    assert [path.name.split(".", 1)[1] for path in places] == ["json.partial"]
    result = call(*command)
    assert result.code == 0, result.err
    assert "going on with what an interrupted tune has measured" in result.err
    assert "timing" not in result.err
    assert [path.suffix for path in places[0].parent.iterdir()] == [".json"]


def test_a_machine_too_noisy_to_measure(call, tiny: Path, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "kept.json"
    out.write_text("as it was")
    result = call("tune", tiny, *QUICK, "--max-noise", 1e-9, "--prompts", prompts, "--out", out)
    assert (result.code, result.out) == (4, "")
    assert "too noisy to measure" in result.error
    assert f"the profile {out} stays as it is" in result.error
    assert out.read_text() == "as it was"


@pytest.mark.parametrize(
    "options, code, said",
    [
        (("--contexts", "few"), 2, "is not a list of whole numbers"),
        (("--contexts", "0"), 2, "contexts must be"),
        (("--seconds", 0), 2, "seconds must be at least"),
        (("--max-new-tokens", 1), 2, "max_new_tokens must be at least"),
        (("--max-noise", -1), 2, "max_noise must be above 0"),
        (("--out", "no/such/folder/p.json"), 2, "cannot write"),
        (("--out", "profile.html"), 2, "would be overwritten by the picture"),
        (("--seconds", "nan"), 2, "seconds must be at least"),
        (("--prompts", "none.jsonl"), 3, "cannot read text"),
        (("--draft-model", "no/such/model/there"), 3, "no model folder"),
        (("--backend", "cpu-int3"), 2, "unknown backend"),
        (("--max-context", 14), 3, "no prompt of the bundled set leaves room"),
    ],
)
def test_what_is_wrong(call, tiny: Path, options: tuple[object, ...], code: int, said: str) -> None:
    result = call("tune", tiny, *QUICK, *options)
    assert (result.code, result.out) == (code, ""), result.err
    assert said in result.error


def test_a_model_that_is_none(call, tmp_path: Path) -> None:
    assert call("tune", tmp_path / "nothing").code == 3
