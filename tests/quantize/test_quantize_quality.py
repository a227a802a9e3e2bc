"""The quality benchmark runs and its interval holds the ratio."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from quantspec.benchmarks import quantize_quality


def test_prints_one_object(
    model: Path, text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--bits", "3", "--rows", "8", "--seq-len", "64", "--num-samples", "16", "--group-size", "32"]
    files = ["--calibration", str(text), "--held-out", str(text)]
    monkeypatch.setattr(sys, "argv", ["quantize_quality", str(model), *options, *files])
    quantize_quality.main()
    found = json.loads(capsys.readouterr().out)
    assert found["tokens"] == 8 * 63
    (result,) = found["results"]
    assert result["methods"].keys() == {"rtn", "mse", "gptq"}
    for method in result["methods"].values():
        low, high = method["ratio_95"]
        assert low <= method["ratio"] <= high
    assert result["methods"]["rtn"]["ratio"] == 1


def test_interval_of_the_ratio_is_paired() -> None:
    rtn = torch.rand(60, generator=torch.Generator().manual_seed(0)).double() + 0.1
    low, high = quantize_quality.ratio_interval(0.4 * rtn, rtn)
    assert low == pytest.approx(0.4)  # rows that move together leave no doubt about their ratio
    assert high == pytest.approx(0.4)
