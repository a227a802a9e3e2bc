"""From turns to rows: figures of times and texts that are made up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from quantspec.benchmarks.generate_figures import NOISE_LIMIT, noise_of, report_of, speeds
from quantspec.benchmarks.generate_prompts import Prompt
from quantspec.benchmarks.generate_rows import ALL, LOOPS, UNFINISHED, Report, Row
from quantspec.benchmarks.generate_table import COLUMNS, cells, closing, markdown
from quantspec.benchmarks.peers.process import Contender
from quantspec.errors import ModelError

PROMPTS = [Prompt(number, task, rank, "", (1, 2)) for number, (task, rank) in enumerate([("a", 0), ("a", 1), ("b", 0)])]
OURS, PEER = Contender(name="eagle", kind="ours", module="m"), Contender(name="other", module="n")
PLAIN = Contender(name="none", kind="ours", module="m")


def answer(tokens: int, seconds: float, accepted: tuple[int, ...] = (), equal: bool = True) -> dict[str, Any]:
    return {
        "tokens": tokens,
        "seconds": seconds,
        "first_token_seconds": 0.1,
        "peak_memory_bytes": 10**6,
        "target_forwards": sum(accepted) or None,
        "accepted": accepted,
        "part_seconds": {"draft": 0.002, "verify": 0.02, "overhead": 0.0} if accepted else None,
        "equal": equal,
    }


def turn(number: int, eagle: dict[str, Any], calibration: float = 1.0, distinct: float = 1.0) -> dict[str, Any]:
    answers = {"none": answer(9, 2.0, (8,)), "eagle": eagle}
    if number != 1:  # a peer that gets fewer prompts
        answers["other"] = answer(8, 4.0, equal=number == 0)
    return {"calibration": calibration, "distinct": distinct, "answers": answers}


def report(turns: dict[tuple[int, int], Any], complete: bool = True, **infos: Any) -> Report:
    return report_of({"model": "m"}, (PLAIN, OURS, PEER), PROMPTS, turns, infos, (), complete)


def row(found: Report, method: str, task: str = ALL) -> Row:
    each = found.row(method, task)
    assert each is not None
    return each


TURNS = {
    (round_number, number): turn(number, answer(9, 1.0, (2, 0, 2))) for round_number in range(2) for number in range(3)
}


def test_figures_of_equal_times() -> None:
    found = report(TURNS, eagle={"exactness": "exact"}, curve={"curve": {"1": 0.5, "2": 0.75}})
    assert found.tasks == (ALL, "a", "b")
    assert found.methods == ("none", "eagle", "other")
    plain, eagle, peer = (row(found, name) for name in found.methods)
    assert (plain.tokens_per_second, plain.speedup, plain.acceptance_length) == (4.5, 1.0, 1.0)
    assert (eagle.tokens_per_second, eagle.speedup) == (9.0, 2.0)
    # Of four forwards two accepted nothing and two two drafted tokens: (2 * 1 + 2 * 3) / 4 tokens each.
    assert (eagle.acceptance_length, eagle.acceptance_by_position) == (2.0, (0.5, 0.5))
    assert eagle.target_forwards == 12
    assert eagle.step_ms == {"draft": 0.5, "verify": 5.0, "overhead": 0.0}
    assert eagle.intervals["speedup"] == (2.0, 2.0)
    # 8 tokens after the first in 0.9 s, and in 1.9 s.
    assert eagle.decode_speedup == pytest.approx(1.9 / 0.9, abs=1e-4)
    assert eagle.intervals["decode_speedup"] == (eagle.decode_speedup, eagle.decode_speedup)
    assert (eagle.prompts, eagle.texts, eagle.new_tokens, eagle.peak_memory_bytes) == (3, 6, 27, 10**6)
    assert (eagle.equal_to_plain, eagle.equal_share, eagle.exactness) == (True, 1.0, "exact")
    # 8 tokens in 4 s where plain decoding gives 9 in 2 s, on the prompts that it got.
    assert (peer.kind, peer.speedup, peer.prompts) == ("peer", pytest.approx(4 / 9, abs=1e-4), 2)
    assert (peer.equal_to_plain, peer.equal_share, peer.acceptance_length) == (False, 0.5, None)
    assert found.curve == {1: 0.5, 2: 0.75}
    assert row(found, "eagle", "b").prompts == 1


def test_a_report_survives_its_file(tmp_path: Path) -> None:
    found = report(TURNS, curve={"curve": {"1": 0.5}})
    path = tmp_path / "r.json"
    path.write_text(json.dumps(found.as_dict()))
    assert Report.load(path) == found
    for damage in ("", "[]", '{"format_version": 9}', '{"format_version": 1}'):
        path.write_text(damage)
        with pytest.raises(ModelError):
            Report.load(path)


def test_decoding_alone_needs_a_first_token_and_a_second() -> None:
    untold = {**answer(9, 1.0, (2, 0, 2)), "first_token_seconds": None}
    turns = {key: turn(key[1], (untold, answer(1, 1.0, (1,)), answer(9, 1.0, (2, 0, 2)))[key[1]]) for key in TURNS}
    found = report(turns)
    assert row(found, "eagle").decode_speedup == pytest.approx(1.9 / 0.9, abs=1e-4)  # of the third prompt
    assert row(found, "eagle", "a").decode_speedup is None
    assert cells(row(found, "eagle", "a"))[COLUMNS.index("decoding alone")] == "-"


def test_the_median_of_a_prompts_rounds_counts() -> None:
    found = speeds([[(1.0, 4.0), (9.0, 4.0), (1.0, 4.0)], [(1.0, 4.0)] * 3], [(10, 10), (10, 10)])
    assert found["tokens_per_second"][0] == 10.0
    value, (low, high) = found["speedup"]
    assert value == 4.0
    # Two of three resampled rounds may be the slow one: 20 tokens in 18 s then, or in 10 s with one such prompt.
    assert low == pytest.approx(4 * 2 / 18)
    assert high == 4.0


def test_texts_that_loop_are_compared_only() -> None:
    turns = {**TURNS, (0, 0): turn(0, answer(9, 0.01, (0, 0, 3), equal=False), distinct=0.5)}
    found = report(turns)
    eagle = row(found, "eagle")
    assert found.degenerate_prompts == (0,)
    assert (eagle.prompts, eagle.speedup, eagle.equal_to_plain) == (2, 2.0, False)
    looping = {key: turn(key[1], answer(9, 1.0, (8,)), distinct=0.1) for key in TURNS}
    eagle = row(report(looping), "eagle")
    assert (eagle.error, eagle.failed, eagle.equal_to_plain) == (LOOPS, False, True)
    differing = {key: turn(key[1], answer(9, 1.0, (8,), equal=False), distinct=0.1) for key in TURNS}
    eagle = row(report(differing), "eagle")
    assert (eagle.equal_to_plain, cells(eagle)[1], cells(eagle)[-1]) == (False, LOOPS, "no (0%)")


def test_no_speedup_on_a_noisy_machine() -> None:
    steady = noise_of([1.0, 1.0 + NOISE_LIMIT / 2] * 20)
    assert steady is not None
    assert steady.refusal is None
    assert noise_of([]) is None
    few = noise_of([1.0])
    assert few is not None
    assert "fewer than 3 turns" in (few.refusal or "")
    turns = {key: {**each, "calibration": 1.0 + key[1] % 2} for key, each in TURNS.items()}
    found = report(turns)
    assert found.noise is not None
    assert "too noisy" in (found.noise.refusal or "")
    eagle = row(found, "eagle")
    assert (eagle.speedup, eagle.decode_speedup, eagle.tokens_per_second) == (None, None, 9.0)
    assert not [name for name in eagle.intervals if name.endswith("speedup")]
    assert cells(eagle)[COLUMNS.index("to plain")] == "-"
    assert any("too noisy" in line for line in closing(found))


def test_what_failed_says_why() -> None:
    last = {**TURNS[1, 2], "answers": {**TURNS[1, 2]["answers"], "other": {"error": "crashed with SIGSEGV"}}}
    found = report({**TURNS, (1, 2): last}, complete=False, eagle={"error": "no such head"})
    assert row(found, "other").error == "crashed with SIGSEGV"
    assert row(found, "other", "a").error is None
    assert row(found, "eagle").error == "no such head"
    text = markdown(found)
    assert "eagle: failed: no such head" in text
    assert "stopped before its last turn" in text
    assert text.count("| failed |") == 3 + 1 + 1  # eagle in three tables, the other in its own task's and in all
    # An engine that could be asked again is judged by what it gave then.
    again = {
        (0, 0): last | {"answers": {**last["answers"]}},
        **{key: each for key, each in TURNS.items() if key != (0, 0)},
    }
    assert row(report(again), "other").error is None
    nothing = report({})
    assert row(nothing, "none").error == UNFINISHED
    assert "failed" not in markdown(nothing)  # whoever was stopped has not failed
    assert nothing.noise is None
