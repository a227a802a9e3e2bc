"""A grid of a few seconds: what is trained, kept, fitted, drawn, predicted and refused."""

from __future__ import annotations

import json
import math
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from train_helpers import RUN, quick

from quantspec.calibrate.train import rollout, scale
from quantspec.calibrate.train.config import Eagle3Config, RolloutConfig, ScaleConfig
from quantspec.calibrate.train.rollout import read_rollouts
from quantspec.calibrate.train.scaling import Law, Point, fit
from quantspec.errors import ModelError, UsageError


@pytest.fixture(scope="module")
def grid(model: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> ScaleConfig:
    root = tmp_path_factory.mktemp("scale")
    for name, texts in (("texts", 16), ("held", 9)):
        rollout.run(
            RolloutConfig(
                model, corpus, root / name, texts=texts, slots=8, max_len=40, held_out=name == "held", run=RUN
            )
        )
    return ScaleConfig(
        model, root / "texts", root / "out", root / "held", layer_ids=(0, 1), unroll=2, unroll_from=0.0,
        grid_tokens=(300, 600, 1200), grid_layers=(1, 2), optim=quick(0, lr=0.01), run=RUN,
    )  # fmt: skip


def test_a_grid_is_trained_once_fitted_and_drawn(grid: ScaleConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    with suppress(UsageError):  # heads of a few steps may follow no law; all else is there
        scale.run(grid)
    record = json.loads((grid.out / "scale.json").read_text())
    assert ("drafters" in record) != ("follow no scaling law" in record.get("refused", ""))
    runs = record["runs"]
    assert [run["layers"] for run in runs] == [1, 1, 1, 2, 2, 2]
    assert runs[0]["parameters"] < runs[3]["parameters"]
    mean = len((texts := read_rollouts(grid.rollouts)).ids) / len(texts)
    for run in runs:
        assert run["tokens"] == pytest.approx(run["steps"] * 4 * mean, rel=0.3)  # batches of texts of unequal length
    assert [run["steps"] for run in runs[:3]] == [round(t / mean / 4) for t in grid.grid_tokens]
    assert all(run["acceptance_length"] >= 1 and run["error"] >= 0 and run["draft_ms"] > 0 for run in runs)
    law = fit([Point(r["tokens"], r["parameters"], r["acceptance_length"], r["error"]) for r in runs])
    assert record["law"]["b"]["value"] == pytest.approx(law.terms[1])
    page = (grid.out / "scale.html").read_text()
    assert page.count("<svg") == 2
    assert "http" not in page.replace("http://www.w3.org", "")
    assert (grid.out / "scale.png").read_bytes().startswith(b"\x89PNG")
    assert not list(grid.out.rglob("state.safetensors"))

    # The same again trains nothing, and a larger grid what it lacks alone.
    def train(head: Eagle3Config) -> None:
        raise AssertionError(f"asked for {head.layers} layers")

    monkeypatch.setattr(scale.eagle3, "run", train)
    with suppress(UsageError):
        scale.run(grid)
    with pytest.raises(AssertionError, match="asked for 3 layers"):
        scale.run(replace(grid, grid_layers=(1, 2, 3)))


def test_a_folder_of_other_runs_is_refused(grid: ScaleConfig) -> None:
    with suppress(UsageError):  # what is there already is not trained again
        scale.run(grid)
    with pytest.raises(UsageError, match="holds runs with another unroll than 3"):
        scale.run(replace(grid, unroll=3))
    with pytest.raises(UsageError, match=r"another optim.lr than 0.5"):
        scale.run(replace(grid, optim=quick(0, lr=0.5)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"grid_layers": (1,)}, "3 runs of 3 amounts of data and 1 depths are too few"),
        ({"grid_tokens": (300, 300, 300)}, "too few"),
        ({"grid_layers": (0, 1)}, "tokens and layers above 0"),
        ({"grid_tokens": ()}, "0 runs of 0 amounts of data"),
        ({"start": Path("head")}, "of heads that start from nothing"),
        ({"budget_tokens": 5000}, "5000 training tokens are more than 4 times outside the 300 to 1200 measured"),
    ],
)
def test_what_would_be_refused_is_refused_before_training(
    grid: ScaleConfig, tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        scale.run(replace(grid, out=tmp_path / "new", **change))
    assert not (tmp_path / "new").exists()


def test_held_out_text_must_be_there_and_the_bases(grid: ScaleConfig, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="held-out text"):
        scale.run(replace(grid, held_out=None))
    other = read_rollouts(grid.held_out)
    texts = [rollout.Rollout(other.ids[:9], other.features[:9], 4, 0.0)]
    (tmp_path / "other").mkdir()
    rollout.write_rollouts(tmp_path / "other" / "part-0.safetensors", texts, "another model")
    with pytest.raises(ModelError, match="was not written by"):
        scale.run(replace(grid, held_out=tmp_path / "other"))


SIZES = {1: 2_000_000, 2: 3_000_000, 4: 5_000_000}


def made_up(b: float, c: float) -> tuple[Law, list[dict[str, Any]]]:
    """Runs of an almost exact law; a layer costs 0.2 ms, a forward of the target 1 ms."""

    def length(tokens: int, size: int) -> float:
        return 2 + b * math.log(tokens / 1e5) + c * math.log(size / 2e6)

    runs = [
        {
            "layers": layers, "tokens": tokens, "parameters": size, "error": 0.01, "steps": tokens // 1000,
            "acceptance_length": length(tokens, size) + 1e-4 * (-1) ** (i + layers),
            "draft_ms": 0.1 + 0.2 * layers, "verify_ms": 1.0,
        }
        for layers, size in SIZES.items()
        for i, tokens in enumerate((50_000, 100_000, 200_000))
    ]  # fmt: skip
    points = [Point(r["tokens"], r["parameters"], r["acceptance_length"], r["error"]) for r in runs]
    return fit(points), runs


def test_the_best_drafter_weighs_length_against_time(grid: ScaleConfig) -> None:
    """Where depth hardly helps, one layer is best; where it helps much, more, as long as the budget lasts."""
    law, runs = made_up(0.1, 0.01)
    found = scale.drafters(law, runs, grid)
    assert [each["layers"] for each in found] == [1, 2, 3, 4]  # up to the most parameters measured
    best = found[0]
    assert best["parameters"] == 2_000_000
    assert best["draft_ms"] == pytest.approx(0.3)
    length = best["acceptance_length"]
    assert length["low"] < length["value"] < length["high"]
    assert best["tokens_per_second"]["value"] == pytest.approx(1e3 * length["value"] / 1.3)
    law, runs = made_up(0.1, 3.0)
    assert scale.drafters(law, runs, grid)[0]["layers"] == 4
    deeper = replace(grid, budget_parameters=8_000_000)
    found = scale.drafters(law, runs, deeper)
    assert len(found) == 7
    assert found[0]["layers"] == 5  # (2 + 3 ln 3) / 2.1 ms: a sixth layer costs more than it brings
    quick_ones = replace(deeper, budget_draft_ms=0.75)
    assert {each["layers"] for each in scale.drafters(law, runs, quick_ones)} == {1, 2, 3}
    more = scale.drafters(law, runs, replace(grid, budget_tokens=800_000))[0]["acceptance_length"]
    assert more["value"] > scale.drafters(law, runs, grid)[0]["acceptance_length"]["value"]


def test_budgets_beyond_the_law_or_below_any_drafter_are_refused(grid: ScaleConfig) -> None:
    law, runs = made_up(0.1, 0.5)
    with pytest.raises(UsageError, match="training tokens are more than 4 times"):
        scale.drafters(law, runs, replace(grid, budget_tokens=900_000))
    with pytest.raises(UsageError, match="parameters are more than 4 times"):
        scale.drafters(law, runs, replace(grid, budget_parameters=21_000_000))
    for budget in ({"budget_parameters": 1_900_000}, {"budget_draft_ms": 0.2}):
        with pytest.raises(UsageError, match="no drafter is as small") as caught:
            scale.drafters(law, runs, replace(grid, **budget))
        assert "one layer has 2e+06 parameters and takes 0.3 ms" in caught.value.hint
