"""Distil an intermediate on text that the quantized target wrote, against that target's distributions.

The teacher's features came with the text (see `rollout`), so its logits cost one matmul with its head and no forward.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from quantspec.calibrate.train import workers
from quantspec.calibrate.train.checkpoint import fake_quantize, load_net, save_net
from quantspec.calibrate.train.config import DistillConfig
from quantspec.calibrate.train.loop import Metrics, autocast, fit
from quantspec.calibrate.train.measure import chain_acceptance, fit_taus, greedy_texts
from quantspec.calibrate.train.net import PLAIN, LlamaNet
from quantspec.calibrate.train.rollout import Batch, RolloutBatches, read_rollouts
from quantspec.errors import ModelError
from quantspec.numerics.scheme import Scheme


def run(config: DistillConfig, stop_after: int | None = None) -> dict[str, Any]:
    """Train (or go on training) the student and write it, dense, to `config.out`; returns steps and agreement."""
    if workers.wanted(config):
        return workers.launch(run, config)
    device = config.run.device
    teacher, student = load_net(config.teacher, device), load_net(config.student, device).requires_grad_(True)
    if student.rules != PLAIN:
        raise ModelError(f"{config.student} is no plain Llama with a tied head, which alone can be distilled into")
    batches = RolloutBatches(read_rollouts(config.rollouts), config.optim.batch // workers.world(), config.optim.seed)
    scheme = Scheme(config.bits, config.group_size) if config.bits else None
    seen = 0

    def loss_of(step: int, progress: float) -> tuple[torch.Tensor, Metrics]:
        nonlocal seen
        batch = batches[step * workers.world() + workers.rank()].to(device)
        seen += int(batch.lens.sum()) * workers.world()
        rounded = straight_through(student, scheme) if scheme and progress >= config.quantize_from else {}
        with autocast(config.run):
            logits = functional_call(student, rounded, (batch.ids,))
        return distillation_loss(logits.float(), batch, teacher, config), {"tokens": float(seen)}

    def restore(tokens: int) -> None:
        nonlocal seen
        seen = tokens

    steps = fit(
        student,
        loss_of,
        config.optim,
        config.run,
        config.out,
        counters=lambda: seen,
        restore=restore,
        evaluate=lambda: agreement_of(student, teacher, config.held_out, scheme),
        stop_after=stop_after,
    )
    if workers.rank() == 0:
        save_net(student, config.out, config.student, tau_of(student, teacher, config.held_out, scheme))
    return {"steps": steps, "tokens": seen, **agreement_of(student, teacher, config.held_out, scheme)}


def straight_through(net: nn.Module, scheme: Scheme) -> dict[str, torch.Tensor]:
    """The matrices that will be quantized, rounded in the forward pass and as they are in the backward pass. (Path
    networks of P-EAGLE heads never are.)"""
    return {
        name: p + (fake_quantize(p, scheme) - p).detach()
        for name, p in net.named_parameters()
        if p.dim() == 2 and "embed_tokens" not in name and not name.startswith("path.")
    }


def distillation_loss(logits: torch.Tensor, batch: Batch, teacher: LlamaNet, config: DistillConfig) -> torch.Tensor:
    """Soft cross-entropy to the teacher (KL up to its entropy) with a share of hard cross-entropy to its text.

    Logits [B, T, V] of the student; rows are averaged by their weights.
    """
    weights = batch.weights(config.prompt_weight)[:, :-1]
    with torch.no_grad():
        labels = teacher.head(batch.features[:, :-1]).softmax(-1) * (1 - config.ce_weight)
        labels.scatter_add_(2, batch.ids[:, 1:, None], torch.full_like(labels[..., :1], config.ce_weight))
    rows = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten(0, 1), reduction="none")
    return (rows * weights.flatten()).sum() / weights.sum()


@torch.no_grad()
def tau_of(student: LlamaNet, teacher: LlamaNet, held_out: Path | None, scheme: Scheme | None) -> dict[str, float]:
    """The temperature of the (rounded) student's scores as a drafter's; see `measure.fit_taus`."""
    if held_out is None:
        return {}
    texts, rounded = read_rollouts(held_out), straight_through(student, scheme) if scheme else {}

    def guesses(index: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        batch = texts.batch([index]).to(str(teacher.model.norm.weight.device))
        generated = batch.weights(0.0) > 0
        yield (
            teacher.head(batch.features)[generated].float(),
            functional_call(student, rounded, (batch.ids,))[generated],
        )

    return fit_taus(guesses, texts)


@torch.no_grad()
def agreement_of(student: LlamaNet, teacher: LlamaNet, held_out: Path | None, scheme: Scheme | None) -> Metrics:
    """How far the student follows the teacher's greedy held-out texts.

    "agreement" is the share of generated positions with the same argmax and "agreement_rounded" that of the rounded
    student, whose chains of 8 tokens give "chain_acceptance" tokens per teacher forward.
    """
    if held_out is None:
        return {}
    texts = read_rollouts(held_out)
    greedy = greedy_texts(texts)
    plain: list[list[bool]] = []
    rounded: list[list[bool]] = []
    for start in range(0, len(greedy), 16):
        batch = texts.batch(greedy[start : start + 16]).to(str(teacher.model.norm.weight.device))
        generated = batch.weights(0.0) > 0
        expected = teacher.head(batch.features).argmax(-1)
        for hits, weights in ((plain, {}), (rounded, straight_through(student, scheme) if scheme else {})):
            same = functional_call(student, weights, (batch.ids,)).argmax(-1) == expected
            hits += [row[keep].tolist() for row, keep in zip(same, generated, strict=True)]
    shares = [sum(map(sum, hits)) / sum(map(len, hits)) for hits in (plain, rounded)]
    return {"agreement": shares[0], "agreement_rounded": shares[1], "chain_acceptance": chain_acceptance(rounded, 8)}
