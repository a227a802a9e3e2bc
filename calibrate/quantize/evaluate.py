"""Forwards of text through a checkpoint that is streamed one layer at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from quantspec.calibrate.quantize.stream import StreamedModel

BATCH_TOKENS = 2048  # tokens in one forward of a layer
_HEAD_BLOCK = 16384  # vocabulary entries turned to fp32 at once


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
    for batch in batches(hidden):
        batch.copy_(model.final_norm(batch))
    return hidden


def log_probs(states: Tensor, head: Tensor) -> Tensor:
    """Log-probabilities ``[n, V]`` of ``states [n, H]``, a block of the vocabulary at a time."""
    logits = torch.cat([states @ block.float().T for block in head.split(_HEAD_BLOCK)], dim=1)
    return logits.log_softmax(1)
