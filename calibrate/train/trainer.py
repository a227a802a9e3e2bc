"""The one trainer of drafters: text that a (quantized) base wrote, the base's streams on it, and a method's loss.

A method (one file each in `methods/`) brings its net, which of the base's streams it reads, its loss on a batch, and
how it is saved. All else is here: resuming, seeds, several processes, the log, tau and the measured acceptance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from torch.func import functional_call

from quantspec.calibrate.train import workers
from quantspec.calibrate.train.checkpoint import load_net
from quantspec.calibrate.train.config import DrafterConfig, Shape
from quantspec.calibrate.train.distill import straight_through
from quantspec.calibrate.train.features import CachedFeatures, Features, OnlineFeatures, write
from quantspec.calibrate.train.loop import Metrics, autocast, fit
from quantspec.calibrate.train.measure import fit_tau, tree_acceptance
from quantspec.calibrate.train.net import LlamaNet
from quantspec.calibrate.train.rollout import Batch, RolloutBatches, Rollouts, fingerprint, language, read_rollouts
from quantspec.errors import ModelError, UsageError
from quantspec.numerics.scheme import Scheme
from quantspec.types import Tap

Guess = tuple[torch.Tensor, torch.Tensor]
"""Logits [n, V] of the base and of the drafter for the same tokens; -inf where the drafter has none."""

_HELD_TEXTS, _HELD_ROWS = 60, 12


class Method(Protocol):
    """What one kind of drafter brings."""

    @property
    def name(self) -> str:
        """As in `EngineConfig.method`."""

    @property
    def net(self) -> nn.Module:
        """What is trained."""

    @property
    def taps(self) -> tuple[Tap, ...]:
        """Streams of the base that batches must have, besides its features after the final norm."""

    def loss(self, batch: Batch, progress: float, noise: torch.Generator) -> tuple[torch.Tensor, Metrics]:
        """What is minimized on a batch; `accuracy.j` among the metrics is that of draft step j."""

    def guesses(self, batch: Batch) -> Iterator[Guess]:
        """Per draft step, two at least, generated tokens as the base and as the drafter see them."""

    def save(self, out: Path, tau: Mapping[str, float]) -> None:
        """Write a folder that generation reads. `tau` by temperature: see `measure.fit_tau`."""


def train(
    config: DrafterConfig, method_of: Callable[[LlamaNet, Rollouts], Method], stop_after: int | None = None
) -> dict[str, Any]:
    """Train (or go on training) a drafter and write it to `config.out`; returns steps, tau and acceptance length."""
    device = config.run.device
    base, texts, name = load_net(config.base, device), read_rollouts(config.rollouts), fingerprint(config.base)
    _refuse_other_language(config, texts)
    if int(texts.ids.max()) >= base.vocab:
        what = f"{config.rollouts} has token {int(texts.ids.max())}, and {config.base} only {base.vocab} tokens"
        raise ModelError(what, hint="let the base, or a model of its family, write the text")
    if config.held_out is not None:
        _read_held(config, name)  # before the work, not after
    method = method_of(base, texts)
    if config.run.shard:
        workers.shard(base.model.layers)
    features = _features(config, base, texts, method.taps, name)
    batches = RolloutBatches(texts, config.optim.batch // workers.world(), config.optim.seed)
    noise, seen = torch.Generator(), 0
    scheme = Scheme(config.bits, config.group_size) if config.bits else None

    def loss_of(step: int, progress: float) -> tuple[torch.Tensor, Metrics]:
        nonlocal seen
        own = step * workers.world() + workers.rank()
        noise.manual_seed(config.optim.seed * 1_000_003 + own)
        texts_of_step = batches[own].to(device)  # read outside: autocast has no rule for some of the types on disk
        with autocast(config.run):
            batch = features.fill(texts_of_step)
            seen += int(batch.lens.sum()) * workers.world()
            rounded = scheme is not None and progress >= config.quantize_from
            loss, metrics = loss_under(method, scheme if rounded else None, batch, progress, noise)
        return loss, {"tokens": float(seen), **metrics, "acceptance_length": simulated_length(metrics)}

    def restore(tokens: int) -> None:
        nonlocal seen
        seen = tokens

    steps = fit(
        method.net, loss_of, config.optim, config.run, config.out,
        counters=lambda: seen, restore=restore, evaluate=lambda: _held_out(method, config, base, name),
        stop_after=stop_after,
    )  # fmt: skip
    parameters = sum(p.numel() for p in method.net.parameters() if p.requires_grad)
    result: dict[str, Any] = {"steps": steps, "tokens": seen, "parameters": parameters}
    if workers.rank() == 0 or config.run.shard:  # where each has but a part of the base, all take part
        result |= _finish(method, config, base, name)
    return result


def loss_under(
    method: Method, scheme: Scheme | None, batch: Batch, progress: float, noise: torch.Generator
) -> tuple[torch.Tensor, Metrics]:
    """`method.loss` with all linear layers of its net rounded in the forward pass alone (straight-through); None: as
    they are."""
    if scheme is None:
        return method.loss(batch, progress, noise)
    rounded = {f"net.{name}": weight for name, weight in straight_through(method.net, scheme).items()}
    return functional_call(_Loss(method), rounded, (batch, progress, noise))


class _Loss(nn.Module):
    """A method's loss as a module, so that its net can be given other weights for a call."""

    def __init__(self, method: Method) -> None:
        super().__init__()
        self.method, self.net = method, method.net

    def forward(self, batch: Batch, progress: float, noise: torch.Generator) -> tuple[torch.Tensor, Metrics]:
        return self.method.loss(batch, progress, noise)


