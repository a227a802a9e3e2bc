"""One round: what drafters see, what is cut, what failures cost, what a verdict carries."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pytest
import torch
from table_model import TableModel, generate, target_token

from quantspec.core.drafter import NoDrafter, View
from quantspec.core.noise import Stream
from quantspec.core.sampling import WarpChain
from quantspec.core.session import Session
from quantspec.core.step import step
from quantspec.core.verify import Verifier
from quantspec.errors import UsageError
from quantspec.types import Budget, Draft, Needs, SamplingParams, Verdict

PROMPT = (1, 2, 3)
GREEDY, WARM = SamplingParams(max_new_tokens=20), SamplingParams(max_new_tokens=20, temperature=0.9, top_p=0.9, seed=5)


def open_session(verifier: Verifier, params: SamplingParams, stop_ids: frozenset[int] = frozenset()) -> Session:
    chain = WarpChain(params, PROMPT, stop_ids)
    return verifier.open(PROMPT, chain, Stream.of(PROMPT, 0, params.seed or 0), stop_ids, params.max_new_tokens)


class Scripted(NoDrafter):
    """Drafts what a function of the view says, and keeps what it observes."""

    name = "scripted"

    def __init__(self, draft, needs: Needs | None = None) -> None:
        self.draft = draft
        self.needs = needs or Needs()
        self.observed: list[Verdict] = []

    def propose(self, states: Sequence[None], views: Sequence[View], budgets: Sequence[Budget]) -> list[Draft]:
        return [self.draft(view) for view in views]

    def observe(self, state: None, verdict: Verdict) -> None:
        self.observed.append(verdict)


def right_chain(model: TableModel, length: int):
    def draft(view: View) -> Draft:
        tokens: list[int] = []
        for _ in range(length):
            tokens.append(target_token(model, view, tokens))
        return Draft.chain(tokens, [0.9**i for i in range(length)], [f"stage {i}" for i in range(length)])

    return Scripted(draft)


@pytest.mark.parametrize("params", [GREEDY, WARM])
def test_a_right_chain_is_accepted_whole(params: SamplingParams) -> None:
    model = TableModel(32, 1)
    plain = generate(model, params, PROMPT).tokens
    verifier, drafter = Verifier(model), right_chain(model, 4)
    session = open_session(verifier, params)
    (verdict,) = step([session], [None], drafter, verifier, [Budget(9, 9)])
    assert verdict.path == (0, 1, 2, 3)
    assert verdict.stages == ("stage 0", "stage 1", "stage 2", "stage 3", "target")
    assert verdict.y == verdict.emitted == tuple(plain[3:8])
    assert drafter.observed == [verdict]
    assert session.tokens == plain[:8]
    assert (session.cached, session.lag, session.generated, session.remaining) == (7, 1, 5, 15)


def test_a_draft_ends_where_the_budget_the_limit_or_a_stop_token_does() -> None:
    model = TableModel(32, 1)
    plain = generate(model, GREEDY, PROMPT).tokens
    for params, budget, stop_ids, emitted, finish in (
        (GREEDY, Budget(2, 9), (), 3, None),
        (SamplingParams(max_new_tokens=3), Budget(9, 9), (), 3, "length"),
        (SamplingParams(max_new_tokens=1), Budget(9, 9), (), 1, "length"),
        (GREEDY, Budget(9, 9), (plain[5],), plain[3:].index(plain[5]) + 1, "stop"),
        (SamplingParams(max_new_tokens=3), Budget(9, 9), (plain[5],), 3, "stop"),
    ):
        verifier = Verifier(model)
        session = open_session(verifier, params, frozenset(stop_ids))
        (verdict,) = step([session], [None], right_chain(model, 6), verifier, [budget])
        assert (len(verdict.emitted), verdict.finish, session.finish) == (emitted, finish, finish)
        assert len(verdict.stages) == emitted
        assert session.tokens == plain[: 3 + emitted]
        assert len(verdict.draft) <= min(budget.max_nodes, params.max_new_tokens - 1)


def test_nodes_too_deep_to_count_are_cut_and_their_shallow_siblings_stay() -> None:
    model = TableModel(8, 1)
    verifier = Verifier(model)
    session = open_session(verifier, SamplingParams(max_new_tokens=2))
    draft = Draft((1, 2, 3, 4), (-1, 0, 1, -1), (1.0,) * 4, ("d",) * 4)
    (verdict,) = step([session], [None], Scripted(lambda view: draft), verifier, [Budget(9, 9)])
    assert verdict.draft.tokens == (1, 4)


def test_y_and_top_are_given_for_every_row() -> None:
    model = TableModel(32, 1)
    verifier = Verifier(model)
    tree = Draft((4, 5, 6), (-1, -1, 1), (1.0,) * 3, ("d",) * 3)
    for params in (GREEDY, WARM):
        session = open_session(verifier, params)
        view = session.view()
        (verdict,) = step(
            [session], [None], Scripted(lambda view: tree, Needs(top_k=3)), verifier, [Budget(9, 9)], top_k=2
        )
        paths = [(), (4,), (5,), (5, 6)]
        assert verdict.y == tuple(target_token(model, view, path) for path in paths)
        ids, scores = verdict.top
        assert ids.shape == scores.shape == (4, 3)
        assert tuple(ids[:, 0].tolist()) == verdict.y, "the best of a row is the draw itself"
        logits = torch.stack([model.row((*PROMPT, *path)) for path in paths])
        whole = view.scores(logits, paths)
        # Sums of at most 32 numbers in another order, in fp32.
        torch.testing.assert_close(scores, whole.topk(3).values, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(scores, whole.gather(1, ids.long()), rtol=1e-5, atol=1e-6)
        best_ids, best_scores = view.best(logits, paths, 3)
        assert (best_ids.tolist(), best_scores.tolist()) == (ids.tolist(), scores.tolist())


def test_chain_only_caches_get_the_best_chain() -> None:
    draft = Draft((1, 2, 3, 4, 5), (-1, -1, 1, 1, 0), (0.3, 0.6, 0.1, 0.5, 0.29), tuple("abcde"))
    chain = draft.best_chain()
    assert (chain.tokens, chain.is_chain, chain.stages) == ((2, 4), True, ("b", "d"))
    verifier = Verifier(TableModel(8, 1, chains_only=True))
    session = open_session(verifier, GREEDY)
    (verdict,) = step([session], [None], Scripted(lambda view: draft), verifier, [Budget(9, 9)])
    assert verdict.draft == chain


@pytest.mark.parametrize(
    "draft",
    [lambda view: 1 / 0, lambda view: Draft.chain([99], [1.0], ["d"]), lambda view: Draft.chain([-2], [1.0], ["d"])],
)
def test_a_drafter_that_fails_costs_one_line_and_no_token(draft) -> None:
    model = TableModel(8, 1)
    plain = generate(model, GREEDY, PROMPT).tokens
    verifier, lines = Verifier(model), []
    session = open_session(verifier, GREEDY)
    while session.finish is None:
        (verdict,) = step([session], [None], Scripted(draft), verifier, [Budget(9, 9)], notice=lines.append)
        assert len(verdict.draft) == 0
    assert session.tokens == plain
    assert set(lines) == {lines[0]}
    assert lines[0].startswith("drafter scripted failed, continuing without it: ")


def test_a_failing_observe_is_reported_too_and_warnings_are_the_default() -> None:
    class Deaf(NoDrafter):
        def observe(self, state: None, verdict: Verdict) -> None:
            raise RuntimeError("no")

    verifier = Verifier(TableModel(8, 1))
    session = open_session(verifier, GREEDY)
    before = len(session.tokens)
    with pytest.warns(RuntimeWarning, match="drafter none failed, continuing without it: RuntimeError: no"):
        step([session], [None], Deaf(), verifier, [Budget(0, 0)])
    assert len(session.tokens) == before + 1


def test_view_scores() -> None:
    model = TableModel(16, 3)
    logits = torch.stack([model.row((*PROMPT, 5)), model.row((*PROMPT, 6, 7))])
    paths, ids = [(5,), (6, 7)], torch.tensor([2, 3, 5, 11, 15])
    for params in (GREEDY, WARM):
        session = open_session(Verifier(model), params)
        view = session.view()
        warped = view.chain.apply_rows([view.state] * 2, logits)
        noise = torch.tensor([session.stream.noise(t, 16).tolist() for t in (4, 5)]) if params is WARM else 0.0
        expected = torch.log_softmax((warped - noise) / 0.7, -1)
        assert view.scores(logits, paths, tau=0.7).equal(expected)
        trimmed = view.scores(logits[:, ids], paths, ids, tau=0.7)
        wide = torch.full((2, 16), -math.inf)
        wide[:, ids] = logits[:, ids]
        assert trimmed.equal(view.scores(wide, paths, tau=0.7)[:, ids])
    hidden = open_session(Verifier(model, rule="ratio"), WARM).view()
    assert hidden.stream is None
    assert hidden.draft_stream is not None
    assert hidden.scores(logits, paths, tau=0.7).equal(
        torch.log_softmax(hidden.chain.apply_rows([hidden.state] * 2, logits), -1)
    )


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.0},
        {"temperature": 0.8},
        {"temperature": 0.8, "top_p": 0.7},
        {"temperature": 1.2, "top_k": 5, "min_p": 0.01},
        {"temperature": 0.8, "logit_bias": {3: -2.0}},
        {"temperature": 0.0, "repetition_penalty": 1.3},
    ],
)
@pytest.mark.parametrize("rule", ["exact", "ratio"])
def test_a_trimmed_vocabulary_races_as_on_the_whole_one(
    options: dict[str, Any], rule: Literal["exact", "ratio"]
) -> None:
    if rule == "ratio" and not options["temperature"]:
        rule = "exact"
    ids = torch.tensor([2, 3, 5, 7, 11, 12, 14, 15])
    view = open_session(Verifier(TableModel(16, 3), rule=rule), SamplingParams(**options)).view()
    logits = 3 * torch.randn(3, len(ids), generator=torch.Generator().manual_seed(4))
    logits[1, 2] = logits[1, 6] = 9.0  # a tie goes to the lower id
    paths = [(5,), (6, 7), (2, 2)]
    wide = torch.full((3, 16), -math.inf)
    wide[:, ids] = logits
    for k in (1, 4, 8, 9):  # 9 are more than there are
        tokens, scores = view.best(logits, paths, k, 0.6, ids)
        expected_tokens, expected = view.best(wide, paths, k, 0.6)
        live = np.isfinite(expected)
        assert (np.isfinite(scores) == live).all()
        assert (tokens == expected_tokens)[live].all()
        np.testing.assert_allclose(scores[live], expected[live], rtol=0, atol=1e-6)  # sums in another order, in fp32


def test_logprobs_are_raw_and_belong_to_emitted_tokens() -> None:
    model = TableModel(16, 3)
    params = SamplingParams(max_new_tokens=6, temperature=0.7, top_k=2, logprobs=3, logit_bias={4: -50.0})
    verifier = Verifier(model)
    session = open_session(verifier, params)
    (verdict,) = step([session], [None], right_chain(model, 3), verifier, [Budget(9, 9)])
    assert [entry.token for entry in verdict.logprobs] == list(verdict.emitted)
    for i, entry in enumerate(verdict.logprobs):
        raw = torch.log_softmax(model.row((*PROMPT, *verdict.emitted[:i])), -1)
        assert entry.logprob == pytest.approx(float(raw[entry.token]), abs=1e-6)  # an fp32 rounding
        assert [token for token, _ in entry.top] == raw.topk(3).indices.tolist()


def test_labels() -> None:
    model = TableModel(8, 1)
    assert Verifier(model).exactness == "exact"
    assert Verifier(model, rule="ratio").exactness == "exact_distribution"
    model.row_invariant = False
    assert Verifier(model).exactness == "exact_to_rounding"


def test_refusals() -> None:
    verifier = Verifier(TableModel(8, 1, max_positions=10))
    chain = WarpChain(GREEDY, PROMPT)
    with pytest.raises(
        UsageError, match="3 prompt tokens and 8 new ones do not fit the model's context of 10"
    ) as refused:
        verifier.open(PROMPT, chain, Stream(0), max_new_tokens=8)
    assert refused.value.hint == "ask for at most 7 new tokens"
    with pytest.raises(UsageError, match="12 prompt tokens") as refused:
        verifier.open((1,) * 12, chain, Stream(0), max_new_tokens=1)
    assert refused.value.hint == "shorten the prompt"
    with pytest.raises(UsageError, match="prompt is empty"):
        verifier.open((), chain, Stream(0), max_new_tokens=1)
    with pytest.raises(UsageError, match="token 8"):
        verifier.open(PROMPT, WarpChain(GREEDY, PROMPT, frozenset({8})), Stream(0), max_new_tokens=1)
    ratio = Verifier(TableModel(8, 1), rule="ratio")
    tree = Draft((1, 2), (-1, -1), (1.0, 1.0), ("d", "d"))
    with pytest.raises(UsageError, match="chains"):
        step([open_session(ratio, WARM)], [None], Scripted(lambda view: tree), ratio, [Budget(9, 9)])


def test_our_own_mistakes_are_asserted() -> None:
    verifier = Verifier(TableModel(8, 1))
    session = open_session(verifier, SamplingParams(max_new_tokens=1))
    with pytest.raises(AssertionError, match="confirmed tokens"):
        session.truncate(2)
    step([session], [None], NoDrafter(), verifier, [Budget(0, 0)])
    assert session.finish == "length"
    with pytest.raises(AssertionError, match="finished sequence"):
        step([session], [None], NoDrafter(), verifier, [Budget(0, 0)])
    session.truncate(3)
    assert session.finish is None, "what an outer level takes back is not over"
