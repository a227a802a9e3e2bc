"""EAGLE on Triton's kernels, under their interpreter where there is no GPU: the trees of ``Eagle``, whole drafts that
wait for nothing, and what captured graphs must not change."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tiny_eagle import HIDDEN, VOCAB, save_family

from quantspec.core.drafter import TargetParts, View
from quantspec.core.noise import Stream
from quantspec.core.sampling import WarpChain
from quantspec.drafters.config import EagleOptions
from quantspec.drafters.eagle import Eagle
from quantspec.models.config import ModelConfig
from quantspec.models.load import load_model
from quantspec.types import EMPTY_DRAFT, Budget, Draft, PendingDraft, SamplingParams, Verdict

pytest.importorskip("triton", reason="triton is not installed")

from quantspec.drafters import eagle_triton
from quantspec.drafters.eagle_triton import TritonEagle
from quantspec.kernels.triton import attention
from quantspec.models import triton_frame
from quantspec.models.load_triton import load_triton_decoder
from quantspec.models.triton_graphs import Graphs

FULL, SHORT = EagleOptions(top_k=3, depth=3), EagleOptions(top_k=3, depth=1)
PARAMS: dict[str, SamplingParams] = {
    "greedy": SamplingParams(),
    "warm": SamplingParams(temperature=0.8),
    "truncated": SamplingParams(temperature=1.1, top_p=0.7, top_k=20, min_p=0.01),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return save_family(tmp_path_factory.mktemp("eagle"))


@pytest.fixture
def device(triton_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    if triton_device.type == "cpu":
        monkeypatch.setattr(attention, "CHUNK", 64)
        monkeypatch.setattr(TritonEagle, "_flaw", lambda drafter: None)  # a test of its own: each takes seconds here
        monkeypatch.setattr(triton_frame, "TILES", (1, 4, 9))
    with torch.device("cpu"):
        yield triton_device


class Pair:
    """A drafter on the device and ``Eagle``, fed alike."""

    def __init__(
        self, folders: dict[str, Any], device: torch.device, params: SamplingParams, length: int, options: EagleOptions
    ) -> None:
        folder, self.params, self.device = folders["target"], params, device
        model = load_triton_decoder(folder, ModelConfig.load(folder), device, torch.float32)
        self.drafters = TritonEagle(folders["head"], options), Eagle(folders["head"], options)
        self.drafters[0].prepare(TargetParts(model))
        self.drafters[1].prepare(TargetParts(load_model(folder)))
        self.generator = torch.Generator().manual_seed(3)
        self.tokens = torch.randint(VOCAB, (64,), generator=self.generator).tolist()
        self.known = 0
        self.states = [drafter.open(self.view(length)) for drafter in self.drafters]
        self.observe(length)

    def view(self, known: int, remaining: int = 20, stop_ids: frozenset[int] = frozenset()) -> View:
        chain = WarpChain(self.params, self.tokens[:1], stop_ids)
        text = tuple(self.tokens[: known + 1])
        state = chain.at(text[1:])
        return View(text, 1, chain, state, Stream(2**64 - 5), stop_ids, remaining, VOCAB)

    def observe(self, count: int) -> None:
        features = torch.randn(count, HIDDEN, generator=self.generator)
        for drafter, state, device in zip(self.drafters, self.states, (self.device, "cpu"), strict=True):
            drafter.observe(state, Verdict((), (), 0, (0,), (), taps={"norm": features.to(device)}))
        self.known += count

    def truncate(self, length: int) -> None:
        for drafter, state in zip(self.drafters, self.states, strict=True):
            drafter.truncate(state, length)
        self.known = length

    def finalize(self, length: int) -> None:
        for drafter, state in zip(self.drafters, self.states, strict=True):
            drafter.finalize(state, length)

    def propose(self, budget: Budget, **view: Any) -> tuple[Any, Any]:
        views = [self.view(self.known, **view)]
        found, expected = (
            drafter.propose([state], views, [budget])[0]
            for drafter, state in zip(self.drafters, self.states, strict=True)
        )
        return found, expected

    def check(self, budget: Budget, pending: bool = True, **view: Any) -> Draft:
        found, expected = self.propose(budget, **view)
        assert isinstance(found, PendingDraft if pending else Draft)
        draft = found.resolve() if isinstance(found, PendingDraft) else found
        assert (draft.tokens, draft.parents, draft.stages) == (expected.tokens, expected.parents, expected.stages)
        assert draft.scores == pytest.approx(expected.scores, rel=1e-4)  # sums over keys in another order, in fp32
        return draft


@pytest.mark.parametrize("name", PARAMS)
def test_trees_are_those_of_the_host(folders: dict[str, Any], device: torch.device, name: str) -> None:
    """Step after step, with what came in between: more tokens, a rejection by an outer level, a confirmation."""
    pair = Pair(folders, device, PARAMS[name], 7, FULL)
    assert max(pair.check(Budget(8, 9)).depths()) >= 2
    pair.observe(3)
    pair.finalize(6)
    pair.truncate(7)
    pair.tokens[7:] = [token ^ 1 for token in pair.tokens[7:]]
    pair.check(Budget(5, 2))
    pair.observe(2)
    pair.check(Budget(8, 9, min_score=0.05), remaining=3)
    for drafter, state in zip(pair.drafters, pair.states, strict=True):
        drafter.close(state)


def test_a_prompt_longer_than_the_tiles(folders: dict[str, Any], device: torch.device) -> None:
    pair = Pair(folders, device, PARAMS["greedy"], 70 if device.type == "cuda" else 11, SHORT)
    assert pair.check(Budget(6, 9))


def test_nothing_follows_the_end_of_the_text(folders: dict[str, Any], device: torch.device) -> None:
    pair = Pair(folders, device, PARAMS["greedy"], 3, EagleOptions(top_k=2, depth=2))
    free = pair.check(Budget(8, 9))
    ended = pair.check(Budget(8, 9), stop_ids=frozenset({free.tokens[0]}))
    assert 0 in free.parents
    assert 0 not in ended.parents


def test_a_lag_and_a_budget_of_nothing_give_empty_drafts(folders: dict[str, Any], device: torch.device) -> None:
    pair = Pair(folders, device, PARAMS["greedy"], 3, SHORT)
    assert pair.propose(Budget(0, 9)) == (EMPTY_DRAFT, EMPTY_DRAFT)
    assert pair.propose(Budget(8, 9), remaining=1) == (EMPTY_DRAFT, EMPTY_DRAFT)
    pair.known += 1
    drafts = pair.propose(Budget(8, 9))
    assert drafts[0] == EMPTY_DRAFT, "its graph begins with true features"
    assert len(drafts[1]) > 0, "the host guesses what is missing"


@pytest.mark.parametrize(
    "params", [SamplingParams(repetition_penalty=1.3), SamplingParams(temperature=0.9, logit_bias={3: 2.0})]
)
def test_what_needs_the_host_is_grown_there(
    folders: dict[str, Any], device: torch.device, params: SamplingParams
) -> None:
    pair = Pair(folders, device, params, 5, EagleOptions(top_k=2, depth=3))
    pair.observe(2)
    pair.check(Budget(8, 9), pending=False)


@pytest.mark.parametrize("wrong", [None, "scores", "record"])
def test_a_first_tree_is_compared_with_the_hosts(
    folders: dict[str, Any], triton_device: torch.device, monkeypatch: pytest.MonkeyPatch, wrong: str | None
) -> None:
    """One line, and trees from the host, where the device grows others or none."""
    best, lines = eagle_triton.best_children, list[str]()

    def broken(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        tokens, scores = best(*args)
        return (tokens, scores.flip(1)) if wrong == "scores" else (tokens * 0, scores)

    if wrong:
        monkeypatch.setattr(eagle_triton, "best_children", broken)
    with torch.device("cpu"):
        model = load_triton_decoder(
            folders["target"], ModelConfig.load(folders["target"]), triton_device, torch.float32
        )
        drafter = TritonEagle(folders["head"], EagleOptions(top_k=2, depth=2), lines.append)
        drafter.prepare(TargetParts(model))
    assert drafter._grows == (wrong is None)
    assert len(lines) == (wrong is not None)


class Capturing(Graphs):
    """In place of a CUDA graph, its contract: it runs the same launches on what its inputs hold now."""

    def __init__(self, error: RuntimeError | None = None) -> None:
        super().__init__(torch.device("cpu"))
        self.usable, self.error, self.captured = True, error, 0

    def _capture(self, run: Callable[[], Any]) -> Callable[[], Any]:
        if self.error is not None:
            raise self.error
        self.captured += 1
        return run


def test_one_graph_serves_all_lengths_and_the_next_sequence(folders: dict[str, Any], device: torch.device) -> None:
    if device.type == "cuda":
        pytest.skip("graphs are real here")
    pair = Pair(folders, device, PARAMS["warm"], 3, SHORT)
    pair.drafters[0]._graphs = graphs = Capturing()
    for _ in range(3):
        pair.check(Budget(6, 9))
        pair.observe(2)
    assert graphs.captured == 1
    pair.drafters[0].close(pair.states[0])
    pair.states = [drafter.open(pair.view(3)) for drafter in pair.drafters]
    pair.known = 0
    pair.observe(4)
    pair.check(Budget(6, 9))
    assert graphs.captured == 1


def test_no_memory_to_capture(folders: dict[str, Any], device: torch.device) -> None:
    """The drafts are the same, and one line says so."""
    if device.type == "cuda":
        pytest.skip("graphs are real here")
    pair, lines = Pair(folders, device, PARAMS["greedy"], 3, SHORT), list[str]()
    pair.drafters[0]._graphs, pair.drafters[0]._notice = Capturing(torch.OutOfMemoryError("")), lines.append
    for _ in range(3):
        pair.check(Budget(6, 9))
    assert len(lines) == 1
    assert "no memory" in lines[0]


def test_a_draft_waits_for_nothing(folders: dict[str, Any], device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("needs a GPU")
    pair = Pair(folders, device, PARAMS["truncated"], 7, FULL)
    for _ in range(3):
        pair.propose(Budget(8, 9))
    torch.cuda.set_sync_debug_mode("error")
    try:
        drafter, state = pair.drafters[0], pair.states[0]
        drafts = drafter.propose([state], [pair.view(pair.known)], [Budget(8, 9)])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [type(draft) for draft in drafts] == [PendingDraft]
