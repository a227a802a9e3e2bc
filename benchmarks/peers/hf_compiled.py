"""Compiled decoding in the way of gpt-fast: transformers' model, a static cache, and one CUDA graph per step.

The baseline that published speedups often lack: without graphs, a GPU waits for Python at batch 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, StaticCache

from quantspec.benchmarks.peers.protocol import Answer, Answerer, Ask, serve

Step = Callable[[Tensor], Tensor]
_WARM_UP = (1, 2, 3, 1, 2)


def load(options: Mapping[str, Any]) -> tuple[dict[str, Any], Answerer]:
    """``folder``, ``dtype``, ``device``, and ``context``: the tokens that the cache has room for."""
    transformers.logging.set_verbosity_error()
    dtype = getattr(torch, options["dtype"])
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        Path(options["folder"]), dtype=dtype, local_files_only=True
    )
    decoding = Decoding(model.to(options["device"]).eval(), options["context"])
    decoding.compile()
    decoding.answer(Ask(tokens=_WARM_UP, text="", max_new_tokens=8, extra={}))
    described = {
        "describe": f"transformers, static cache, torch.compile(reduce-overhead), {options['dtype']}",
        "version": f"transformers {transformers.__version__}, torch {torch.__version__}",
        "weight_bytes": sum(each.numel() * each.element_size() for each in model.parameters()),
    }
    return described, decoding.answer


class Decoding:
    """Greedy decoding with one cache, which every text fills anew."""

    def __init__(self, model: PreTrainedModel, context: int) -> None:
        self._model, self._cache = model, StaticCache(config=model.config, max_cache_len=context)
        self._step: Step = self._forward
        ends = model.generation_config.eos_token_id if model.generation_config is not None else None
        self._ends = frozenset(ends if isinstance(ends, list) else [] if ends is None else [ends])

    def compile(self) -> None:
        """One graph for a step; prompts stay eager, as their lengths differ."""
        self._step = torch.compile(self._forward, mode="reduce-overhead", fullgraph=True)

    @torch.no_grad()
    def answer(self, ask: Ask) -> Answer:
        """One text; ``ask.extra`` is not used."""
        began = perf_counter()
        if self._cache.is_initialized:
            self._cache.reset()
        token = self._forward(torch.tensor([ask.tokens], device=self._model.device))
        tokens = [int(token)]
        first = perf_counter() - began
        while len(tokens) < ask.max_new_tokens and tokens[-1] not in self._ends:
            token = self._step(token).clone()  # the next replay writes where this one did
            tokens.append(int(token))
        return Answer(
            tokens=tuple(tokens),
            seconds=perf_counter() - began,
            first_token_seconds=first,
            peak_memory_bytes=torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else None,
            target_forwards=len(tokens) - 1,
        )

    def _forward(self, tokens: Tensor) -> Tensor:
        """The likeliest token after these, ``[1, 1]``."""
        logits = self._model(tokens, past_key_values=self._cache, use_cache=True, logits_to_keep=1).logits
        return logits[:, -1].argmax(-1, keepdim=True)


if __name__ == "__main__":
    serve(load)
