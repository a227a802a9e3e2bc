"""P-EAGLE: chains and trees against a dense recomputation, one forward a round, text equal to plain decoding."""

import itertools
import math
from pathlib import Path

import pytest
import torch
from tiny_eagle import HIDDEN, VOCAB, load_family, save
from tiny_peagle import PEAGLE_FLAT, dense_logits, peagle_folder, peagle_tensors
from torch import Tensor

from quantspec.core.drafter import TargetParts, View
from quantspec.core.noise import Stream
from quantspec.core.sampling import WarpChain
from quantspec.core.verify import Verifier
from quantspec.drafters.cascade import Cascade
from quantspec.drafters.config import CascadeOptions, EagleOptions
from quantspec.drafters.feature_tree import CHUNK, FeatureState
from quantspec.drafters.peagle import PEagle
from quantspec.types import Budget, Draft, SamplingParams, Verdict

VARIANTS = {
    "two layers": {},
    "one layer": {"layers": 1},
    "four layers, whole vocabulary": {"layers": 4, "ids": None},
    "3.1": {"flags": ("fc_norm", "norm_output")},
    "normed before fc and residual": {"flags": ("norm_before_fc", "norm_before_residual")},
}
TAPS = (0, 1)


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory):
    root = tmp_path_factory.mktemp("peagle")
    return load_family(root) | {name: peagle_folder(root / name, **options) for name, options in VARIANTS.items()}


def view_of(tokens: list[int], params: SamplingParams | None = None, stops: frozenset[int] = frozenset()) -> View:
    chain = WarpChain(params or SamplingParams(), tokens[:1], stops)
    return View(tuple(tokens), 1, chain, chain.start(), Stream(5), stops, 20, VOCAB)


def drafter_of(family, variant: str = "two layers", depth: int = 8, top_k: int = 1) -> PEagle:
    drafter = PEagle(family[variant], EagleOptions(depth=depth, top_k=top_k))
    drafter.prepare(TargetParts(family["target"]))
    return drafter


def observed(drafter: PEagle, streams: list[Tensor]) -> FeatureState:
    state = drafter.open(view_of([0] * (len(streams[0]) + 1)))
    observe(drafter, state, streams)
    return state


def observe(drafter: PEagle, state: FeatureState, streams: list[Tensor]) -> None:
    taps = dict(zip(TAPS, streams, strict=True))
    drafter.observe(state, Verdict((), (), 0, (0,), ("target",), taps=taps))


def propose(drafter: PEagle, state: FeatureState, view: View, budget: Budget) -> Draft:
    draft = drafter.propose([state], [view], [budget])[0]
    assert isinstance(draft, Draft)
    assert draft.is_chain or drafter.options.top_k > 1
    return draft


def text_and_streams(length: int, seed: int = 3) -> tuple[list[int], list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCAB, (length,), generator=generator).tolist()
    return tokens, [torch.randn(length - 1, HIDDEN, generator=generator) for _ in TAPS]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("length", [2, 9])
def test_every_token_is_the_best_of_a_dense_recomputation(family, variant: str, length: int) -> None:
    tokens, streams = text_and_streams(length)
    drafter = drafter_of(family, variant)
    assert drafter.needs.taps == TAPS
    draft = propose(drafter, observed(drafter, streams), view_of(tokens), Budget(5, 9))
    best = dense_logits(VARIANTS[variant], streams, tokens, 5).log_softmax(-1).max(-1)
    assert draft.tokens == tuple(best.indices.tolist())
    # Sums in another order, in fp32, through up to four layers.
    assert [math.log(s) for s in draft.scores] == pytest.approx(best.values.cumsum(0).tolist(), abs=1e-4)


def test_a_chain_is_as_long_as_budget_and_text_allow(family) -> None:
    tokens, streams = text_and_streams(6)
    drafter = drafter_of(family, depth=7)
    whole = propose(drafter, observed(drafter, streams), view_of(tokens), Budget(30, 30))
    assert len(whole) == 7
    for budget, count in ((Budget(3, 9), 3), (Budget(9, 2), 2), (Budget(9, 9, whole.scores[3]), 3), (Budget(0, 0), 0)):
        draft = propose(drafter, observed(drafter, streams), view_of(tokens), budget)
        assert draft.tokens == whole.tokens[:count]  # fewer masks change nothing before them
        assert draft.scores == pytest.approx(whole.scores[:count], rel=1e-4)  # fp32 sums over fewer rows
    stops = frozenset({whole.tokens[2]})
    ended = propose(drafter, observed(drafter, streams), view_of(tokens, stops=stops), Budget(7, 7))
    assert ended.tokens == whole.tokens[: whole.tokens.index(whole.tokens[2]) + 1]


