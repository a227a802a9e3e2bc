"""Widths stage by stage under a budget of bits: mixed precision.

The rule. Linear layers that read the same input (``layer.STAGES``) run as one and share a width. Each stage, rounded to
nearest in the narrowest width while the rest of the model is exact, moves the next-token distributions by some mean KL
divergence: its sensitivity, measured on a little calibration text. One more bit halves rounding errors, and KL grows
with their square, so at b bits it counts ``kl * 4 ** (narrowest - b)``. All stages start at the narrowest width; then,
again and again, the stage whose next width saves the most KL per bit of storage takes it, as long as the budget allows.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from quantspec.calibrate.quantize.config import QuantizeConfig, Sensitivity
from quantspec.calibrate.quantize.evaluate import log_probs
from quantspec.calibrate.quantize.layer import PROJECTIONS, STAGES
from quantspec.calibrate.quantize.plan import Plan
from quantspec.calibrate.quantize.stream import StreamedModel, layer_prefix
from quantspec.errors import UsageError
from quantspec.models import atomic
from quantspec.numerics.affine import dequantize, quantize
from quantspec.numerics.measures import kl_divergence
from quantspec.numerics.scheme import Scheme

ROWS, LENGTH = 4, 128
"""Calibration text that sensitivities are measured on: rows, and tokens of each."""
_EVERY = 4  # of these positions, the share whose distributions are compared: heads of large vocabularies are slow
_DENSE = 16  # bits of a weight that is not quantized


def assign(
    config: QuantizeConfig, plan: Plan, model: StreamedModel, ids: Tensor, file: Path
) -> tuple[Plan, list[Sensitivity]]:
    """The plan with widths by the rule above, and what was measured for it on the first of ``ids [S, T]``; ``file``
    keeps it for a run that goes on."""
    sizes = linear_sizes(model)
    if file.is_file():
        found = [Sensitivity(**one) for one in json.loads(file.read_text())]
    else:
        found = measure(model, plan, ids[:ROWS, :LENGTH], narrowest(config, plan, sizes))
        atomic.write_json(file, [asdict(one) for one in found])
    return plan.with_bits(solve(config, plan, found, sizes)), found


def linear_sizes(model: StreamedModel) -> dict[str, tuple[int, int]]:
    """Shapes ``[N, K]`` of the linear layers of all decoder layers, by name."""
    names = [layer_prefix(index) + short for index in range(model.config.num_layers) for short in PROJECTIONS]
    return {name: (shape[0], shape[1]) for name in names for shape in [model.store.shape(f"{name}.weight")]}


def narrowest(config: QuantizeConfig, plan: Plan, sizes: Mapping[str, tuple[int, int]]) -> int:
    """The widest of ``config.widths`` that all layers can have within the budget. Raises ``UsageError``: there is
    none."""
    assert config.bits_per_weight is not None
    widths = sorted(config.widths)
    costs = {bits: mean_bits(uniform(plan, bits), sizes) for bits in widths}
    fitting = [bits for bits in widths if costs[bits] <= config.bits_per_weight]
    if not fitting:
        least = f"{costs[widths[0]]:.4g}"
        raise UsageError(
            f"{config.bits_per_weight:g} bits per weight cannot be reached: {widths[0]} bits take {least} with scales",
            hint=f"ask for {least} or more, for larger groups or for a narrower --widths",
        )
    return max(fitting)


def mean_bits(schemes: Mapping[str, Scheme], sizes: Mapping[str, tuple[int, int]]) -> float:
    """Bits per weight of all linear layers but the LM head, with scales and zero points; dense layers count 16."""
    bits = sum(_storage(schemes[name], n, k) if name in schemes else _DENSE * n * k for name, (n, k) in sizes.items())
    return bits / sum(n * k for n, k in sizes.values())


def uniform(plan: Plan, bits: int) -> dict[str, Scheme]:
    return {name: replace(scheme, bits=bits) for name, scheme in plan.schemes.items()}


def _storage(scheme: Scheme, n: int, k: int) -> int:
    """Bits that a weight ``[n, k]`` takes."""
    scale = torch.finfo(getattr(torch, scheme.dtype)).bits + (0 if scheme.symmetric else scheme.bits)
    return n * (k * scheme.bits + scheme.num_groups(k) * scale)


@torch.no_grad()
def measure(model: StreamedModel, plan: Plan, ids: Tensor, bits: int) -> list[Sensitivity]:
    """How far each stage alone in ``bits`` moves the dense model's distributions after ``ids [S, T]``; the stages of
    ignored layers are left out. The model is read once, layer by layer."""
    exact, moved, stages = model.embed(ids), list[Tensor](), list[list[str]]()
    for index in range(model.config.num_layers):
        layer = model.layer(index)
        entering = exact.clone()
        for hidden in (exact, *moved):
            hidden.copy_(layer.forward(hidden.to(model.device)))
        for stage in STAGES:
            names = [layer_prefix(index) + short for short in stage]
            if names[0] in plan.schemes:
                exact_weights = dict(layer.weights)
                for short, name in zip(stage, names, strict=True):
                    weight, scheme = layer.weights[f"{short}.weight"], replace(plan.schemes[name], bits=bits)
                    layer.weights[f"{short}.weight"] = dequantize(quantize(weight, scheme))
                moved.append(layer.forward(entering.to(model.device)).cpu())
                layer.weights = exact_weights
                stages.append(names)
    head = model.head()

    def distributions(hidden: Tensor) -> Tensor:
        return log_probs(model.final_norm(hidden[:, ::_EVERY]).flatten(0, 1).to(model.device), head)

    before = distributions(exact)
    return [
        Sensitivity(names, float(kl_divergence(before, distributions(hidden)).double().mean()), bits)
        for names, hidden in zip(stages, moved, strict=True)
    ]


def solve(
    config: QuantizeConfig, plan: Plan, found: Sequence[Sensitivity], sizes: Mapping[str, tuple[int, int]]
) -> dict[str, int]:
    """Bits of each linear layer by name: the rule above for the measured stages ``found``."""
    assert config.bits_per_weight is not None
    start = found[0].bits
    wider = [bits for bits in sorted(config.widths) if bits > start]
    steps = dict(zip([start, *wider], wider, strict=False))
    chosen = dict.fromkeys(range(len(found)), start)
    total = sum(n * k for n, k in sizes.values())
    left = (config.bits_per_weight - mean_bits(uniform(plan, start), sizes)) * total

    def price(stage: int, bits: int) -> int:
        names = found[stage].names
        return sum(_storage(replace(plan.schemes[name], bits=bits), *sizes[name]) for name in names)

    def offer(stage: int, bits: int) -> tuple[float, int, int, int]:
        """The gain of the step from ``bits`` (negative, for the heap), the stage, its new width and the cost."""
        to = steps[bits]
        cost = price(stage, to) - price(stage, bits)
        saved = found[stage].kl * (4.0 ** (start - bits) - 4.0 ** (start - to))
        return -saved / cost, stage, to, cost

    offers = [offer(stage, start) for stage in chosen if start in steps]
    heapq.heapify(offers)
    while offers:
        _, stage, bits, cost = heapq.heappop(offers)
        if cost <= left:
            chosen[stage], left = bits, left - cost
            if bits in steps:
                heapq.heappush(offers, offer(stage, bits))
    return {name: bits for stage, bits in chosen.items() for name in found[stage].names}
