"""The commands without a model: the default family that ships in the package."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

PROMPT = (
    "Question: A baker has 24 rolls. She sells 9 in the morning and 7 in the afternoon. How many are left?\nAnswer:"
)


@pytest.mark.parametrize("sampling", [(), ("--temperature", 0.8, "--top-p", 0.95, "--seed", 1)])
def test_generate_without_a_model(call, sampling: tuple[object, ...]) -> None:
    """The cascade is what runs by default; every method gives its text, and drafted tokens are accepted."""

    def record(*method: str) -> dict:
        result = call("generate", PROMPT, "--json", "-n", 32, *sampling, *method)
        assert result.code == 0, result.err
        return json.loads(result.out)

    default = record()
    assert default["stats"]["method"] == "cascade"
    assert default["stats"]["exactness"] == "exact"
    # Well below the measured length (over 4), well above what a drafter that is never right gets (1).
    assert default["stats"]["acceptance_length"] > 1.5
    assert {"eagle", "target"} <= default["stats"]["stages"].keys()
    for method in ("none", "lookup", "draft", "eagle"):
        assert record("--method", method)["token_ids"] == default["token_ids"], method


def test_quantize_default(call, tmp_path: Path) -> None:
    result = call("quantize", "default", "--out", tmp_path / "w4", "--method", "rtn", "--eval-samples", 0, "--json")
    assert result.code == 0, result.err
    report = json.loads(result.out)
    assert report["bytes_after"] < 0.5 * report["bytes_before"]
    assert report["perplexity_before"] is None