@pytest.mark.parametrize("params", [{}, {"top_k": 4}, {"repetition_penalty": 1.5, "presence_penalty": 0.5}])
def test_at_temperature_tokens_carry_the_noise_of_their_own_position(family, params: dict) -> None:
    tokens, streams = text_and_streams(5)
    drafter = drafter_of(family)
    view = view_of(tokens, SamplingParams(temperature=0.9, **params))
    draft = propose(drafter, observed(drafter, streams), view, Budget(4, 4))
    rows = dense_logits({}, streams, tokens, 4)
    state, expected = view.state, list[int]()
    for depth in range(4):
        warped = view.chain.apply_rows([state], rows[depth : depth + 1])[0]
        expected.append(int((warped - torch.tensor(view.stream.noise(len(tokens) + depth, VOCAB))).argmax()))
        state = view.chain.advance(state, expected[-1])
    assert draft.tokens == tuple(expected)


# --- trees ---


def paths_of(draft: Draft) -> list[tuple[int, ...]]:
    paths: list[tuple[int, ...]] = []
    for token, parent in zip(draft.tokens, draft.parents, strict=True):
        paths.append((*(paths[parent] if parent >= 0 else ()), token))
    return paths


@pytest.mark.parametrize("params", [{}, {"temperature": 0.9}, {"temperature": 0.9, "repetition_penalty": 1.5}])
def test_a_tree_has_the_best_of_all_products_over_the_slots(family, params: dict) -> None:
    """Under a penalty what a slot says depends on the tokens before it after all."""
    depth, top_k, nodes = 4, 3, 14
    tokens, streams = text_and_streams(7)
    drafter, view = drafter_of(family, depth=depth, top_k=top_k), view_of(tokens, SamplingParams(**params))
    draft = propose(drafter, observed(drafter, streams), view, Budget(nodes, 9))
    rows, scores = dense_logits({}, streams, tokens, depth), {(): 0.0}
    for level in range(depth):
        for path in [each for each in scores if len(each) == level]:
            best = view.scores(rows[level : level + 1], [path])[0].topk(top_k)
            found = zip(best.indices.tolist(), best.values.tolist(), strict=True)
            scores |= {(*path, token): scores[path] + score for token, score in found}
    assert len(scores) == 1 + 3 + 9 + 27 + 81
    ranked = sorted(scores, key=lambda path: -scores[path])[1 : nodes + 1]
    assert set(paths_of(draft)) == set(ranked)
    # Sums in another order, in fp32, and rows divided by the penalty before.
    assert [math.log(s) for s in draft.scores] == pytest.approx([scores[p] for p in paths_of(draft)], abs=1e-3)
    assert not draft.is_chain


