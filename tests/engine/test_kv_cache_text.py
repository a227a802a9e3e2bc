"""Text over a cache of 8 or 4-bit keys and values does not depend on the drafter, and its memory is reported."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import quantspec
from quantspec.engine.config import EngineConfig
from quantspec.engine.llm import LLM
from quantspec.errors import UsageError
from quantspec.models.atomic import MANIFEST
from quantspec.models.config import KV_CALIBRATED
from quantspec.models.resolve import resolve
from quantspec.types import SamplingParams

PROMPTS = ("Question: A baker has 24 rolls and sells 9. How many are left?\nAnswer:", "def total(values):")
PARTS: dict[str, dict[str, str]] = {
    "none": {},
    "lookup": {},
    "draft": {"draft_model": "default/intermediate-w4"},
    "eagle": {"head": "default/eagle-target"},
    "cascade": {"draft_model": "default/intermediate-w4", "head": "default/eagle-intermediate"},
}


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default target, said to be calibrated: what equality needs is no good text."""
    folder = Path(shutil.copytree(resolve("default/target-w4"), tmp_path_factory.mktemp("kv") / "target"))
    (folder / MANIFEST).unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {KV_CALIBRATED: True}))
    return folder


def texts(llm: LLM, temperature: float) -> list[tuple[int, ...]]:
    params = SamplingParams(max_new_tokens=24, temperature=temperature, seed=3, ignore_eos=True)
    return [completion.token_ids for completion in llm.generate(PROMPTS, params)]  # type: ignore[union-attr]


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_text_does_not_depend_on_the_drafter(target: Path, dtype: str) -> None:
    told: list[str] = []
    options: dict[str, Any] = {"kv_cache_dtype": dtype, "notice": told.append, "prefill_chunk": 7}
    llms = {name: quantspec.load(str(target), method=name, **parts, **options) for name, parts in PARTS.items()}
    assert not told
    assert {llm.exactness for llm in llms.values()} == {"exact"}
    for temperature in (0.0, 0.8):
        plain = texts(llms["none"], temperature)
        assert all(texts(llm, temperature) == plain for llm in llms.values())
    stats = llms["cascade"].generate(PROMPTS[0], SamplingParams(max_new_tokens=24, ignore_eos=True)).stats  # type: ignore[union-attr]
    assert stats.acceptance_length > 2


def test_memory_is_reported(target: Path) -> None:
    figures = {}
    for dtype in ("auto", "int8", "int4"):
        llm = quantspec.load(str(target), method="none", kv_cache_dtype=dtype)
        figures[dtype] = llm.generate("Once", SamplingParams(max_new_tokens=4, ignore_eos=True)).stats.as_dict()  # type: ignore[union-attr]
        assert figures[dtype]["kv_cache_dtype"] == dtype
    sizes = {dtype: each["kv_cache_bytes"] for dtype, each in figures.items()}
    assert sizes["int8"] / sizes["auto"] == 68 / 256  # 64 codes and a scale for 64 numbers
    assert sizes["int4"] / sizes["auto"] == 36 / 256


def test_int8_without_factors_is_told_and_int4_refused() -> None:
    told: list[str] = []
    quantspec.load(method="none", kv_cache_dtype="int8", notice=told.append)
    assert [line for line in told if "no calibrated key factors" in line]
    with pytest.raises(UsageError, match="no calibrated key factors"):
        quantspec.load(method="none", kv_cache_dtype="int4")


@pytest.mark.parametrize("wrong", ["int2", "fp8", None, 8])
def test_an_unknown_kind_is_refused(wrong: Any) -> None:
    with pytest.raises(UsageError, match="unknown kv_cache_dtype") as refused:
        EngineConfig(kv_cache_dtype=wrong)
    assert "int8" in (refused.value.hint or "")
