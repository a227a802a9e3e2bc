"""How far apart: weights, layer outputs and next-token distributions."""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK = 256  # columns of one block of a quadratic form


_ROWS = 256  # that stand in fp64 at once: the whole weight would be the largest tensor of a run


def relative_mse(approximate: Tensor, exact: Tensor) -> float:
    """``|approximate - exact|^2 / |exact|^2`` (Frobenius); 0 when both are zero."""
    power = error = 0.0
    for part, whole in zip(approximate.split(_ROWS), exact.split(_ROWS), strict=True):
        power += float(whole.double().square_().sum())
        error += float((part.double() - whole).square_().sum())
    return error / power if power > 0 else error


def output_power(weight: Tensor, hessian: Tensor) -> float:
    """``|X W^T|^2`` of a weight ``[N, K]`` from ``hessian [K, K]`` = X^T X, up to the Hessian's factor; never below
    0."""
    total = 0.0
    for start in range(0, weight.shape[1], _BLOCK):  # the form is symmetric: half of the product will do
        part = slice(start, start + _BLOCK)
        product = weight[:, part] @ hessian[part, part]
        product.addmm_(weight[:, :start], hessian[:start, part], alpha=2)
        total += float(product.mul_(weight[:, part]).sum(dtype=torch.float64))
    return max(total, 0.0)  # rounding can push a tiny quadratic form below zero


def relative_output_mse(approximate: Tensor, exact: Tensor, hessian: Tensor) -> float:
    """``|X (A - W)^T|^2 / |X W^T|^2`` of a linear layer ``[N, K]`` from ``hessian [K, K]`` = X^T X up to a factor; the
    numerator where the denominator is zero."""
    total, error = output_power(exact, hessian), output_power(approximate - exact, hessian)
    return error / total if total > 0 else error


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) in nats for each row of log-probabilities ``[..., V]``."""
    return (log_p.exp() * (log_p - log_q)).nan_to_num(0.0).sum(-1)


def top1_agreement(logits_p: Tensor, logits_q: Tensor) -> float:
    """Share of rows ``[..., V]`` whose argmax is the same."""
    return float((logits_p.argmax(-1) == logits_q.argmax(-1)).float().mean())
