"""transformers as a contender: ``generate`` on dense weights, alone, with an assistant, or with prompt lookup."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from time import perf_counter
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from quantspec.benchmarks.peers.protocol import Answer, Answerer, Ask, peak_memory, serve


class Watch(BaseStreamer):
    """When the first token came, and how many tokens each target forward gave."""

    def __init__(self) -> None:
        self.began, self.first = perf_counter(), 0.0
        self.counts: list[int] = []
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if not self._prompt_seen:  # the prompt comes first
            self._prompt_seen = True
            return
        self.first = self.first or perf_counter() - self.began
        self.counts.append(value.numel())

    def end(self) -> None:
        """The end of the text."""


def load(options: Mapping[str, Any]) -> tuple[dict[str, Any], Answerer]:
    """``folder``, ``dtype``, ``device``, ``threads``, and ``assistant``, another folder or None."""
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(options["threads"])
    model = _load(options["folder"], options)
    assistant = None if options.get("assistant") is None else _load(options["assistant"], options)
    described = {
        "describe": f"transformers generate, {options['dtype']}",
        "version": f"transformers {transformers.__version__}, torch {torch.__version__}",
        "weight_bytes": sum(each.numel() * each.element_size() for each in model.parameters()),
    }

    def answer(ask: Ask) -> Answer:
        return generate(model, assistant, ask)

    answer(Ask(tokens=(1, 2, 3, 1, 2), text="", max_new_tokens=4, extra={}))
    return described, answer


def generate(model: PreTrainedModel, assistant: PreTrainedModel | None, ask: Ask) -> Answer:
    """``ask.extra`` are further arguments of ``generate``, such as ``prompt_lookup_num_tokens``."""
    prompt = torch.tensor([ask.tokens], device=model.device)
    more = dict(ask.extra) if assistant is None else {**ask.extra, "assistant_model": assistant}
    watch = Watch()
    out = model.generate(  # type: ignore[operator]
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=ask.max_new_tokens,
        streamer=watch,
        **more,
    )
    tokens = tuple(out[0, len(ask.tokens) :].tolist())  # which waits for a GPU
    seconds = perf_counter() - watch.began
    accepted = Counter(count - 1 for count in watch.counts[1:])
    return Answer(
        tokens=tokens,
        seconds=seconds,
        first_token_seconds=watch.first,
        peak_memory_bytes=torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else peak_memory(),
        target_forwards=sum(accepted.values()),
        accepted=tuple(accepted[count] for count in range(max(accepted, default=-1) + 1)),
    )


def _load(folder: str, options: Mapping[str, Any]) -> PreTrainedModel:
    dtype = getattr(torch, options["dtype"])
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
    return model.to(options["device"]).eval()


if __name__ == "__main__":
    serve(load)
