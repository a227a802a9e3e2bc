"""What models expect of held-out text, token by token: as they run, or streamed from disk, and how they differ."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from quantspec.calibrate.evaluate.config import PositionBin
from quantspec.calibrate.quantize.evaluate import hidden_states
from quantspec.calibrate.quantize.stream import StreamedModel
from quantspec.models.base import CausalModel
from quantspec.numerics.measures import kl_divergence
from quantspec.types import Batch

CHUNK = 256  # positions whose log-probabilities over the vocabulary stand in memory at once
_HEAD_BLOCK = 4096  # vocabulary entries turned to fp32 at once
_BINS = 16
_RESAMPLES = 2000

STREAMED = "streamed, fp32"
"""In the place of a backend: from disk, one layer at a time."""
Scores = Iterator[Tensor]
"""Log-probabilities ``[<= CHUNK, V]`` of what follows each token but the last of a row, row after row."""


@torch.no_grad()
def scores_as_run(model: CausalModel, ids: Tensor, on_row: Callable[[int], None] | None = None) -> Scores:
    """Of ``ids [S, T]``, on the model's own kernels and with its cache, as it would generate; ``on_row`` hears of each
    finished row."""
    for number, row in enumerate(ids.tolist(), 1):
        inputs = row[:-1]
        cache = model.new_cache(len(inputs), 1)
        for start in range(0, len(inputs), CHUNK):
            part = inputs[start : start + CHUNK]
            logits = model.forward(Batch.chain(part, start), [cache]).logits
            cache.commit(range(len(part)))
            yield logits.float().log_softmax(-1)
        if on_row is not None:
            on_row(number)


@torch.no_grad()
def scores_streamed(model: StreamedModel, ids: Tensor) -> Scores:
    """Of ``ids [S, T]``, in fp32 with the weights as stored, one decoder layer in memory at a time."""
    for row in hidden_states(model, ids):
        for part in row[:-1].split(CHUNK):
            on_device = part.to(model.device)
            # The head comes from disk in blocks too: where layers are streamed, it may be larger than several of them.
            logits = torch.cat([on_device @ block.T for block in model.head_blocks(_HEAD_BLOCK)], dim=1)
            yield logits.log_softmax(1)


@dataclass(frozen=True)
class Comparison:
    """Of each held-out token but the first of a row, all ``[S, T - 1]``: its negative log-likelihood in nats under both
    models, KL(before || after) in nats of the distributions that it comes from, and 1 where both have the same most
    likely token."""

    nll_before: Tensor
    nll_after: Tensor
    divergence: Tensor
    agreement: Tensor

    @property
    def perplexity_before(self) -> float:
        return perplexity(self.nll_before)

    @property
    def perplexity_after(self) -> float:
        return perplexity(self.nll_after)

    @property
    def kl(self) -> float:
        return _mean(self.divergence)

    @property
    def top1_agreement(self) -> float:
        return _mean(self.agreement)

    def by_position(self) -> list[PositionBin]:
        return by_position(self.nll_after, self.divergence, self.agreement)


@torch.no_grad()
def compare(ids: Tensor, before: Iterable[Tensor], after: Iterable[Tensor]) -> Comparison:
    """Two models' ``Scores`` of ``ids [S, T]``, side by side."""
    rows: list[tuple[Tensor, ...]] = []
    for targets, log_p, log_q in zip(_targets(ids), before, after, strict=True):
        log_p = log_p.to(log_q.device)
        same = (log_p.argmax(-1) == log_q.argmax(-1)).float()
        rows.append((_nll(log_p, targets), _nll(log_q, targets), kl_divergence(log_p, log_q).cpu(), same.cpu()))
    return Comparison(*(torch.cat(column).view(len(ids), -1) for column in zip(*rows, strict=True)))


@torch.no_grad()
def losses(ids: Tensor, scores: Iterable[Tensor]) -> Tensor:
    """Negative log-likelihoods in nats ``[S, T - 1]`` of each token but the first of ``ids [S, T]``."""
    found = [_nll(log, targets) for targets, log in zip(_targets(ids), scores, strict=True)]
    return torch.cat(found).view(len(ids), -1)


def perplexity(nll: Tensor) -> float:
    return float(nll.double().mean().exp())


def by_position(nll: Tensor, divergence: Tensor | None = None, agreement: Tensor | None = None) -> list[PositionBin]:
    """Means over ``[S, T - 1]`` in at most 16 ranges of places, of equal width."""
    size = nll.shape[1]
    count = min(_BINS, size)
    edges = [round(i * size / count) for i in range(count + 1)]
    bins = []
    for start, end in pairwise(edges):
        means = [None if values is None else _mean(values[:, start:end]) for values in (divergence, agreement)]
        # The token at place t is predicted from t tokens of context, and the first is not predicted.
        bins.append(PositionBin(start + 1, end + 1, _mean(nll[:, start:end]), *means))
    return bins


def _targets(ids: Tensor) -> Iterator[Tensor]:
    return (part for row in ids[:, 1:] for part in row.split(CHUNK))


def _nll(log: Tensor, targets: Tensor) -> Tensor:
    return -log.gather(1, targets[:, None].to(log.device))[:, 0].cpu()


def _mean(values: Tensor) -> float:
    return float(values.double().mean())


def interval(values: Tensor, seed: int = 0) -> list[float] | None:
    """95% interval of the mean of ``values [S, T]`` by a percentile bootstrap over rows, whose tokens depend on each
    other; None for fewer than two rows."""
    if len(values) < 2:
        return None
    rows = values.double().mean(1)
    picks = torch.randint(len(rows), (_RESAMPLES, len(rows)), generator=torch.Generator().manual_seed(seed))
    return rows[picks].mean(1).quantile(rows.new_tensor([0.025, 0.975])).tolist()
