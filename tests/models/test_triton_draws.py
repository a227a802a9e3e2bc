"""The draw as a part of forwards on Triton's kernels: what a whole step, draft and all, shows the host."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from quantspec.core import on_device
from quantspec.core.drafter import NoDrafter, View
from quantspec.core.noise import Stream
from quantspec.core.sampling import WarpChain
from quantspec.core.session import Session
from quantspec.core.step import step
from quantspec.core.verify import Verifier
from quantspec.kernels.draws import Layout
from quantspec.models.base import Draw, Drawing, DrawingModel
from quantspec.models.config import ModelConfig
from quantspec.numerics.scheme import Scheme
from quantspec.types import Batch, Budget, Draft, Needs, PendingDraft, Proposal, SamplingParams

from .conftest import make_pair
from .decoding import prefilled
from .test_cpu_decoder import packed_copy

pytest.importorskip("triton", reason="triton is not installed")

from quantspec.kernels.triton import attention, sampling
from quantspec.models import triton_frame
from quantspec.models.load_triton import load_triton_decoder
from quantspec.models.triton_decoder import TritonDecoder

from .test_triton_decoder import Capturing, text_of

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
SMALL = {"hidden_size": 32, "intermediate_size": 32, "head_dim": 16, "num_attention_heads": 2}
TREE = Draft((4, 5, 6, 7, 8), (-1, -1, 1, 2, 0), (0.5, 0.4, 0.3, 0.2, 0.1), ("device",) * 5)
GREEDY = SamplingParams(max_new_tokens=8)
WARM = SamplingParams(max_new_tokens=8, temperature=0.7, seed=3)
TOP_P = SamplingParams(max_new_tokens=8, temperature=0.9, top_p=0.8, seed=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("draws")
    options = {**SMALL, "num_key_value_heads": 1, "num_hidden_layers": 1}
    return packed_copy(make_pair(folder / "dense", "llama", **options).folder, folder / "w", Scheme(4, 32))


@pytest.fixture
def model(folder: Path, triton_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Any:
    """On a GPU with real graphs; under the interpreter with what stands in for them, and smaller tiles and chunks."""
    if triton_device.type == "cpu":
        monkeypatch.setattr(attention, "CHUNK", 64)
        monkeypatch.setattr(triton_frame, "TILES", (1, 2, 5, 8, 64))
        monkeypatch.setattr(sampling, "_BLOCK", 64)
    with torch.device("cpu"):
        made = load_triton_decoder(folder, ModelConfig.load(folder), triton_device, torch.float32)
        if triton_device.type == "cpu":
            made._graphs = Capturing()
        yield made


def on_its_way(draft: Draft, capacity: int, max_depth: int, device: torch.device) -> PendingDraft:
    n, scores = len(draft), torch.tensor(draft.scores, dtype=torch.float32).view(torch.int32).tolist()
    padding = capacity - n
    words = [n, *draft.tokens, *[0] * padding, *draft.parents, *[-1] * padding, *scores, *[0] * padding]
    return PendingDraft(torch.tensor(words, dtype=torch.int32).to(device), capacity, max_depth, "device")


def test_graphs_draw_from_a_draft_that_the_host_has_not_seen(model: TritonDecoder) -> None:
    """Launched, captured and replayed: logits, taps and draws have the bits of the same draft known beforehand, and
    every replay draws with the key, temperature and place of its own."""
    assert isinstance(model, DrawingModel)
    layout, lag, text = Layout.of(model.vocab_size, 2, False), 2, text_of(9)
    hidden = on_its_way(TREE, 6, 3, model.device)
    known = [*range(-1, lag - 1), *(lag + parent for parent in TREE.parents)]
    for cached, draw in ((3, Draw()), (5, Draw(Stream(1).key, 0.7)), (6, Draw(Stream(2).key, 1.2))):
        cache, fed = prefilled(model, text[:cached], 16), text[cached : cached + lag]
        batch = Batch.of([((*fed, *TREE.tokens), known)], [cached], [len(TREE) + 1])
        logits = model.forward(batch, [cache]).logits
        positions = torch.tensor([cached + lag + depth for depth in (0, *TREE.depths())], dtype=torch.int32)
        expected = sampling.draw(logits, dials_of(draw, 6, model.device), positions.to(model.device), layout)
        standing_in = [*range(-1, lag - 1), *(lag - 1 for _ in range(hidden.capacity))]
        unseen = Batch.of([((*fed, *hidden.tokens), standing_in)], [cached], [hidden.capacity + 1])
        output = model.draw(unseen, [cache], ("norm",), Drawing([draw], layout, {0: hidden}))
        assert torch.equal(output.logits[:6], logits)
        assert output.draws is not None
        assert torch.equal(output.draws[:6], expected)
        storage = cache.storage
        del cache  # leaves its graphs to the next
    assert storage.graphs[8, ("norm",), layout] is not None, "nothing was captured"


def dials_of(draw: Draw, n: int, device: torch.device) -> sampling.Dials:
    keys = torch.from_numpy(np.full(n, draw.key or 0, np.uint64).view(np.int64))
    noisy = torch.full((n,), draw.key is not None, dtype=torch.int32)
    return sampling.Dials(keys.to(device), torch.full((n,), draw.temperature).to(device), noisy.to(device))


class Adversary(NoDrafter):
    """Half right with every draft, of which the host sees nothing, or everything."""

    name, needs = "adversary", Needs(("norm",), 1)

    def __init__(self, text: Sequence[int], device: torch.device | None) -> None:
        self.text, self.device, self.accepted = text, device, 0

    def propose(self, states: Sequence[None], views: Sequence[View], budgets: Sequence[Budget]) -> list[Proposal]:
        return [self._draft(view) for view in views]

    def _draft(self, view: View) -> Proposal:
        at = len(view.tokens)
        right = self.text[at : at + min(2, view.remaining - 1)]
        if not right:
            return Draft()
        wrong = [(token + 1) % 160 for token in right]
        parents = (-1, *range(len(right) - 1))
        below = [len(right) + parent if parent >= 0 else -1 for parent in parents]
        draft = Draft((*wrong, *right), (*parents, *below), (0.5,) * 2 * len(right), ("device",) * 2 * len(right))
        return draft if self.device is None else on_its_way(draft, 4, len(right), self.device)

    def observe(self, state: None, verdict: Any) -> None:
        self.accepted += len(verdict.path)


class Waits(TorchDispatchMode):
    """Counts what would make the host wait for a device: numbers read from a tensor, and shapes that depend on one."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        waits = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal")
        self.count += func._schema.name.removeprefix("aten::").split(".")[0] in waits
        return func(*args, **(kwargs or {}))


