"""The compiled peer's loop, without a compiler: texts are those of transformers' own greedy decoding."""

from __future__ import annotations

import pytest

from quantspec.benchmarks.peers.protocol import Ask
from quantspec.models.resolve import resolve


def test_a_static_cache_gives_the_text_of_generate_again_and_again() -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from quantspec.benchmarks.peers.hf_compiled import Decoding

    folder = resolve("default/intermediate")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    decoding = Decoding(model, context=64)
    for prompt in ((5, 6, 7, 8, 900), (40, 50), (5, 6, 7, 8, 900)):  # the cache is filled anew each time
        answer = decoding.answer(Ask(tokens=prompt, text="", max_new_tokens=12, extra={}))
        expected = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=12)[0, len(prompt) :]
        assert answer.tokens == tuple(expected.tolist())
        assert answer.target_forwards == len(answer.tokens) - 1
