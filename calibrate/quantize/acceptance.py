"""Round a drafter for what it is there for: that its target accepts its tokens.

A drafted token is accepted with probability ``1 - TV(p, q)``, the total variation between the target's distribution p
and the drafter's q, under every exact verification (arXiv 2211.17192, section 3). After all layers are quantized, one
by one, this stage moves single codes by one, by gradient descent on the mean TV over calibration text; scales stay. The
forward takes ``(1 - a) * soft + a * hard`` codes, with straight-through gradients, and a grows from 0 to 1: it ends on
what is stored. An eighth of the text is kept apart: unless acceptance rises there, nothing changes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from quantspec.calibrate.quantize.config import AcceptanceReport, MethodOptions
from quantspec.calibrate.quantize.evaluate import hidden_states
from quantspec.calibrate.quantize.layer import PROJECTIONS, DecoderLayer
from quantspec.calibrate.quantize.stream import StreamedModel, layer_prefix, stored_weight
from quantspec.errors import ModelError
from quantspec.numerics.affine import QuantizedWeight, dequantize, expand_groups

_BATCH_TOKENS = 2048
_BATCH_LOGITS = 1 << 24  # positions times vocabulary that stand in memory at once
_SOFT, _HARD = 0.2, 0.8  # shares of the steps: where hard codes begin to mix in, and where they are alone
_HELD_BACK = 8  # one row in so many


@dataclass
class Drafter:
    """A quantized causal LM with all its layers in memory; ``codes`` are those of its linear layers, by full name."""

    model: StreamedModel
    layers: list[DecoderLayer]
    quantized: dict[str, QuantizedWeight]
    head: Tensor

    @classmethod
    def load(cls, folder: Path, device: str) -> Drafter:
        model = StreamedModel(folder, device)
        layers = [model.layer(index) for index in range(model.config.num_layers)]
        quantized = {}
        for index in range(model.config.num_layers):
            for name in (layer_prefix(index) + short for short in PROJECTIONS):
                weight = stored_weight(model.store, name, model.config.quantization, device)
                if isinstance(weight, QuantizedWeight):
                    quantized[name] = weight
        return cls(model, layers, quantized, model.head().float())

    def log_probs(self, ids: Tensor, places: Tensor, weights: dict[str, Tensor]) -> Tensor:
        """Log-probabilities ``[n, V]`` at ``places`` of the flattened ``ids [B, T]``, with ``weights`` in place of its
        linear layers'."""
        hidden = self.model.embed(ids).to(self.model.device)
        for index, layer in enumerate(self.layers):
            prefix = layer_prefix(index)
            own = {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}
            layer.weights |= {f"{name}.weight": weight for name, weight in own.items()}
            hidden = layer.forward(hidden)
        return F.linear(self.model.final_norm(hidden).flatten(0, 1)[places], self.head).log_softmax(-1)


@dataclass(frozen=True)
class Targets:
    """The target's states before its head, ``states [S, T, H]``, on text ``ids [S, T]``: its distributions, kept
    small."""

    ids: Tensor
    states: Tensor
    head: Tensor

    @classmethod
    def of(cls, folder: Path, ids: Tensor, device: str) -> Targets:
        target = StreamedModel(folder, device)
        if target.config.vocab_size <= int(ids.max()):
            raise ModelError(
                f"{folder} has a smaller vocabulary than its drafter", hint="give the drafter's own target"
            )
        return cls(ids, hidden_states(target, ids), target.head().float())

    def probs(self, rows: Tensor, places: Tensor) -> Tensor:
        """Probabilities ``[n, V]`` at ``places`` of the flattened rows."""
        return F.linear(self.states[rows].flatten(0, 1)[places].to(self.head.device), self.head).softmax(-1)


def tune(folder: Path, target: Path, ids: Tensor, options: MethodOptions, seed: int, device: str) -> tuple[
    dict[str, QuantizedWeight], AcceptanceReport
]:  # fmt: skip
    """The linear layers of the quantized drafter in ``folder`` with codes for ``target``'s acceptance on text
    ``ids [S, T]``. Raises ``ModelError`` when the two do not share a vocabulary."""
    drafter, targets = Drafter.load(folder, device), Targets.of(target, ids, device)
    if len(targets.head) != len(drafter.head):
        raise ModelError(
            f"{target} has {len(targets.head)} words and its drafter {len(drafter.head)}", hint="give its own target"
        )
    held = torch.arange(0, len(ids), _HELD_BACK)
    train = torch.tensor([row for row in range(len(ids)) if row % _HELD_BACK] or [0])
    before = acceptance(drafter, targets, held, drafter.quantized)
    learned = learn(drafter, targets, train, options, seed)
    after = acceptance(drafter, targets, held, learned)
    changed = sum(int((learned[name].codes != old.codes).sum()) for name, old in drafter.quantized.items())
    total = sum(old.codes.numel() for old in drafter.quantized.values())
    report = AcceptanceReport(before, max(before, after), changed / total if after > before else 0.0)
    return (learned if after > before else drafter.quantized), report