def run(model: Any, params: SamplingParams, drafter: Adversary | NoDrafter, steps: list[int] | None = None) -> Session:
    """A text by ``core.step``; ``steps`` gets the number of waits that no copy to the host accounts for."""
    prompt, verifier = tuple(text_of(3)), Verifier(model)
    chain = WarpChain(params, prompt)
    session = verifier.open(prompt, chain, Stream.of(prompt, 0, 1), frozenset(), params.max_new_tokens, 4)
    while session.finish is None:
        with Waits() as waits:
            step([session], [None], drafter, verifier, [Budget(4, 2)], notice=pytest.fail)
        if steps is not None:
            steps.append(waits.count)
    return session


class HostOnly:
    """The same model, as one that does not draw."""

    def __init__(self, model: TritonDecoder) -> None:
        for name in ("vocab_size", "max_positions", "row_invariant", "new_cache", "forward"):
            setattr(self, name, getattr(model, name))


@pytest.mark.parametrize("params", [GREEDY, WARM, TOP_P], ids=["greedy", "sampled", "top-p"])
def test_a_step_is_one_copy_to_the_host(
    model: TritonDecoder, params: SamplingParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the text is the host's own, whatever was drafted, and whether the host has seen it or not."""
    plain = run(HostOnly(model), params, NoDrafter()).tokens
    to_host, copies = on_device._to_host, []
    monkeypatch.setattr(on_device, "_to_host", lambda tensors: copies.append(len(tensors)) or to_host(tensors))
    for device in (model.device, *([None] if params is WARM else [])):
        drafter, steps = Adversary(plain, device), list[int]()
        copies.clear()
        assert run(model, params, drafter, steps).tokens == plain
        assert drafter.accepted >= 4
        assert steps == [0] * len(copies), "a step waited elsewhere"
        assert max(copies) == (1 if device is None else 2), "tables, and drafts with them"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_torch_sees_one_wait_a_step(model: TritonDecoder) -> None:
    import warnings

    plain = run(model, WARM, NoDrafter()).tokens
    run(model, WARM, Adversary(plain, model.device))  # launched and captured
    prompt, verifier, drafter = tuple(text_of(3)), Verifier(model), Adversary(plain, model.device)
    session = verifier.open(prompt, WarpChain(WARM, prompt), Stream.of(prompt, 0, 1), frozenset(), 8, 4)
    step([session], [None], drafter, verifier, [Budget(0, 0)])
    while session.finish is None:
        drafts = drafter.propose([None], [session.view()], [Budget(4, 2)])
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                (verdict,) = verifier.verify([session], drafts, drafter.needs)
                session.commit(verdict)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        assert sum("synchronizing" in str(each.message) for each in seen) == 1
        session.finish = session.finish or ("length" if session.remaining < 3 else None)
