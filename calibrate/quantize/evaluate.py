"""How far a quantized checkpoint is from its parent on held-out text, both streamed one layer at a time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from quantspec.calibrate.quantize.stream import StreamedModel
from quantspec.numerics.measures import kl_divergence, top1_agreement
from quantspec.numerics.scheme import KVCacheDtype

BATCH_TOKENS = 4096  # tokens in one forward of a layer
_HEAD_ROWS = 512  # positions whose logits stand in memory at once
_HEAD_BLOCK = 16384  # vocabulary entries turned to fp32 at once


@dataclass(frozen=True)
class Comparison:
    """Negative log-likelihoods in nats ``[S, T - 1]`` of each held-out token under both models; mean KL(before ||
    after) in nats and the share of positions with the same most likely token."""

    nll_before: Tensor
    nll_after: Tensor
    kl: float
    top1_agreement: float

    @property
    def perplexity_before(self) -> float:
        return float(self.nll_before.mean().exp())

    @property
    def perplexity_after(self) -> float:
        return float(self.nll_after.mean().exp())


def batches(rows: Tensor) -> tuple[Tensor, ...]:
    """Views of ``rows [S, T, ..]`` of about ``BATCH_TOKENS`` tokens each."""
    return rows.split(max(1, BATCH_TOKENS // rows.shape[1]))


@torch.no_grad()
def hidden_states(model: StreamedModel, ids: Tensor) -> Tensor:
    """States after the final norm ``[S, T, H]`` (fp32, CPU) for ``ids [S, T]``."""
    hidden = model.embed(ids)
    for index in range(model.config.num_layers):
        layer = model.layer(index)
        for batch in batches(hidden):
            batch.copy_(layer.forward(batch.to(model.device)))
    return model.final_norm(hidden)


@torch.no_grad()
def compare(before: Path, after: Path, ids: Tensor, device: str, kv_cache_dtype: KVCacheDtype = "auto") -> Comparison:
    """Score ``ids [S, T]`` with both checkpoints, of which ``after`` keeps keys and values in ``kv_cache_dtype``."""
    models = [StreamedModel(before, device), StreamedModel(after, device, kv_cache_dtype)]
    states = [hidden_states(model, ids)[:, :-1].flatten(0, 1) for model in models]
    heads = [model.head() for model in models]
    targets = ids[:, 1:].flatten()
    losses: list[list[Tensor]] = [[], []]
    divergence = agreement = 0.0
    for start in range(0, len(targets), _HEAD_ROWS):
        part = slice(start, start + _HEAD_ROWS)
        logs = [log_probs(state[part].to(device), head) for state, head in zip(states, heads, strict=True)]
        for loss, log in zip(losses, logs, strict=True):
            loss.append(-log.gather(1, targets[part, None].to(device))[:, 0].cpu())
        divergence += float(kl_divergence(*logs).sum(dtype=torch.float64))
        agreement += top1_agreement(*logs) * len(logs[0])
    nll = [torch.cat(loss).view(len(ids), -1) for loss in losses]
    return Comparison(nll[0], nll[1], divergence / len(targets), agreement / len(targets))


def log_probs(states: Tensor, head: Tensor) -> Tensor:
    """Log-probabilities ``[n, V]`` of ``states [n, H]``, a block of the vocabulary at a time."""
    logits = torch.cat([states @ block.float().T for block in head.split(_HEAD_BLOCK)], dim=1)
    return logits.log_softmax(1)
