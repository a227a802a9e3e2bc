"""A model that draws: the same text as on the host's way, from drafts that nobody has seen, in one copy a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from table_model import RandomDrafter, TableModel, generate, target_token

from quantspec.core import on_device
from quantspec.core.drafter import NoDrafter, View
from quantspec.core.noise import Stream
from quantspec.core.sampling import WarpChain
from quantspec.core.step import step
from quantspec.core.truncation import truncate
from quantspec.core.verify import Verifier
from quantspec.errors import ModelError
from quantspec.kernels import draws
from quantspec.kernels.draws import Layout
from quantspec.models.base import Cache, Drawing, DrawingModel, Output
from quantspec.types import Batch, Budget, Draft, Needs, PendingDraft, SamplingParams, Tap, Verdict

pytest.importorskip("triton", reason="triton is not installed")

from quantspec.kernels.triton import sampling
from quantspec.models.triton_frame import Frame

pytestmark = [pytest.mark.usefixtures("host_device"), pytest.mark.filterwarnings("ignore::RuntimeWarning")]

PROMPT = (1, 2, 3)
VOCAB = 40
PARAMS = {
    "greedy": SamplingParams(max_new_tokens=10),
    "sampled": SamplingParams(max_new_tokens=10, temperature=0.7, seed=3),
    "top-k": SamplingParams(max_new_tokens=10, temperature=1.1, top_k=6, seed=4),
    "top-p": SamplingParams(max_new_tokens=10, temperature=0.9, top_p=0.8, seed=5),
    "min-p": SamplingParams(max_new_tokens=10, temperature=1.3, min_p=0.1, seed=6),
    "all": SamplingParams(max_new_tokens=10, temperature=0.8, top_k=12, top_p=0.9, min_p=0.02, seed=7),
    "penalties": SamplingParams(max_new_tokens=10, temperature=0.8, repetition_penalty=1.3, seed=8),
    "masks": SamplingParams(max_new_tokens=10, min_new_tokens=6, temperature=0.8, seed=9),
    "bias": SamplingParams(max_new_tokens=10, temperature=0.8, logit_bias={7: 2.0}, seed=10),
}
ON_HOST = ("penalties", "masks", "bias")


@pytest.fixture
def host_device(triton_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    if triton_device.type != "cpu":
        pytest.skip("the interpreter's job: tables of logits are made on the host")
    monkeypatch.setattr(sampling, "_BLOCK", 32)  # rows of two blocks


class DrawingTable(TableModel):
    """The table model with the kernel's draws. What it is asked to graft it reads off its own batch's frame."""

    draws = 0
    pending = 0

    def draw(self, batch: Batch, caches: Sequence[Cache], taps: Sequence[Tap], drawing: Drawing) -> Output:
        self.draws += 1
        self.pending += len(drawing.pending)
        batch = _known(batch, drawing)
        output = self.forward(batch, caches, taps)
        frame, starts = Frame(np.diff(batch.seq_starts).tolist(), torch.device("cpu")), batch.seq_starts
        frame.fill(batch.tokens, [batch.parents[a:b] for a, b in pairwise(starts)], batch.cached, drawing.draws)
        ends = zip(starts[1:], batch.num_logits, strict=True)
        rows = torch.tensor([row for end, n in ends for row in range(end - n, end)])
        dials, positions = frame.dials.select(rows), frame.positions()[rows].clone()
        return replace(output, draws=sampling.draw(output.logits, dials, positions, drawing.layout))


def _known(batch: Batch, drawing: Drawing) -> Batch:
    """The batch with drafts in place of what stands in for them."""
    rows = []
    for s, (start, end) in enumerate(pairwise(batch.seq_starts)):
        tokens, parents = list(batch.tokens[start:end]), list(batch.parents[start:end])
        if s in drawing.pending:
            pending = drawing.pending[s]
            lag = end - start - pending.capacity
            assert tokens[lag:] == [0] * pending.capacity
            record = pending.record.tolist()
            tokens[lag:] = record[1 : 1 + pending.capacity]
            parents[lag:] = [lag + parent for parent in record[1 + pending.capacity : 1 + 2 * pending.capacity]]
        rows.append((tokens, parents))
    return Batch.of(rows, batch.cached, batch.num_logits)


def pending(draft: Draft, capacity: int, max_depth: int) -> PendingDraft:
    n = len(draft)
    record = torch.zeros(1 + 3 * capacity, dtype=torch.int32)
    record[1 + capacity : 1 + 2 * capacity] = -1
    record[0] = n
    record[1 : 1 + n] = torch.tensor(draft.tokens)
    record[1 + capacity : 1 + capacity + n] = torch.tensor(draft.parents)
    record[1 + 2 * capacity : 1 + 2 * capacity + n] = torch.tensor(draft.scores).view(torch.int32)
    return PendingDraft(record, capacity, max_depth, "device")


class Unseen(RandomDrafter):
    """Random trees that stay on the device."""

    def propose(self, states: Sequence[None], views: Sequence[View], budgets: Sequence[Budget]) -> list[PendingDraft]:
        drafts = super().propose(states, views, budgets)
        return [
            pending(draft, 9, min(9, max([1, *draft.depths()]), max(1, view.remaining - 1)) if len(draft) else 1)
            for draft, view in zip(drafts, views, strict=True)
        ]


def test_records_become_drafts() -> None:
    draft = Draft((4, 5, 6), (-1, -1, 1), (0.5, 0.25, 0.125), ("device",) * 3)
    for capacity in (3, 5):
        assert pending(draft, capacity, 2).resolve() == draft
    assert pending(Draft(), 4, 2).resolve() == Draft()
    twins = PendingDraft(torch.tensor([2, 3, 3, -1, -1, 0, 0], dtype=torch.int32), 2, 1, "device")
    with pytest.raises(AssertionError, match="siblings"):
        twins.resolve()


@pytest.mark.parametrize(
    "name,most", [*((name, 256) for name in PARAMS), ("top-k", 3), ("top-p", 8), ("min-p", 3), ("all", 8)]
)
def test_the_text_of_the_host(name: str, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever drafts, seen or not, and whether the candidates settle a truncation or the whole row is asked for."""
    monkeypatch.setattr(draws, "MOST_CANDIDATES", most)
    params, stops = PARAMS[name], frozenset({5}) if name == "masks" else frozenset()
    plain = generate(TableModel(VOCAB, 1), params, PROMPT, stop_ids=stops).tokens
    for drafter in (NoDrafter(), *(kind(TableModel(VOCAB, 1), 2, knows=0.8) for kind in (RandomDrafter, Unseen))):
        model = DrawingTable(VOCAB, 1)
        assert isinstance(model, DrawingModel)
        assert generate(model, params, PROMPT, drafter, stop_ids=stops).tokens == plain
        assert (model.draws == 0) == (name in ON_HOST)
        if isinstance(drafter, RandomDrafter):
            assert drafter.accepted > 0
            assert (model.pending > 0) == (isinstance(drafter, Unseen) and name not in ON_HOST)