def head_shape(config: DrafterConfig, base: Shape, layers: int = 1) -> Shape:
    """Layers like the base's, but for what the configuration says."""
    heads = config.heads or base.heads
    kv_heads = heads * base.kv_heads // base.heads
    if not kv_heads or heads % kv_heads:
        raise UsageError(f"{heads} heads do not divide as the base's {base.heads} over {base.kv_heads} do")
    return replace(base, layers=layers, mlp=config.mlp or base.mlp, heads=heads, kv_heads=kv_heads)


def _refuse_other_language(config: DrafterConfig, texts: Rollouts) -> None:
    """Raise a `ModelError` for text whose tokens or prompts mean something else to the base."""
    own = language(config.base) if texts.spoken else {}
    for what, value in texts.spoken.items():
        if own.get(what) != value:
            hint = "let the base, or a model of its family, write the text"
            raise ModelError(f"{config.rollouts} was written with another {what} than that of {config.base}", hint=hint)


def _features(config: DrafterConfig, base: LlamaNet, texts: Rollouts, taps: Sequence[Tap], name: str) -> Features:
    own = texts.model == name
    if config.features is None:
        return OnlineFeatures(base, taps, own)
    asked = list(taps) if own else [*taps, "norm"]
    write(config.features, texts, base, asked, name, config.fp8)
    return CachedFeatures(config.features, texts, asked, name, base.shape.hidden, config.fp8)


def _finish(method: Method, config: DrafterConfig, base: LlamaNet, name: str) -> dict[str, Any]:
    """Write the drafter; tau and acceptance on held-out text."""
    first = workers.rank() == 0
    if config.held_out is None:
        if first:
            method.save(config.out, {})
        return {}
    held = _read_held(config, name)
    tau = fit_tau(method, OnlineFeatures(base, method.taps, own=True), held)
    if not first:
        return {}
    method.save(config.out, tau)
    return {"tau": tau, "tree_acceptance": tree_acceptance(config.base, method.name, config.out, held)}


def _read_held(config: DrafterConfig, name: str) -> Rollouts:
    assert config.held_out is not None
    held = read_rollouts(config.held_out)
    if held.model != name:
        hint = "make held-out rollouts with the base itself"
        raise ModelError(f"{config.held_out} was not written by {config.base}", hint=hint)
    return held


@torch.no_grad()
def _held_out(method: Method, config: DrafterConfig, base: LlamaNet, name: str) -> Metrics:
    """On held-out text, per draft step j: how often the drafter's best token is the base's, `held.accuracy.j`, and the
    share of the drafter's own draws that speculative sampling would accept, `held.acceptance.j` (1 less the total
    variation)."""
    if config.held_out is None:
        return {}
    held, features = _read_held(config, name), OnlineFeatures(base, method.taps, own=True)
    sums: dict[str, float] = {}
    counts: dict[int, int] = {}
    for first in range(0, min(len(held), _HELD_TEXTS), _HELD_ROWS):
        texts = list(range(first, min(first + _HELD_ROWS, len(held))))
        for j, (truth, guess) in enumerate(method.guesses(features.fill(held.batch(texts).to(config.run.device)))):
            hits = (truth.argmax(-1) == guess.argmax(-1)).sum()
            shared = torch.minimum(truth.softmax(-1), guess.softmax(-1)).sum()
            counts[j] = counts.get(j, 0) + len(truth)
            for key, value in ((f"held.accuracy.{j}", hits), (f"held.acceptance.{j}", shared)):
                sums[key] = sums.get(key, 0.0) + float(value)
    return {key: value / max(1, counts[int(key.rpartition(".")[2])]) for key, value in sums.items()}


def simulated_length(metrics: Metrics) -> float:
    """Tokens per forward of the base if draft step j is right as often as `accuracy.j` says, where the steps before it
    were: 1 + a_0 + a_0 a_1 + ..."""
    length, reached, step = 1.0, 1.0, 0
    while f"accuracy.{step}" in metrics:
        reached *= metrics[f"accuracy.{step}"]
        length, step = length + reached, step + 1
    return length
