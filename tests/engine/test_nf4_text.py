"""The default family with bitsandbytes' NF4, for real, on the CPU: as target under every method, and as draft model."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import quantspec
from quantspec.models.resolve import resolve
from quantspec.types import SamplingParams

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (the extra bnb)")

PROMPT = "Q: A train travels 60 miles in 2 hours. How far does it go in 5 hours? A:"
EAGLE_TARGET, EAGLE_INTERMEDIATE = "default/eagle-target", "default/eagle-intermediate"


def quantized(name: str, folder: Path) -> Path:
    """A member of the family in NF4, as transformers writes it."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    source = resolve(name)
    module = AutoModelForCausalLM.from_pretrained(source, quantization_config=how, device_map={"": "cpu"})
    module.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / file, folder)
    return folder


@pytest.fixture(scope="module")
def nf4(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    names = ("target", "intermediate")
    return {name: str(quantized(f"default/{name}", tmp_path_factory.mktemp(name))) for name in names}


def run(temperature: float, **options: str) -> tuple[str, str, float]:
    result = quantspec.load(**options).generate(
        PROMPT, SamplingParams(max_new_tokens=40, temperature=temperature, seed=1)
    )
    return result.text, result.stats.exactness, result.stats.acceptance_length


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_the_text_of_an_nf4_target_is_that_of_plain_decoding(nf4: dict[str, str], temperature: float) -> None:
    target, intermediate = nf4["target"], nf4["intermediate"]
    plain, exactness, _ = run(temperature, model=target, method="none")
    assert exactness == "exact_to_rounding"
    methods: list[dict[str, str]] = [
        {"method": "lookup"},
        {"method": "draft", "draft_model": intermediate},
        {"method": "eagle", "head": EAGLE_TARGET},
        {"method": "cascade", "draft_model": intermediate, "head": EAGLE_INTERMEDIATE},
    ]
    for options in methods:
        text, exactness, length = run(temperature, model=target, **options)
        # Rows differ by 1e-6 of the logits' spread: far less than what parts the best two tokens of this text.
        assert (text, exactness) == (plain, "exact_to_rounding"), options
        # Trained drafters for nearly this target: well above 1 on this prompt.
        assert length > 1.5 or options["method"] == "lookup"


def test_an_nf4_draft_model_leaves_an_exact_target_exact(nf4: dict[str, str]) -> None:
    plain, *_ = run(0.8, model="default", method="none")
    text, exactness, length = run(0.8, model="default", method="draft", draft_model=nf4["intermediate"])
    assert (text, exactness) == (plain, "exact")
    assert length > 1.5
