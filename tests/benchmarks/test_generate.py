"""``quantspec bench generate``: turns, failures, interruptions, and once with real models. No timing is asserted."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from quantspec.benchmarks import generate, generate_contenders
from quantspec.benchmarks.generate_config import GenerateBench
from quantspec.benchmarks.generate_contenders import LOOKUP_TOKENS, Setting, methods, peers
from quantspec.benchmarks.generate_rows import ALL, Report
from quantspec.benchmarks.peers import ours
from quantspec.benchmarks.peers.process import Contender
from quantspec.cli.main import run as cli
from quantspec.errors import ModelError, UsageError
from quantspec.models.resolve import FAMILY

QUICK = {"limit": 2, "max_new_tokens": 6, "rounds": 2, "threads": 1}
FLAGS = ("--limit", "2", "--max-new-tokens", "6", "--rounds", "2", "--threads", "1")


def silent(line: str) -> None:
    """Nobody listens."""


class Cast:
    """Who takes part: stubs that behave as they are called."""

    def __init__(self) -> None:
        self.ours: Sequence[str] = ("none",)
        self.peers: Sequence[str] = ()

    def methods(self, *arguments: Any) -> list[Contender]:
        return [self._stub(name, "ours") for name in self.ours]

    def others(self, *arguments: Any) -> list[Contender]:
        return [self._stub(name, "peer") for name in self.peers]

    def _stub(self, name: str, kind: Any) -> Contender:
        return Contender(name=name, kind=kind, module="stub_engine", options={"method": name})


@pytest.fixture
def cast(monkeypatch: pytest.MonkeyPatch) -> Cast:
    monkeypatch.setenv("XDG_CACHE_HOME", "/nonexistent")  # no profiles
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
    cast = Cast()
    monkeypatch.setattr(generate_contenders, "methods", cast.methods)
    monkeypatch.setattr(generate_contenders, "peers", cast.others)
    return cast


def errors(report: Report) -> dict[str, str | None]:
    return {row.method: row.error for row in report.rows if row.task == ALL}


def test_who_fails_is_left_behind(cast: Cast) -> None:
    cast.ours, cast.peers = ("none", "eagle", "raise"), ("crash", "garbage", "unloadable", "wrong")
    heard: list[str] = []
    report = generate.run(GenerateBench(**QUICK), heard.append)
    assert errors(report) == {
        "none": None,
        "eagle": None,
        "raise": "ValueError: no luck",
        "crash": "crashed with SIGSEGV: last words",
        "garbage": "speaks another protocol",
        "unloadable": "RuntimeError: no weights",
        "wrong": None,
    }
    assert "crash fails: crashed with SIGSEGV: last words" in heard
    assert "eagle: eagle is a stub" in heard
    eagle, wrong = report.row("eagle"), report.row("wrong")
    assert eagle is not None
    assert wrong is not None
    assert (eagle.equal_to_plain, eagle.texts, eagle.tokens_per_second) == (True, 4, 6.0)
    assert (wrong.equal_to_plain, wrong.equal_share) == (False, 0.0)
    assert report.complete
    assert report.curve == {1: 0.1, 2: 0.15}
    assert report.contenders["eagle"]["describe"] == "eagle"


def test_who_hangs_is_left_behind(cast: Cast) -> None:
    cast.peers = ("hang",)
    report = generate.run(GenerateBench(**{**QUICK, "rounds": 1, "limit": 1}, time_limit=1.0), silent)
    assert errors(report)["hang"] == "gave no answer within 1 s"


def test_contenders_that_share_a_process_do_not_share_its_fate(cast: Cast, monkeypatch: pytest.MonkeyPatch) -> None:
    def twins(*arguments: Any) -> list[Contender]:
        return [Contender(name=name, module="stub_engine", options={"method": "crash"}) for name in ("one", "two")]

    monkeypatch.setattr(generate_contenders, "peers", twins)
    report = generate.run(GenerateBench(**{**QUICK, "limit": 1}), silent)
    # The second text of the shared process brings it down; it is started anew for the other, which then has its turn.
    assert sorted(str(error) for name, error in errors(report).items() if name != "none") in (
        ["None", "crashed with SIGSEGV: last words"],
        ["crashed with SIGSEGV: last words"] * 2,
    )


def test_without_plain_decoding_there_is_nothing(cast: Cast, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Contender(name="none", kind="ours", module="stub_engine", options={"method": "raise"})
    monkeypatch.setattr(generate_contenders, "methods", lambda *arguments: [broken])
    with pytest.raises(ModelError, match="plain decoding fails: ValueError: no luck"):
        generate.run(GenerateBench(**QUICK), silent)


def test_what_was_interrupted_goes_on(cast: Cast, tmp_path: Path) -> None:
    cast.ours = ("none", "eagle")
    config, asked = GenerateBench(**QUICK, out=tmp_path / "out"), list[int]()

    def stop() -> bool:
        asked.append(1)
        return len(asked) > 2 + 3 + 2  # two are loaded, a turn is finished, and in the middle of the next

    first = generate.run(config, silent, stop)
    assert (first.prompts, first.complete) == (1, False)
    log = tmp_path / "out/log.jsonl"
    with open(log, "a") as file:
        file.write('{"id": "turn:0:1", "fou')  # a line that was being written when power failed
    heard: list[str] = []
    second = generate.run(config, heard.append)
    assert "going on after 1 of 4 turns" in heard
    assert second.complete
    turns = [json.loads(line)["id"] for line in log.read_text().splitlines()[1:] if '"turn:' in line]
    assert turns == ["turn:0:0", "turn:0:1", "turn:1:0", "turn:1:1"]
    with pytest.raises(UsageError, match="a run with other settings"):
        generate.run(GenerateBench(**{**QUICK, "seed": 1}, out=tmp_path / "out"), silent)


def test_a_finished_log_is_enough(cast: Cast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = GenerateBench(**QUICK, out=tmp_path / "out")
    first = generate.run(config, silent)
    monkeypatch.setattr(generate, "PeerProcess", None)
    assert generate.run(config, silent) == first


def test_ctrl_c_keeps_what_is_finished(cast: Cast, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    cast.ours = ("none", "interrupt")
    assert cli(["bench", "generate", *FLAGS, "--out", str(tmp_path / "out")]) == 130
    _, notes = capfd.readouterr()
    assert "stopping after this text" in notes
    assert "go on with: quantspec bench generate" in notes
    report = Report.load(tmp_path / "out/generate.json")
    assert (report.prompts, report.complete) == (2, False)


def test_text_that_differs_is_seen(cast: Cast, capfd: pytest.CaptureFixture[str]) -> None:
    cast.ours = ("none", "wrong")
    assert cli(["bench", "generate", *FLAGS]) == 5
    assert "error: the text of wrong differs" in capfd.readouterr().err
    cast.ours, cast.peers = ("none", "raise"), ("wrong", "crash")
    assert cli(["bench", "generate", *FLAGS]) == 3
    text, notes = capfd.readouterr()
    assert "error: raise failed" in notes
    assert "crash: crash; failed: crashed with SIGSEGV" in text


def test_peers_may_get_fewer_prompts(cast: Cast) -> None:
    cast.peers = ("slow",)
    report = generate.run(GenerateBench(**QUICK, peer_limit=1), silent)
    slow, plain = report.row("slow"), report.row("none")
    assert slow is not None
    assert plain is not None
    assert (slow.prompts, plain.prompts, slow.speedup) == (1, 2, 1.0)


def test_auto_is_there_with_a_profile() -> None:
    assert "auto" not in [one.name for one in methods(GenerateBench(), 2, silent)]
    *_, auto = methods(GenerateBench(profile="p.json"), 2, silent)
    assert (auto.name, auto.options["method"], auto.options["profile"]) == ("auto", "auto", "p.json")
    with pytest.raises(UsageError, match="method auto needs a profile"):
        methods(GenerateBench(methods=("auto",)), 2, silent)
    # What is decoded without the profile is not auto's.
    with pytest.raises(ModelError, match=r"p.json is no profile"):
        ours.load({**auto.options, "threads": 1})


def test_no_figures_of_a_cpu_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UsageError, match="no CUDA device"):
        generate.run(GenerateBench(**QUICK, device="cuda"), silent)


def test_methods_and_their_settings() -> None:
    names = [one.name for one in methods(GenerateBench(), 2, silent)]
    assert names[0] == "none"
    assert {"lookup", "draft", "eagle", "cascade"} <= set(names)
    spec = "eagle:tree_depth=3:num_speculative_tokens=7"
    plain, eagle = methods(GenerateBench(methods=(spec,)), 2, silent)
    assert plain.name == "none"
    assert eagle.options.items() >= {"tree_depth": 3, "num_speculative_tokens": 7, "threads": 2}.items()
    given = GenerateBench(model=str(FAMILY / "target-w4"), head=(str(FAMILY / "eagle-target"),), methods=("eagle",))
    assert methods(given, 2, silent)[1].options["head"] == str(FAMILY / "eagle-target")
    for wrong, complaint in (
        ("eagel", "no method 'eagel'"),
        ("eagle:tree_dept=3", "is no setting"),
        ("eagle:tree_depth", "is no setting"),
        ("eagle:tree_depth=0", "tree_depth must be"),
    ):
        with pytest.raises(UsageError, match=complaint):
            methods(GenerateBench(methods=(wrong,)), 2, silent)
    with pytest.raises(UsageError, match="method medusa lacks its parts"):
        methods(GenerateBench(model=str(FAMILY / "target-w4"), methods=("medusa",)), 2, silent)


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    target, inner = FAMILY / "target", FAMILY / "intermediate"
    return Setting(target, inner, tmp_path, device="cpu", threads=2, context=64, llama_server=None, note=silent)


def test_other_engines(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    found = {one.name: one for one in peers(GenerateBench(), setting)}
    assert found["llama.cpp"].error.startswith("not installed")
    alone, lookup = found["transformers-bf16"], found["transformers-bf16-lookup"]
    assert alone.process_key == lookup.process_key
    assert lookup.ask == {"prompt_lookup_num_tokens": LOOKUP_TOKENS}
    assert found["transformers-bf16-assisted"].options["assistant"] == str(FAMILY / "intermediate")
    # What is not quantized is not written anew.
    assert alone.options["folder"] == str(FAMILY / "target")
    assert not list(peers(GenerateBench(peers=("none",)), setting))
    (compiled,) = peers(GenerateBench(peers=("transformers-compiled",)), setting)
    assert "for a GPU" in compiled.error
    monkeypatch.setattr(generate_contenders, "find_spec", lambda name: None)
    (missing,) = peers(GenerateBench(peers=("transformers-fp32",)), setting)
    assert missing.error == "transformers is not installed"


def test_with_models(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    out, options = tmp_path / "out", ("--methods", "lookup", "--peers", "transformers-fp32-lookup", "--json")
    assert cli(["bench", "generate", *FLAGS, "--limit", "1", "--rounds", "1", *options, "--out", str(out)]) == 0
    report = json.loads(capfd.readouterr().out)
    plain, lookup, peer = report["rows"]
    assert [row["method"] for row in report["rows"]] == ["none", "lookup", "transformers-fp32-lookup"]
    assert all(row["error"] is None and row["tokens_per_second"] > 0 for row in report["rows"])
    assert (plain["acceptance_length"], plain["equal_to_plain"], lookup["equal_to_plain"]) == (1.0, True, True)
    assert (plain["exactness"], plain["new_tokens"], plain["target_forwards"]) == ("exact", 6, 5)
    assert lookup["acceptance_length"] >= 1
    assert lookup["step_ms"].keys() == {"draft", "verify", "overhead"}
    assert peer["kind"] == "peer"
    assert peer["new_tokens"] > 0
    assert all(row["peak_memory_bytes"] > 10**7 for row in report["rows"])
    assert set(report["curve"]) >= {"1", "16"}
    assert json.loads((out / "generate.json").read_text()) == report
    assert "| lookup |" in (out / "generate.md").read_text()
    assert not re.search(r"<script|https?://|src=|@import", (out / "generate.html").read_text())


@pytest.mark.parametrize(
    "options, code, complaint",
    [
        (("--limit", "0"), 2, "--limit must be at least 1"),
        (("--rounds", "0"), 2, "rounds must be at least 1"),
        (("--peer-limit", "0"), 2, "--peer-limit must be at least 1"),
        (("--time-limit", "0"), 2, "--time-limit must be from 1"),
        (("--peers", "vllm"), 2, "unknown peer 'vllm'"),
        (("--peers", "none,llama.cpp"), 2, "unknown peer 'none'"),
        (("--methods", "eagle,eagle"), 2, "eagle is named twice"),
        (("--methods", "eagel"), 2, "no method 'eagel'"),
        (("--prompts", "nowhere.jsonl"), 2, "cannot read nowhere.jsonl"),
        (("--prompts", "/dev/null"), 3, "has no prompts"),
        (("--tasks", "poetry"), 2, "has no task 'poetry'"),
        (("--model", "nowhere"), 3, "no model folder at nowhere"),
        (("--out", "/proc/self/x"), 4, "cannot write"),
        (("--device", "tpu"), 2, "device must be cpu or cuda"),
    ],
)
def test_misuse(options: tuple[str, ...], code: int, complaint: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli(["bench", "generate", *FLAGS, *options]) == code
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert complaint in lines[0]
