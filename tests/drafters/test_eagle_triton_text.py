"""Text with EAGLE on Triton's kernels, under their interpreter where there is no GPU: that of plain decoding, from
drafts that the host never asks for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_eagle import save_family

from quantspec.core.verify import Verifier
from quantspec.drafters.cascade import Cascade
from quantspec.drafters.config import CascadeOptions, EagleOptions
from quantspec.models.config import ModelConfig
from quantspec.models.load import load_model
from quantspec.types import Budget, Draft, PendingDraft, SamplingParams

pytest.importorskip("triton", reason="triton is not installed")

from quantspec.drafters.eagle_triton import TritonEagle
from quantspec.kernels.triton import attention
from quantspec.models import triton_frame
from quantspec.models.load_triton import load_triton_decoder
from quantspec.models.triton_decoder import TritonDecoder

OPTIONS, PROMPT = EagleOptions(top_k=2, depth=2), [3, 11, 18, 25]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_family(tmp_path_factory.mktemp("eagle"))


@pytest.fixture
def device(triton_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    if triton_device.type == "cpu":
        monkeypatch.setattr(attention, "CHUNK", 64)
        monkeypatch.setattr(TritonEagle, "_flaw", lambda drafter: None)  # a test of its own: each takes seconds here
        monkeypatch.setattr(triton_frame, "TILES", (1, 4, 5, 9, 64))
    with torch.device("cpu"):
        yield triton_device


@pytest.fixture
def resolved(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the drafts that a verifier brought to the host, with its own results."""
    sizes, resolve = list[int](), PendingDraft.resolve

    def with_the_verdict(draft: PendingDraft, host_record: Sequence[int] | None = None) -> Draft:
        assert host_record is not None, "a copy of its own"
        found = resolve(draft, host_record)
        sizes.append(len(found))
        return found

    monkeypatch.setattr(PendingDraft, "resolve", with_the_verdict)
    return sizes


def load(folder: Path, device: torch.device) -> TritonDecoder:
    return load_triton_decoder(folder, ModelConfig.load(folder), device, torch.float32)


@pytest.mark.parametrize(
    "params",
    [SamplingParams(max_new_tokens=8), SamplingParams(max_new_tokens=7, temperature=0.8, top_p=0.9)],
    ids=["greedy", "sampled"],
)
def test_eagle(
    folders: dict[str, Path],
    device: torch.device,
    resolved: list[int],
    generate: Callable[..., Any],
    params: SamplingParams,
) -> None:
    model, reference = load(folders["target"], device), load_model(folders["target"])
    run = generate(model, [PROMPT], params, TritonEagle(folders["head"], OPTIONS), budget=Budget(4, 2))
    # Two implementations of one model in fp32, whose draws are too far apart here to differ by rounding.
    assert run.texts == generate(reference, [PROMPT], params).texts
    assert run.acceptance > 1.2
    assert resolved == [len(verdict.draft) for verdict in run.verdicts[0] if len(verdict.draft)]
    assert len(resolved) >= 2


def test_cascade(
    folders: dict[str, Path], device: torch.device, resolved: list[int], generate: Callable[..., Any]
) -> None:
    """The rounds below the target are EAGLE's on the intermediate: each brings its draft with its draws."""
    params, target = SamplingParams(max_new_tokens=8, temperature=0.8), load_model(folders["target"])
    inner, verifier = TritonEagle(folders["head"], OPTIONS), Verifier(load(folders["relative"], device), stage="middle")
    budget = Budget(4, 2)
    cascade = Cascade(inner, verifier, CascadeOptions(min_draft=3), inner_budget=lambda session: budget)
    run = generate(target, [PROMPT], params, cascade)
    assert run.texts == generate(target, [PROMPT], params).texts
    assert {"eagle", "middle"} <= {stage for verdict in run.verdicts[0] for stage in verdict.stages}
    assert resolved
