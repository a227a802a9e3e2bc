from __future__ import annotations

import math

import pytest
import torch

from quantspec.numerics.measures import kl_divergence, relative_mse, relative_output_mse, top1_agreement


def test_relative_output_mse_is_that_of_the_outputs() -> None:
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(50, 8, generator=g), torch.randn(3, 8, generator=g)
    off = w + 0.1 * torch.randn(3, 8, generator=g)
    direct = relative_mse(x @ off.T, x @ w.T)
    assert relative_output_mse(off, w, x.T @ x / 50) == pytest.approx(direct, rel=1e-4)  # fp32 sums
    assert relative_output_mse(w, w, x.T @ x) == 0.0
    assert relative_mse(torch.zeros(2), torch.zeros(2)) == 0.0


def test_kl_divergence() -> None:
    p, q = torch.tensor([[0.5, 0.5, 0.0]]), torch.tensor([[0.25, 0.25, 0.5]])
    assert float(kl_divergence(p.log(), q.log())) == pytest.approx(math.log(2))
    assert float(kl_divergence(p.log(), p.log())) == 0.0  # 0 log 0 counts nothing


def test_top1_agreement() -> None:
    a = torch.tensor([[1.0, 2.0], [3.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    assert top1_agreement(a, a.flip(1)) == 0.0
    assert top1_agreement(a, torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0], [2.0, 0.0]])) == 0.75