def learn(
    drafter: Drafter, targets: Targets, rows: Tensor, options: MethodOptions, seed: int
) -> dict[str, QuantizedWeight]:
    """Codes learned on those ``rows`` of the text."""
    generator = torch.Generator().manual_seed(seed)
    height = max(1, _BATCH_TOKENS // targets.ids.shape[1])
    with torch.enable_grad():
        soft = {name: old.codes.float().requires_grad_() for name, old in drafter.quantized.items()}
        adam = torch.optim.Adam(soft.values(), options.acceptance_rate, betas=(0.9, 0.99))
        for step in range(options.acceptance_steps):
            progress = step / options.acceptance_steps
            chosen = rows[torch.randperm(len(rows), generator=generator)[:height]]
            places = _places(chosen, targets, generator)
            weights = {
                name: _weight(codes, drafter.quantized[name], hardness(progress)) for name, codes in soft.items()
            }
            loss = _total_variation(drafter, targets, chosen, places, weights).mean()
            adam.zero_grad()
            loss.backward()
            adam.step()
            _confine(soft, drafter.quantized)
    return {
        name: replace(old, codes=soft[name].detach().round().to(torch.int8)) for name, old in drafter.quantized.items()
    }


@torch.no_grad()
def acceptance(drafter: Drafter, targets: Targets, rows: Tensor, quantized: dict[str, QuantizedWeight]) -> float:
    """Mean probability that the target accepts a token which the drafter draws, over all of those rows."""
    weights = {name: dequantize(weight) for name, weight in quantized.items()}
    total = 0.0
    for row in rows.split(1):
        for places in torch.arange(targets.ids.shape[1]).split(max(1, _BATCH_LOGITS // len(targets.head))):
            total += float((1 - _total_variation(drafter, targets, row, places, weights)).sum(dtype=torch.float64))
    return total / (len(rows) * targets.ids.shape[1])


def hardness(progress: float) -> float:
    """Share of the hard codes in the mixture."""
    middle = min(max((progress - _SOFT) / (_HARD - _SOFT), 0.0), 1.0)
    return 0.5 - 0.5 * math.cos(math.pi * middle)


def _total_variation(
    drafter: Drafter, targets: Targets, rows: Tensor, places: Tensor, weights: dict[str, Tensor]
) -> Tensor:
    """``[n]``: half the absolute difference of both distributions, summed over words."""
    q = drafter.log_probs(targets.ids[rows], places, weights).exp()
    with torch.no_grad():
        p = targets.probs(rows, places)
    return 0.5 * (p - q).abs().sum(-1)


def _weight(codes: Tensor, old: QuantizedWeight, hard: float) -> Tensor:
    """The weight of a mixture of soft and hard codes; the gradient goes straight through the rounding."""
    mixed = codes + hard * (codes.round() - codes).detach()
    if old.zero_point is not None:
        mixed = mixed - expand_groups(old.zero_point.float(), codes.shape[1], old.scheme)
    return mixed * expand_groups(old.scale.float(), codes.shape[1], old.scheme)


@torch.no_grad()
def _confine(soft: dict[str, Tensor], quantized: dict[str, QuantizedWeight]) -> None:
    """Keep every code within one of where it began, and on the grid."""
    for name, codes in soft.items():
        old = quantized[name]
        codes.clamp_(old.codes - 1.0, old.codes + 1.0).clamp_(old.scheme.q_min, old.scheme.q_max)


def _places(rows: Tensor, targets: Targets, generator: torch.Generator) -> Tensor:
    """Positions of the flattened rows to compare: all, or so many at random as memory allows."""
    count = len(rows) * targets.ids.shape[1]
    return torch.randperm(count, generator=generator)[: max(1, _BATCH_LOGITS // len(targets.head))]
