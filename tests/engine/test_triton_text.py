"""Engine runs on Triton's kernels, under their interpreter: text does not depend on the drafter, the batch, or on where
the tokens are drawn."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import quantspec
from quantspec.engine import build
from quantspec.models.cache import kv_format
from quantspec.models.config import ModelConfig
from quantspec.numerics.scheme import KVCacheDtype
from quantspec.types import SamplingParams

pytest.importorskip("triton", reason="triton is not installed")

from quantspec.kernels.triton import attention, sampling
from quantspec.models import triton_frame
from quantspec.models.load_triton import load_triton_decoder

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
PROMPTS = ["She", "48 / 4"]
SMALL = {"max_batch": 2, "prompt_lookup_min": 1, "num_speculative_tokens": 3}


@pytest.fixture
def load(family: dict[str, Path], triton_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Any:
    """``quantspec.load`` of the family's target, on Triton's kernels wherever they run."""
    if triton_device.type == "cpu":
        monkeypatch.setattr(attention, "CHUNK", 64)
        monkeypatch.setattr(triton_frame, "TILES", (1, 2, 4, 8, 64))
        monkeypatch.setattr(sampling, "_BLOCK", 512)

    def decoder(folder: Path, kv_cache_dtype: KVCacheDtype = "auto", **options: Any) -> Any:
        config = ModelConfig.load(folder)
        form = kv_format(config, kv_cache_dtype)
        return load_triton_decoder(folder, config, triton_device, torch.float32, kv_format=form)

    monkeypatch.setattr(build, "load_model", decoder)
    monkeypatch.setattr(build, "_prove_draws", lambda verifier, notice: None)  # tested in tests/core
    with torch.device("cpu"):
        yield lambda **options: quantspec.load(str(family["target"]), **SMALL, **options)


@pytest.mark.parametrize("temperature, kv_cache_dtype", [(0.0, "auto"), (0.9, "auto"), (0.9, "int4")])
def test_texts(load: Callable[..., Any], temperature: float, kv_cache_dtype: str) -> None:
    """A batch with drafts, drawn on the device, and every text alone and without a drafter, drawn on the host."""
    params = SamplingParams(max_new_tokens=3, temperature=temperature, top_p=0.9, seed=3)
    together = load(method="lookup", kv_cache_dtype=kv_cache_dtype).generate(PROMPTS, params)
    alone = load(method="none", kv_cache_dtype=kv_cache_dtype)
    alone._engine.verifier.draw_on_host()
    assert [each.token_ids for each in together] == [alone.generate(each, params).token_ids for each in PROMPTS]
