"""The benchmarks that measure drafters: their figures and their log, without a model."""

import json
from pathlib import Path

import pytest

from quantspec.benchmarks.acceptance import questions
from quantspec.benchmarks.equality import first_turns, read_log, summary
from quantspec.calibrate.stats import distinct_ngrams, ratio
from quantspec.errors import ModelError, UsageError


def test_a_ratio_of_sums_weighs_prompts_by_their_size() -> None:
    found = ratio([(1, 1), (90, 10)])
    assert found.value == 91 / 11
    assert (found.low, found.high) == (1.0, 9.0)  # with two prompts, resamples are often one of them twice
    assert ratio([]).value == ratio([(3, 0)]).value == 0.0


def test_the_interval_covers_the_truth_and_narrows() -> None:
    some, many = (ratio([(i % 5, 4) for i in range(n)]) for n in (20, 500))
    assert some.low < 0.5 < some.high
    assert many.high - many.low < (some.high - some.low) / 3  # a fifth, were it exact


def test_loops_have_few_distinct_ngrams() -> None:
    assert distinct_ngrams(range(50)) == 1.0
    assert distinct_ngrams([1, 2] * 25) == 2 / 47
    assert distinct_ngrams([1, 2, 3]) == 1.0


def test_prompts_come_from_the_end_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "gsm8k.jsonl"
    path.write_text("".join(json.dumps({"question": f"q{i}"}) + "\n" for i in range(5)))
    assert questions(path, 2) == ["Question: q3\nAnswer:", "Question: q4\nAnswer:"]
    with pytest.raises(UsageError, match="limit"):
        questions(path, 201)
    with pytest.raises(ModelError, match="cannot read"):
        questions(tmp_path / "none", 1)
    path.write_text("{}\n")
    with pytest.raises(ModelError, match="question"):
        questions(path, 1)
    with pytest.raises(ModelError, match="Spec-Bench"):
        list(first_turns(path))


def test_a_log_is_resumed_by_the_same_settings_only(tmp_path: Path) -> None:
    path, settings = tmp_path / "log.jsonl", {"model": "m"}
    assert read_log(path, settings) == {}
    setting = {
        "tokens": 7,
        "differs_at": {"eagle": None, "draft": 3},
        "acceptance_length": {"eagle": 2.0, "draft": 1.0},
    }
    found = {"greedy": setting, "sampled": setting}
    with open(path, "a") as file:
        file.write(
            json.dumps({"id": "1", "found": found}) + "\n" + '{"id": "2", "fou'
        )  # killed in the middle of a line
    resumed = read_log(path, settings)
    assert resumed == {"1": found}
    with open(path, "a") as file:
        file.write(json.dumps({"id": "3", "found": found}) + "\n")
    assert read_log(path, settings).keys() == {"1", "3"}
    with pytest.raises(UsageError, match="other settings"):
        read_log(path, {"model": "n"})
    report = summary(resumed, settings)["greedy"]
    assert report["equal"] == {"eagle": 1, "draft": 0}
    assert report["different"] == {"eagle": {}, "draft": {"1": 3}}
