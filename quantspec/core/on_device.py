"""A forward of a model that draws: what of a step stays on the device, and the one copy to the host that it ends in."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch

from quantspec.core.session import Session
from quantspec.kernels.draws import MOST_RUNNERS_UP, Drawn, Layout
from quantspec.models.base import NO_DRAW, Draw, Drawing, DrawingModel, Output
from quantspec.types import Batch, Draft, Needs, PendingDraft, Proposal

MOST_LAG = 64
"""Rows of a lag below which a draft is grafted on the device: a longer one goes through the model in rounds."""


def draw(
    model: DrawingModel,
    batch: Batch,
    sessions: Sequence[Session],
    drafts: Sequence[Proposal],
    draws: Sequence[Draw | None],
    needs: Needs,
) -> tuple[Output, list[Draft], list[Drawn | None]]:
    """The batch's logits and taps, which stay on the device, every draft, and per session what was drawn of its rows:
    None where ``draws`` has None, since it takes the host.

    Waits for the device once, when drafts and draws come to the host together.
    """
    ranked = needs.top_k if 0 < needs.top_k <= MOST_RUNNERS_UP else 1
    layout = Layout.of(model.vocab_size, ranked, any(each is not None and each.truncates for each in draws))
    pending = {s: draft for s, draft in enumerate(drafts) if isinstance(draft, PendingDraft)}
    drawing = Drawing([each or NO_DRAW for each in draws], layout, pending)
    output = model.draw(batch, [session.cache for session in sessions], needs.taps, drawing)
    assert output.draws is not None, "asked for"
    *records, table = _to_host([*(draft.record for draft in pending.values()), output.draws])
    host_records = dict(zip(pending, records, strict=True))
    known = [
        draft.resolve(host_records[s].tolist()) if isinstance(draft, PendingDraft) else draft
        for s, draft in enumerate(drafts)
    ]
    starts = accumulate(batch.num_logits, initial=0)
    drawn = [
        Drawn.read(table[start : start + len(draft) + 1].numpy(), layout) if each else None
        for start, draft, each in zip(starts, known, draws, strict=False)
    ]
    return output, known, drawn


def _to_host(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """int32 tensors on the device, by one copy."""
    flat = tensors[0].flatten() if len(tensors) == 1 else torch.cat([tensor.flatten() for tensor in tensors])
    ends = accumulate((tensor.numel() for tensor in tensors), initial=0)
    host = flat.cpu()
    return [host[a:b].view(tensor.shape) for (a, b), tensor in zip(pairwise(ends), tensors, strict=True)]