def test_candidates_settle_most_rows_and_never_wrongly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draws, "MOST_CANDIDATES", 16)
    generator, settled = torch.Generator().manual_seed(0), 0
    for case in range(60):
        # Few distinct values: ties within the candidates, at the cut, and at their end.
        logits = torch.randint(0, 6 if case % 2 else 600, (3, 70), generator=generator).float() / (1 + case % 4)
        params = SamplingParams(
            temperature=0.5, top_k=(0, 5, 20)[case % 3], top_p=(1.0, 0.6)[case % 2], min_p=(0.0, 0.05)[case // 2 % 2]
        )
        chain, stream = WarpChain(params, PROMPT), Stream(9)
        if not chain.drawn(stream).truncates:
            continue
        layout = Layout.of(70, 1, True)
        dials = sampling.Dials(torch.zeros(3, dtype=torch.int64), torch.full((3,), 0.5), torch.zeros(3).int())
        drawn = draws.Drawn.read(sampling.draw(logits, dials, torch.zeros(3).int(), layout).numpy(), layout)
        cut = (params.top_k, params.top_p, params.min_p)
        expected = truncate(logits.numpy() / np.float32(0.5), *cut, total=drawn.mass)
        found = chain.drawn_race(drawn, logits, [4, 5, 6], stream).kept
        assert np.array_equal(found.ids, expected.ids)
        assert np.array_equal(found.count, expected.count)
        noise = stream.noise_at([4, 5, 6], expected.count, expected.ids)
        assert np.array_equal(found.values, expected.values - noise)
        with monkeypatch.context() as patch:
            patch.setattr("quantspec.core.sampling._host", lambda rows: pytest.fail("asked for the whole row"))
            try:
                chain.drawn_race(drawn, logits, [4, 5, 6], stream)
                settled += 1
            except pytest.fail.Exception:
                pass
    assert settled > 15


def test_runners_up_are_those_of_the_host() -> None:
    tree = Draft((4, 5, 6), (-1, -1, 1), (1.0,) * 3, ("d",) * 3)
    for params in (PARAMS["greedy"], PARAMS["sampled"], PARAMS["top-p"]):
        for k in (1, 2, 8, VOCAB):
            models = TableModel(VOCAB, 1), DrawingTable(VOCAB, 1)
            found = [verdict_of(model, params, tree, Needs(top_k=k)) for model in models]
            assert found[0].y == found[1].y
            (ids, scores), (drawn_ids, drawn_scores) = (verdict.top for verdict in found)
            finite = scores > -torch.inf
            assert torch.equal(ids[finite], drawn_ids[finite])
            # Sums of at most 40 numbers in another order.
            torch.testing.assert_close(drawn_scores[finite], scores[finite], rtol=1e-5, atol=1e-6)


def verdict_of(model: TableModel, params: SamplingParams, draft: Draft | PendingDraft, needs: Needs) -> Verdict:
    verifier = Verifier(model)
    session = verifier.open(PROMPT, WarpChain(params, PROMPT), Stream(5), frozenset(), 24)
    (verdict,) = verifier.verify([session], [draft], needs)
    return verdict


def test_a_verdict_has_a_plain_draft_and_its_rows() -> None:
    draft = Draft((4, 5, 6), (-1, -1, 1), (0.5, 0.25, 0.125), ("device",) * 3)
    needs, params = Needs(("norm",), 2), PARAMS["sampled"]
    seen, unseen = (
        verdict_of(DrawingTable(VOCAB, 1), params, each, needs) for each in (draft, pending(draft, 7, 2))
    )  # fmt: skip
    assert unseen.draft == draft
    assert (unseen.y, unseen.path, unseen.stages) == (seen.y, seen.path, seen.stages)
    assert torch.equal(unseen.taps["norm"], seen.taps["norm"])
    assert torch.equal(unseen.top[1], seen.top[1])


def test_logprobs_are_those_of_the_host() -> None:
    params = replace(PARAMS["sampled"], logprobs=3)
    found = [verdict_of(model, params, Draft(), Needs()) for model in (TableModel(VOCAB, 1), DrawingTable(VOCAB, 1))]
    assert found[0].logprobs == found[1].logprobs != ()


def test_a_batch_of_all_kinds_ends_in_one_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences with and without drafts, known and not, drawn here and there; each as alone."""
    copies = []
    to_host = on_device._to_host
    monkeypatch.setattr(on_device, "_to_host", lambda tensors: copies.append(len(tensors)) or to_host(tensors))
    names = ("greedy", "sampled", "penalties", "top-p", "sampled")
    known = Draft((4, 5), (-1, 0), (0.5, 0.25), ("d",) * 2)
    drafts = (pending(known, 4, 2), known, known, pending(known, 2, 2), pending(Draft(), 3, 1))
    model = DrawingTable(VOCAB, 1)
    verifier = Verifier(model)
    sessions = [
        verifier.open(PROMPT, WarpChain(PARAMS[name], PROMPT), Stream(s), frozenset(), 24)
        for s, name in enumerate(names)
    ]
    verdicts = verifier.verify(sessions, drafts, Needs(("norm",)))
    assert (copies, model.draws, model.pending) == ([4], 1, 3)
    for name, draft, stream, verdict in zip(names, drafts, map(Stream, range(5)), verdicts, strict=True):
        plain = draft.resolve() if isinstance(draft, PendingDraft) else draft
        alone = Verifier(TableModel(VOCAB, 1))
        session = alone.open(PROMPT, WarpChain(PARAMS[name], PROMPT), stream, frozenset(), 24)
        (expected,) = alone.verify([session], [plain], Needs(("norm",)))
        assert (verdict.y, verdict.path, verdict.draft) == (expected.y, expected.path, plain)
        assert torch.equal(verdict.taps["norm"], expected.taps["norm"])


def test_drafts_that_do_not_fit_are_brought_to_the_host_and_cut() -> None:
    right = TableModel(VOCAB, 1)

    class Chains(NoDrafter):
        name = "chains"

        def propose(self, states: object, views: Sequence[View], budgets: object) -> list[PendingDraft]:
            tokens: list[int] = []
            for _ in range(5):
                tokens.append(target_token(right, views[0], tokens))
            return [pending(Draft.chain(tokens, [0.5] * 5, ["device"] * 5), 5, 5)]

    for budget, max_new, taken, on_the_device in ((5, 24, 6, 1), (3, 24, 4, 0), (9, 4, 4, 0)):
        model = DrawingTable(VOCAB, 1)
        verifier, params = Verifier(model), replace(PARAMS["sampled"], max_new_tokens=max_new)
        session = verifier.open(PROMPT, WarpChain(params, PROMPT), Stream(5), frozenset(), max_new)
        (verdict,) = step([session], [None], Chains(), verifier, [Budget(budget, budget)], notice=pytest.fail)
        assert (len(verdict.emitted), model.pending) == (taken, on_the_device)


def test_models_and_rules_that_do_not_draw_resolve() -> None:
    draft = pending(Draft.chain([4, 5], [0.5, 0.25], ["device"] * 2), 3, 2)
    for model, rule in ((TableModel(VOCAB, 1), "exact"), (DrawingTable(VOCAB, 1), "ratio")):
        verifier = Verifier(model, rule=rule)
        session = verifier.open(PROMPT, WarpChain(PARAMS["sampled"], PROMPT), Stream(5), frozenset(), 24)
        (verdict,) = verifier.verify([session], [draft])
        assert verdict.draft.tokens == (4, 5)
    assert model.draws == 0


@pytest.mark.parametrize("name", ["greedy", "sampled", "top-p"])
def test_rows_without_a_maximum_are_refused(name: str) -> None:
    model = DrawingTable(VOCAB, 1)
    model.row = lambda path: torch.full((VOCAB,), torch.nan)
    with pytest.raises(ModelError, match="no finite maximum"):
        verdict_of(model, PARAMS[name], Draft(), Needs())
