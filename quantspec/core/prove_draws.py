"""A model that draws on its device shows, before its first token, that it draws what the host would."""

from __future__ import annotations

import struct

import torch

from quantspec.core.noise import Stream
from quantspec.core.sampling import WarpChain
from quantspec.core.verify import Verifier
from quantspec.models.base import CausalModel
from quantspec.types import Batch, PendingDraft, SamplingParams, Verdict

PROMPT = (1, 2, 3, 4, 5)
_TOKENS, _PARENTS = (6, 7, 8, 9, 1, 2), (-1, -1, 0, 1, 1, 4)
_CAPACITY = 8  # two nodes more than there are
_PARAMS = (SamplingParams(), SamplingParams(temperature=0.8), SamplingParams(temperature=1.1, top_k=20))


def draws_agree(model: CausalModel) -> bool:
    """Whether the ``model``, a ``DrawingModel`` too, comes to the host's verdicts on a tree that only the device knows,
    at temperature 0, above it, and where the host truncates."""
    nothing = model.forward(Batch.chain(PROMPT), [model.new_cache(len(PROMPT), 0)])
    draft = _pending(nothing.logits.device)
    return all(_verdict(model, draft, params, True) == _verdict(model, draft, params, False) for params in _PARAMS)


def _verdict(
    model: CausalModel, draft: PendingDraft, params: SamplingParams, on_device: bool
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The draws of all rows, and the path that stands."""
    verifier = Verifier(model)
    if not on_device:
        verifier.draw_on_host()
    stream = Stream.of(PROMPT, 0, 0)
    session = verifier.open(PROMPT, WarpChain(params, PROMPT), stream, max_new_tokens=8, max_nodes=_CAPACITY)
    verdict: Verdict = verifier.verify([session], [draft])[0]
    return tuple(verdict.y), tuple(verdict.path)


def _pending(device: torch.device) -> PendingDraft:
    n, missing = len(_TOKENS), _CAPACITY - len(_TOKENS)
    one = struct.unpack("i", struct.pack("f", 1.0))[0]
    numbers = [n, *_TOKENS, *[0] * missing, *_PARENTS, *[-1] * missing, *[one] * _CAPACITY]
    return PendingDraft(torch.tensor(numbers, dtype=torch.int32, device="cpu").to(device), _CAPACITY, 4, "proof")
