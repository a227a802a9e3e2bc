"""Scores of held-out text: the kernels against the streamed model, chunk by chunk, and what is made of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from quantspec.calibrate.evaluate import run as module
from quantspec.calibrate.evaluate import scoring
from quantspec.calibrate.evaluate.config import EvalConfig
from quantspec.calibrate.evaluate.run import evaluate
from quantspec.calibrate.evaluate.scoring import by_position, compare, interval, losses, scores_as_run, scores_streamed
from quantspec.calibrate.quantize.config import QuantizeConfig
from quantspec.calibrate.quantize.run import run
from quantspec.calibrate.quantize.stream import StreamedModel
from quantspec.errors import UsageError
from quantspec.models.load import load_model

Configure = Callable[..., QuantizeConfig]


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(3, 64, (3, 41), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def quantized(configure: Configure) -> Path:
    return Path(run(configure(method="rtn", bits=3)).out)


def test_kernels_and_streamed_model_score_alike(quantized: Path, ids: torch.Tensor) -> None:
    run_scores = torch.cat(list(scores_as_run(load_model(quantized, backend="reference-fast"), ids)))
    streamed = torch.cat(list(scores_streamed(StreamedModel(quantized, "cpu"), ids)))
    assert run_scores.shape == streamed.shape == (3 * 40, 64)
    # fp32 sums in another order, over three layers
    assert torch.allclose(run_scores, streamed, atol=2e-5)


def test_chunks_do_not_matter(quantized: Path, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """40 inputs in chunks of 16, 16 and 8: the cache carries what came before."""
    model, streamed = load_model(quantized), StreamedModel(quantized, "cpu")
    whole = torch.cat(list(scores_as_run(model, ids)))
    monkeypatch.setattr(scoring, "CHUNK", 16)
    chunks = list(scores_as_run(model, ids))
    assert [len(chunk) for chunk in chunks] == [16, 16, 8] * 3
    assert model.row_invariant
    assert torch.equal(torch.cat(chunks), whole)
    compared = compare(ids, scores_streamed(streamed, ids), scores_as_run(model, ids))
    assert compared.nll_after.shape == compared.agreement.shape == (3, 40)
    assert torch.equal(compared.nll_after, losses(ids, scores_as_run(model, ids)))


def test_comparison_is_of_the_right_distributions_and_places() -> None:
    """Two places of two rows over three tokens, by hand."""
    ids = torch.tensor([[0, 1, 2], [2, 0, 0]])
    p = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8], [0.6, 0.2, 0.2], [0.2, 0.5, 0.3]])
    q = torch.tensor([[0.25, 0.5, 0.25], [0.1, 0.2, 0.7], [0.6, 0.2, 0.2], [0.1, 0.2, 0.7]])
    found = compare(ids, p.log().split(2), q.log().split(2))
    assert torch.allclose(found.nll_before.exp(), 1 / torch.tensor([[0.25, 0.8], [0.6, 0.2]]))
    assert torch.allclose(found.nll_after.exp(), 1 / torch.tensor([[0.5, 0.7], [0.6, 0.1]]))
    assert found.agreement.tolist() == [[0, 1], [1, 0]]
    expected = (p * (p / q).log()).sum(1).view(2, 2)
    assert torch.allclose(found.divergence, expected, atol=1e-6)  # fp32 logarithms
    assert found.kl == pytest.approx(float(expected.mean()), abs=1e-6)
    assert found.top1_agreement == 0.5
    assert [(one.start, one.end) for one in found.by_position()] == [(1, 2), (2, 3)]
    assert [one.top1_agreement for one in found.by_position()] == [0.5, 0.5]


def test_scores_of_other_rows_are_caught() -> None:
    with pytest.raises(ValueError, match=r"shorter|longer"):
        losses(torch.zeros(2, 3, dtype=torch.int64), [torch.zeros(2, 4)])


@pytest.mark.parametrize("size", [1, 7, 16, 40, 511])
def test_position_bins_cover_every_place_once(size: int) -> None:
    nll = torch.rand(5, size, generator=torch.Generator().manual_seed(1))
    bins = by_position(nll)
    assert len(bins) == min(16, size)
    assert (bins[0].start, bins[-1].end) == (1, size + 1)
    assert all(one.end == other.start for one, other in pairwise(bins))
    mean = sum(one.loss * (one.end - one.start) for one in bins) / size
    assert mean == pytest.approx(float(nll.double().mean()))
    assert bins[0].kl is bins[0].top1_agreement is None


def test_intervals_are_over_rows() -> None:
    rows = torch.arange(40.0)[:, None].expand(40, 9)
    low, high = interval(rows) or (0.0, 0.0)
    deviation = float(rows[:, 0].std()) / math.sqrt(40)
    # 1.96 standard errors; 2,000 resamples place a quantile within about a tenth of one
    assert low == pytest.approx(19.5 - 1.96 * deviation, abs=0.25 * deviation)
    assert high == pytest.approx(19.5 + 1.96 * deviation, abs=0.25 * deviation)
    assert interval(rows[:1]) is None


class TestEvaluate:
    def config(self, quantized: Path, model: Path, text: Path) -> EvalConfig:
        return EvalConfig(model=str(quantized), against=str(model), data=text, seq_len=64, num_samples=6)

    def test_against_the_parent(self, quantized: Path, model: Path, text: Path) -> None:
        report = evaluate(self.config(quantized, model, text), print)
        assert report.parent is not None
        assert report.perplexity is not None
        assert (report.rows, report.tokens) == (6, 6 * 63)
        assert report.perplexity / report.parent.perplexity == pytest.approx(report.parent.ratio)
        # random weights in 3 bits; of 64 nearly even words the same one by chance would be 0.02
        assert 0 < report.parent.kl < 0.5
        assert 0.1 < report.parent.top1_agreement < 1
        low, high = report.parent.kl_95 or (0, 0)
        assert low < report.parent.kl < high
        alone = evaluate(replace(self.config(quantized, model, text), against=None), print)
        assert alone.parent is None
        assert alone.perplexity == report.perplexity
        itself = evaluate(self.config(model, model, text), print)
        assert itself.parent is not None
        assert (itself.parent.kl, itself.parent.top1_agreement, itself.parent.ratio) == (0, 1, 1)

    def test_a_parent_that_does_not_fit_is_read_layer_by_layer(
        self, quantized: Path, model: Path, text: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        config = self.config(quantized, model, text)
        whole, notes = evaluate(config, print), []
        monkeypatch.setattr(module, "available_bytes", lambda: 1000)
        streamed = evaluate(config, notes.append)
        assert any("layer by layer" in note for note in notes)
        assert streamed.notes == notes
        assert whole.parent is not None
        assert streamed.parent is not None
        assert streamed.parent.backend == scoring.STREAMED
        # the parent's fp32 sums in another order
        assert streamed.parent.kl == pytest.approx(whole.parent.kl, rel=1e-3)
        assert streamed.perplexity == whole.perplexity

    def test_the_named_kernels_and_cache_are_measured(self, quantized: Path, model: Path, text: Path) -> None:
        config = self.config(quantized, model, text)
        found = {
            (backend, kv): evaluate(replace(config, backend=backend, kv_cache_dtype=kv), lambda line: None)
            for backend, kv in (("reference-fast", "auto"), ("reference-exact", "auto"), ("reference-fast", "int8"))
        }
        assert all(report.backend == backend for (backend, _), report in found.items())
        fast, exact, int8 = (report.perplexity for report in found.values())
        assert fast == pytest.approx(exact, rel=1e-5)  # fp32 sums in another order
        assert int8 != pytest.approx(fast, rel=1e-6)
        assert int8 == pytest.approx(fast, rel=0.02)  # 8-bit keys and values of random weights

    def test_a_single_row_has_no_interval(self, quantized: Path, model: Path, tmp_path: Path) -> None:
        """One word and the end token after it: one prediction."""
        (tmp_path / "short.txt").write_text("w5")
        report = evaluate(EvalConfig(model=str(quantized), against=str(model), data=tmp_path / "short.txt"), print)
        assert (report.rows, report.tokens, len(report.by_position)) == (1, 1, 1)
        assert report.perplexity_95 is None
        assert report.parent is not None
        assert report.parent.ratio_95 is report.parent.kl_95 is None

    @pytest.mark.parametrize(
        "options", [{"seq_len": 1}, {"num_samples": 0}, {"limit": 3}, {"num_fewshot": 1}, {"backend": "cpu-int3"}]
    )
    def test_wrong_options(self, options: dict[str, object]) -> None:
        with pytest.raises(UsageError):
            EvalConfig(model="default", **options)  # type: ignore[arg-type]