def test_a_tree_keeps_to_its_bounds(family, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nodes, levels, slots, children, prices, and the end of the text."""
    tokens, streams = text_and_streams(6)
    drafter = drafter_of(family, depth=3, top_k=3)
    sizes = counted(drafter, monkeypatch)

    def draft_of(budget: Budget, stops: frozenset[int] = frozenset()) -> Draft:
        return propose(drafter, observed(drafter, streams), view_of(tokens, stops=stops), budget)

    whole = draft_of(Budget(90, 9))
    assert sorted(whole.depths()) == [1] * 3 + [2] * 9 + [3] * 27
    assert {whole.parents.count(parent) for parent in whole.parents} == {3}
    assert sorted(draft_of(Budget(90, 2)).depths()) == [1] * 3 + [2] * 9
    assert paths_of(draft_of(Budget(2, 9))) == paths_of(whole)[:2]
    assert paths_of(draft_of(Budget(90, 9, whole.scores[4]))) == paths_of(whole)[:4]  # a price: what is above it
    assert not draft_of(Budget(0, 0)).tokens
    # The prompt's 5 slots each time, and masks for levels that could be reached.
    assert sizes == [5 + 2, 5 + 1, 5 + 1, 5 + 2]
    stop = whole.tokens[0]
    ended = paths_of(draft_of(Budget(90, 9), frozenset({stop})))
    assert (stop,) in ended
    assert not any(stop in path[:-1] for path in ended)


# --- forwards ---


def counted(drafter: PEagle, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many slots each forward of the head has had so far."""
    sizes, forward = [], drafter._head.forward

    def count(features: Tensor, *arguments) -> Tensor:
        sizes.append(len(features))
        return forward(features, *arguments)

    monkeypatch.setattr(drafter._head, "forward", count)
    return sizes


def test_a_round_takes_one_forward(family, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the new slots and the masks, also after tokens were taken back; a long prompt takes more, once."""
    tokens, streams = text_and_streams(CHUNK + 60)
    drafter = drafter_of(family)
    sizes, known = counted(drafter, monkeypatch), 5
    state = drafter.open(view_of(tokens))
    observe(drafter, state, [stream[:known] for stream in streams])
    for more in (3, 1, 4):
        propose(drafter, state, view_of(tokens[: known + 1]), Budget(5, 5))
        observe(drafter, state, [stream[known : known + more] for stream in streams])
        known += more
    drafter.truncate(state, 7)
    propose(drafter, state, view_of(tokens[:8]), Budget(5, 5))
    assert sizes == [5 + 4, 3 + 4, 1 + 4, 1 + 4]
    sizes.clear()
    fresh = observed(drafter, streams)
    propose(drafter, fresh, view_of(tokens), Budget(5, 5))
    propose(drafter, fresh, view_of(tokens), Budget(5, 5))
    assert sizes == [CHUNK, 59, 5, 5]


@pytest.mark.parametrize("seed", range(3))
def test_keeping_state_equals_starting_afresh(family, seed: int) -> None:
    """Slots that held masks are filled again; tokens are taken back now and then."""
    generator = torch.Generator().manual_seed(seed)
    tokens, streams = text_and_streams(30, seed)
    drafter = drafter_of(family, "3.1")
    state, known = observed(drafter, [stream[:3] for stream in streams]), 3
    for step in range(6):
        kept = propose(drafter, state, view_of(tokens[: known + 1]), Budget(6, 9))
        again = propose(
            drafter, observed(drafter, [s[:known] for s in streams]), view_of(tokens[: known + 1]), Budget(6, 9)
        )
        assert kept.tokens == again.tokens
        assert kept.scores == pytest.approx(again.scores, rel=1e-4)  # sums over keys in another order, in fp32
        if step % 3 == 2:
            known = int(torch.randint(2, known, (1,), generator=generator))
            drafter.truncate(state, known)
            tokens[known:] = torch.randint(VOCAB, (len(tokens) - known,), generator=generator).tolist()
        more = int(torch.randint(1, 4, (1,), generator=generator))
        observe(drafter, state, [stream[known : known + more] for stream in streams])
        known += more


# --- text -------------------------------------------------------------------------------------------------------------

PROMPTS = [[seed % VOCAB, (7 * seed) % VOCAB, 5] for seed in range(24)]
PARAMS = [
    SamplingParams(max_new_tokens=10),
    SamplingParams(max_new_tokens=10, temperature=0.8, top_p=0.95),
    SamplingParams(max_new_tokens=10, temperature=1.1, repetition_penalty=1.2),
] * 8
EOS = frozenset({9})


@pytest.fixture(scope="module")
def plain(family, generate):
    return generate(family["target"], PROMPTS, PARAMS, eos=EOS).texts


@pytest.mark.parametrize(("variant", "top_k"), [*zip(VARIANTS, itertools.repeat(3)), ("two layers", 1)])
def test_text_is_that_of_plain_decoding(family, generate, plain, variant: str, top_k: int) -> None:
    """Greedy, sampled, and with a penalty, in turn."""
    drafter, budget = drafter_of(family, variant, top_k=top_k), Budget(5 * top_k, 5)
    run = generate(family["target"], PROMPTS, PARAMS, drafter, budget=budget, eos=EOS)
    assert run.texts == plain
    assert 1.05 <= run.acceptance <= 3.5  # proposals are accepted, and rejected


def test_a_head_of_noise_changes_nothing(family, generate, plain, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: tensor if tensor.dtype != torch.float32 else torch.randn(tensor.shape, generator=generator)
        for name, tensor in peagle_tensors().items()
    }
    folder = save(tmp_path / "noise", PEAGLE_FLAT, tensors)
    drafter = PEagle(folder, EagleOptions(depth=5, top_k=2))
    assert generate(family["target"], PROMPTS, PARAMS, drafter, budget=Budget(9, 5), eos=EOS).texts == plain


@pytest.mark.parametrize("model", ["relative", "stranger"])
def test_text_of_a_cascade_around_it_is_that_of_plain_decoding(family, generate, plain, model: str) -> None:
    prompts = 24 if model == "relative" else 6
    verifier = Verifier(family[model], stage="intermediate")
    head = PEagle(family["two layers"], EagleOptions(depth=4, top_k=2))
    cascade = Cascade(head, verifier, CascadeOptions(min_draft=5))
    run = generate(family["target"], PROMPTS[:prompts], PARAMS[:prompts], cascade, budget=Budget(10, 10), eos=EOS)
    assert run.texts == plain[:prompts]
    if model == "relative":
        stages = {stage for verdicts in run.verdicts for verdict in verdicts for stage in verdict.stages}
        assert stages == {"peagle", "intermediate", "target"}
