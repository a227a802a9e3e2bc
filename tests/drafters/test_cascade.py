import random

import pytest
import torch
from table_model import TableModel

from quantspec.core.drafter import NoDrafter, TargetParts, View
from quantspec.core.noise import Stream
from quantspec.core.sampling import WarpChain
from quantspec.core.verify import Verifier
from quantspec.drafters.cascade import Cascade
from quantspec.drafters.config import CascadeOptions
from quantspec.drafters.draft_model import draft_model
from quantspec.drafters.lookup import PromptLookup
from quantspec.errors import ModelError, UsageError
from quantspec.types import EMPTY_DRAFT, Budget, Draft, Needs, SamplingParams, Verdict

VOCAB = 7


class RandomTrees:
    """Trees of random tokens, and a watch over what a level may rely on: one tap per cached token, in order."""

    needs = Needs(taps=("norm",))
    name = "random"

    def __init__(self, seed: int = 0, empty: float = 0.2) -> None:
        self.random, self.empty = random.Random(seed), empty

    def prepare(self, parts: TargetParts) -> None:
        self.model = parts.model

    def open(self, view) -> list[torch.Tensor]:
        return []

    def propose(self, states, views, budgets) -> list[Draft]:
        return [self._tree(*arguments) for arguments in zip(states, views, budgets, strict=True)]

    def _tree(self, features: list[torch.Tensor], view, budget: Budget) -> Draft:
        # A tap tells its whole path, so features must retrace the text; the last ones suffice, for speed.
        assert len(features) < len(view.tokens)
        for length in range(max(1, len(features) - 2), len(features) + 1):
            assert torch.equal(features[length - 1], self.model.tap("norm", view.tokens[:length]))
        if self.random.random() < self.empty:
            return EMPTY_DRAFT
        size = self.random.randint(1, budget.max_nodes)
        parents = [self.random.randint(-1, i - 1) for i in range(size)]
        tokens = [self.random.randrange(VOCAB) for _ in range(size)]
        return Draft(tuple(tokens), tuple(parents), (1.0,) * size, (self.name,) * size)

    def observe(self, state: list[torch.Tensor], verdict: Verdict) -> None:
        state += verdict.taps["norm"]

    def truncate(self, state: list[torch.Tensor], length: int) -> None:
        del state[length:]

    def finalize(self, state: list[torch.Tensor], length: int) -> None:
        pass

    def close(self, state: list[torch.Tensor]) -> None:
        pass

    def describe(self) -> str:
        return "random trees"


def cascade(model, inner=None, min_draft: int = 5, stage: str = "intermediate", **options) -> Cascade:
    verifier = Verifier(model, stage=stage)
    return Cascade(inner or NoDrafter(), verifier, CascadeOptions(min_draft=min_draft), **options)


