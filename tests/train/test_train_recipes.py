from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from train_helpers import RUN, TINY, quick

from quantspec.calibrate.train import distill, family, lm, rollout
from quantspec.calibrate.train.config import DistillConfig, Eagle3Config, EagleConfig, LMConfig, RolloutConfig
from quantspec.calibrate.train.methods import eagle, eagle3
from quantspec.calibrate.train.optim import Muon, Schedule, orthogonalize
from quantspec.drafters.tau import taus_of_model
from quantspec.models.tensors import TensorStore


def weights(folder: Path) -> dict[str, torch.Tensor]:
    store = TensorStore(folder)
    return {name: store.get(name) for name in store.keys()}  # noqa: SIM118


def same(a: Path, b: Path) -> bool:
    one, two = weights(a), weights(b)
    return one.keys() == two.keys() and all(one[name].equal(two[name]) for name in one)


def losses(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


@pytest.fixture(scope="module")
def texts(model: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("rollouts") / "texts"
    rollout.run(RolloutConfig(model, corpus, out, texts=24, slots=8, max_len=64, run=RUN))
    return out


def test_lm_learns_and_resumes_to_the_same_bits(corpus: Path, tmp_path: Path) -> None:
    config = LMConfig(corpus, tmp_path / "whole", TINY, quick(40, lr=0.01), RUN)
    result = lm.run(config)
    assert result["steps"] == 40
    # The form of the sums is learned within 40 steps; without any learning the loss stays at log(384) = 5.95.
    assert losses(config.out)[-1] < 4.0
    cut = replace(config, out=tmp_path / "cut")
    lm.run(cut, stop_after=13)
    assert not same(config.out, cut.out)
    lm.run(cut)
    assert same(config.out, cut.out)


def test_two_processes_learn_as_one(corpus: Path, tmp_path: Path) -> None:
    one = LMConfig(corpus, tmp_path / "one", TINY, quick(4), RUN)
    two = replace(one, out=tmp_path / "two", run=replace(RUN, processes=2))
    a, b = lm.run(one), lm.run(two)
    # Half batches are summed in another order, and Newton-Schulz amplifies that in the smallest singular directions.
    assert a["held.0"] == pytest.approx(b["held.0"], rel=1e-3)


@pytest.mark.parametrize("recipe", [distill, eagle, eagle3])
def test_drafters_learn_and_resume_to_the_same_bits(
    recipe: Any, model: Path, texts: Path, corpus: Path, tmp_path: Path
) -> None:
    def config(out: Path) -> Any:
        if recipe is distill:
            student = tmp_path / "student"
            if not student.exists():
                lm.run(LMConfig(corpus, student, replace(TINY, layers=1), quick(1), RUN))
            return DistillConfig(student, model, texts, out, texts, group_size=16, optim=quick(12, lr=0.01), run=RUN)
        if recipe is eagle3:
            return Eagle3Config(
                model, texts, out, layer_ids=(0, 1), draft_vocab_size=200, unroll=2, unroll_from=0.0,
                optim=quick(12, lr=0.01), run=RUN,
            )  # fmt: skip
        return EagleConfig(model, texts, out, unroll=2, unroll_from=0.0, optim=quick(12, lr=0.01), run=RUN)

    recipe.run(config(tmp_path / "whole"))
    curve = losses(tmp_path / "whole")
    assert sum(curve[-4:]) < sum(curve[:4])
    recipe.run(config(tmp_path / "cut"), stop_after=5)
    recipe.run(config(tmp_path / "cut"))
    assert same(tmp_path / "whole", tmp_path / "cut")
    if recipe is distill:
        assert set(taus_of_model(tmp_path / "whole")) == {0.0, 0.8, 1.0}


def test_schedule_ends_at_zero_and_counts_earlier_time() -> None:
    steps = Schedule(quick(10, warmup=0.2))
    assert steps.factor(0.1) < steps.factor(0.2) > steps.factor(0.9) > steps.factor(1.0) == 0.0
    assert Schedule(quick(0, minutes=2.0), spent=60.0).progress(0) == pytest.approx(0.5, abs=0.01)


def test_orthogonalize_brings_singular_values_near_one() -> None:
    matrices = torch.randn(3, 24, 40, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalize(matrices))
    # Muon's quintic does not converge to 1: five steps put the values of such a matrix into about 0.7 .. 1.2.
    assert float(values.min()) > 0.6
    assert float(values.max()) < 1.3
    assert orthogonalize(matrices.mT).allclose(orthogonalize(matrices).mT, atol=1e-4)


def test_muon_moves_by_its_learning_rate() -> None:
    p = torch.nn.Parameter(torch.zeros(16, 16))
    p.grad = torch.randn(16, 16, generator=torch.Generator().manual_seed(1)) * 1e-3
    Muon([p], lr=0.1, weight_decay=0.0).step()
    assert 0.05 < float(torch.linalg.matrix_norm(p.detach(), 2)) < 0.13  # 0.1 times a singular value near 1


def test_finished_stages_are_not_run_again(tmp_path: Path) -> None:
    calls = []

    def recipe() -> dict[str, Any]:
        calls.append(1)
        return {"steps": 3}

    first, second = (family._once(tmp_path / "stage", recipe) for _ in range(2))
    assert first == second
    assert first["steps"] == 3
    assert len(calls) == 1