PROMPTS = [[seed % VOCAB, seed // VOCAB % VOCAB, (3 * seed) % VOCAB] for seed in range(33)]
SAMPLING = [
    SamplingParams(max_new_tokens=12),
    SamplingParams(max_new_tokens=12, temperature=0.8, top_p=0.95),
    SamplingParams(max_new_tokens=12, temperature=1.2, repetition_penalty=1.3, min_new_tokens=6),
]


# The target itself, a relative, and a stranger; the relative gets the most prompts.
@pytest.mark.parametrize(("noise", "prompts"), [(0.0, 4), (1.0, 33), (30.0, 4)])
@pytest.mark.parametrize("kind", ["draft", "trees", "lookup", "nested", "nested strangers"])
def test_text_is_that_of_plain_decoding(generate, kind: str, noise: float, prompts: int) -> None:
    model = TableModel(VOCAB, seed=3)
    near, far, stranger = (TableModel(VOCAB, seed=3, blur=blur) for blur in (noise, noise + 1, 30.0))
    drafter = {
        "draft": lambda: draft_model(near, num_speculative_tokens=4),
        "trees": lambda: cascade(near, RandomTrees()),
        "lookup": lambda: cascade(near, PromptLookup()),
        "nested": lambda: cascade(near, cascade(far, RandomTrees(), min_draft=3, stage="small")),
        "nested strangers": lambda: cascade(near, cascade(stranger, cascade(far, min_draft=2)), min_draft=9),
    }[kind]()
    asked, eos = [SAMPLING[i % 3] for i in range(prompts)], frozenset({VOCAB - 1})
    plain = generate(model, PROMPTS[:prompts], asked, eos=eos)
    fast = generate(model, PROMPTS[:prompts], asked, drafter, eos=eos)
    assert fast.texts == plain.texts
    assert len({len(text) for text in plain.texts}) > 1, "no prompt reached its end token"
    if noise == 0.0:
        going_on = [verdict for verdicts in fast.verdicts for verdict in verdicts if verdict.finish is None]
        assert all(len(verdict.path) == len(verdict.draft) for verdict in going_on)
    if noise == 30.0:
        assert fast.acceptance < 2.0


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_an_intermediate_equal_to_the_target_is_always_right(generate, temperature: float) -> None:
    model, same = TableModel(VOCAB, seed=4), TableModel(VOCAB, seed=4)
    params = SamplingParams(max_new_tokens=25, temperature=temperature)
    run = generate(model, PROMPTS[:4], params, draft_model(same, num_speculative_tokens=4))
    # 25 tokens are five rounds of four drafted and one of the target's own.
    assert [[len(verdict.emitted) for verdict in verdicts] for verdicts in run.verdicts] == [[5] * 5] * 4
    assert run.forwards == 5
    assert run.verdicts[0][0].stages == ("draft",) * 4 + ("target",)


def test_a_relative_is_partly_right(generate) -> None:
    model, near = TableModel(VOCAB, seed=5), TableModel(VOCAB, seed=5, blur=1.0)
    drafter = cascade(near, RandomTrees())
    run = generate(model, PROMPTS[:10], SamplingParams(max_new_tokens=40, temperature=0.8), drafter)
    accepted = [len(verdict.path) for verdicts in run.verdicts for verdict in verdicts]
    assert 2.0 < run.acceptance < 5.0
    assert 0 in accepted
    assert max(accepted) >= 5


def test_stages_name_the_innermost_level_whose_proposal_survived(generate) -> None:
    model, near = TableModel(VOCAB, seed=6), TableModel(VOCAB, seed=6, blur=1.0)
    drafter = cascade(near, cascade(near, RandomTrees(), stage="small"))
    run = generate(model, PROMPTS[:6], SamplingParams(max_new_tokens=30), drafter)
    stages = {stage for verdicts in run.verdicts for verdict in verdicts for stage in verdict.stages}
    assert stages == {"random", "small", "intermediate", "target"}


class Script:
    """Proposes given drafts, one after the other, and counts how often it was asked."""

    needs = Needs()
    name = "script"

    def __init__(self, drafts: list[list[int]]) -> None:
        self.drafts, self.truncated = drafts, []

    def prepare(self, parts) -> None:
        pass

    def open(self, view) -> None:
        return None

    def propose(self, states, views, budgets) -> list[Draft]:
        tokens = self.drafts.pop(0)
        return [Draft.chain(tokens, [1.0] * len(tokens), [self.name] * len(tokens))]

    def observe(self, state, verdict) -> None:
        pass

    def truncate(self, state, length: int) -> None:
        self.truncated.append(length)

    def finalize(self, state, length: int) -> None:
        pass

    def close(self, state) -> None:
        pass

    def describe(self) -> str:
        return "script"


def counting():
    """A model that counts: after token t comes t + 1, with 9 against 0, whatever stood before."""
    model = TableModel(VOCAB)
    model.row = lambda path: 9.0 * torch.nn.functional.one_hot(torch.tensor((path[-1] + 1) % VOCAB), VOCAB)
    return model


def view_of(tokens: list[int], remaining: int = 50, stop_ids: frozenset[int] = frozenset()):
    """A greedy view of a text whose prompt is its first two tokens."""
    chain = WarpChain(SamplingParams(), tokens[:2], stop_ids)
    return View(tuple(tokens), 2, chain, chain.start(), Stream(1), stop_ids, remaining, VOCAB)


def test_surplus_tokens_are_kept_and_cost_no_further_forward() -> None:
    model, script = counting(), Script([[2, 3, 4, 5], [], []])
    drafter = cascade(model, script, min_draft=2)
    state = drafter.open(view_of([0, 1]))

    def propose(tokens: list[int], nodes: int = 2) -> tuple[int, ...]:
        return drafter.propose([state], [view_of(tokens)], [Budget(nodes, 9)])[0].tokens

    assert propose([0, 1]) == (2, 3)  # one round gave 2 3 4 5 6; three tokens are surplus
    assert model.forwards == 1
    assert propose([0, 1, 2, 3, 4]) == (5, 6)  # the target went the same way: nothing new to do
    assert model.forwards == 1
    assert script.truncated == []
    assert propose([0, 1, 2, 3, 4, 5, 6, 0]) == (1, 2)  # all used up, and one more: a lag of two
    assert model.forwards == 3
    assert state.level.session.tokens == [0, 1, 2, 3, 4, 5, 6, 0, 1, 2]


def test_partial_acceptance_goes_back_to_the_common_prefix_and_keeps_its_rows() -> None:
    model, script = counting(), Script([[2, 3, 4, 5], []])
    drafter = cascade(model, script, min_draft=2)
    state = drafter.open(view_of([0, 1]))
    drafter.propose([state], [view_of([0, 1])], [Budget(4, 9)])
    drafter.finalize(state, 4)
    assert state.level.session.cached == 6
    drafter._sync(state, view_of([0, 1, 2, 6]))  # the target took 2 and then drew 6
    assert state.level.session.tokens == [0, 1, 2, 6]
    assert state.level.session.cached == 3
    assert state.level.session.lag == 1
    assert state.level.session.final == 4
    assert script.truncated == [3]
    assert state.level.drafted == []


def test_a_chain_ends_with_the_end_token() -> None:
    model, script = counting(), Script([[2, 3, 4, 5]])
    drafter = cascade(model, script, min_draft=6)
    view = view_of([0, 1], stop_ids=frozenset({3}))
    assert drafter.propose([drafter.open(view)], [view], [Budget(9, 9)])[0].tokens == (2, 3)
    assert model.forwards == 1


@pytest.mark.parametrize(("remaining", "length"), [(1, 0), (2, 1), (4, 3), (50, 6)])
def test_a_draft_leaves_room_for_the_targets_own_token(remaining: int, length: int) -> None:
    model = counting()
    drafter = cascade(model, min_draft=6)
    view = view_of([0, 1], remaining)
    assert len(drafter.propose([drafter.open(view)], [view], [Budget(9, 9)])[0]) == length
    assert model.forwards == length


def test_an_empty_budget_does_not_even_read_the_prompt() -> None:
    model = counting()
    drafter = cascade(model)
    view = view_of([0, 1])
    assert drafter.propose([drafter.open(view)], [view], [Budget(0, 0)]) == [EMPTY_DRAFT]
    assert model.forwards == 0


@pytest.mark.parametrize("tau", [1.0, 0.4])
def test_scores_are_the_intermediates_own_path_products_and_prices_cut_the_chain(tau: float) -> None:
    model = TableModel(VOCAB, seed=8)
    drafter, view = cascade(model, min_draft=4, taus={} if tau == 1 else {0.0: tau, 1.0: 0.9}), view_of([0, 1])
    draft = drafter.propose([drafter.open(view)], [view], [Budget(9, 9)])[0]
    text, expected, product = [0, 1], [], 1.0
    for token in draft.tokens:
        product *= float((model.row(text) / tau).softmax(-1)[token])
        expected.append(product)
        text.append(token)
    assert draft.scores == pytest.approx(expected, rel=1e-5)  # fp32 rounding
    price = (draft.scores[1] + draft.scores[2]) / 2
    assert len(drafter.propose([drafter.open(view)], [view], [Budget(9, 9, min_score=price)])[0]) == 2


def test_rows_with_prices_of_their_own_take_runners_up_where_the_margin_is_small() -> None:
    model = TableModel(VOCAB, seed=8)
    drafter, view = cascade(model, min_draft=3), view_of([0, 1])
    chain = drafter.propose([drafter.open(view)], [view], [Budget(9, 3)])[0]
    tree = drafter.propose([drafter.open(view)], [view], [Budget(9, 3, prices=(0.0,) * 9)])[0]
    assert (len(chain), len(tree)) == (3, 6)
    assert tree.best_chain().tokens == chain.tokens
    text, reached = [0, 1], 1.0
    for depth, token in enumerate(chain.tokens):
        row = model.row(text).softmax(-1)
        best = [node for node in range(6) if tree.depths()[node] == depth + 1]
        assert [tree.tokens[node] for node in best] == row.topk(2).indices.tolist()
        assert [tree.scores[node] for node in best] == pytest.approx((reached * row.topk(2).values).tolist(), rel=1e-5)
        assert tree.stages[best[1]] == "intermediate"
        text, reached = [*text, token], reached * float(row[token])
    # With four rows for nothing, the surest four of the six.
    few = drafter.propose([drafter.open(view)], [view], [Budget(9, 3, prices=(0.0,) * 4 + (9.0,) * 5)])[0]
    assert sorted(few.scores) == sorted(sorted(tree.scores)[2:])


def test_a_round_that_promises_less_than_it_costs_is_not_run() -> None:
    model = TableModel(VOCAB, seed=8)
    drafter, view = cascade(model, min_draft=6), view_of([0, 1])
    whole = drafter.propose([drafter.open(view)], [view], [Budget(9, 9)])[0]
    promised = [score ** (1 + 1 / k) for k, score in enumerate(whole.scores, 1)]
    price = (promised[1] + promised[2]) / 2
    assert promised[0] > price > promised[2]
    before = model.forwards
    assert len(drafter.propose([drafter.open(view)], [view], [Budget(9, 9, level_price=price)])[0]) == 3
    assert model.forwards == before + 3


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_texts_with_runners_up_are_plain_and_some_of_them_are_accepted(generate, temperature: float) -> None:
    model, near = TableModel(VOCAB, seed=3), TableModel(VOCAB, seed=3, blur=0.8)
    params = SamplingParams(max_new_tokens=40, temperature=temperature)
    prompts = [[0, 1], [2, 3], [4, 5]]
    run = generate(
        model, prompts, params, draft_model(near, num_speculative_tokens=3), budget=Budget(6, 3, prices=(0.0,) * 6)
    )
    assert run.texts == generate(model, prompts, params).texts
    taken = [verdict for verdicts in run.verdicts for verdict in verdicts if verdict.path]
    second = [v for v in taken if v.draft.best_chain().tokens[: len(v.tokens)] != v.tokens]
    assert 0 < len(second) < len(taken)


def test_the_stop_hook_sees_the_least_lead_of_a_round() -> None:
    model, leads = counting(), []
    drafter = cascade(model, min_draft=5, stop=lambda lead: leads.append(lead) or len(leads) == 3)
    view = view_of([0, 1])
    assert len(drafter.propose([drafter.open(view)], [view], [Budget(9, 9)])[0]) == 3
    assert leads == pytest.approx([9.0] * 3, abs=1e-4)  # of a log-softmax in fp32


@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_the_ratio_rule_gets_the_distributions_that_tokens_were_drawn_from(generate, noise: float) -> None:
    model, near = TableModel(4, seed=9), TableModel(4, seed=9, blur=noise)
    params = SamplingParams(max_new_tokens=20, temperature=1.3, top_k=3)
    run = generate(model, [[0, 1]] * 3, params, draft_model(near), rule="ratio")
    for verdicts in run.verdicts:
        text = [0, 1]
        for verdict in verdicts:
            path = text.copy()
            for token, q in zip(verdict.draft.tokens, verdict.draft.q_rows if len(verdict.draft) else (), strict=True):
                row = near.row(path) / 1.3
                row[row < row.topk(3).values[-1]] = -torch.inf
                # The noise was added and taken off again, in fp32.
                torch.testing.assert_close(q, row.softmax(-1), atol=1e-6, rtol=1e-4)
                path.append(token)
            text += verdict.emitted
    if noise == 0.0:  # q equals p up to rounding, so a coin rejects it about once in a million
        going_on = [verdict for verdicts in run.verdicts for verdict in verdicts if verdict.finish is None]
        assert all(len(verdict.path) == len(verdict.draft) for verdict in going_on)


class FakeTokenizer:
    def __init__(self, fingerprint: str) -> None:
        self._fingerprint = fingerprint

    def fingerprint(self) -> str:
        return self._fingerprint


def test_a_stranger_to_the_targets_tokens_is_refused() -> None:
    model, wider = TableModel(VOCAB), TableModel(VOCAB + 1)
    with pytest.raises(ModelError, match="different tokenizers"):
        draft_model(model, FakeTokenizer("a")).prepare(TargetParts(model, FakeTokenizer("b")))
    with pytest.raises(ModelError, match="8 tokens"):
        draft_model(wider).prepare(TargetParts(model))
    draft_model(model, FakeTokenizer("a")).prepare(TargetParts(model, FakeTokenizer("a")))
    with pytest.raises(UsageError, match="min_draft"):
        CascadeOptions(min_draft=0)
