"""Medusa: the heads against the formula, the tree against all paths, and text equal to plain decoding."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from tiny_eagle import HIDDEN, VOCAB, load_family
from tiny_medusa import HEADS, IDS, LAYERS, VLLM, head_tensors, write

from quantspec.core.drafter import TargetParts, View
from quantspec.core.noise import Stream
from quantspec.core.sampling import WarpChain
from quantspec.core.verify import Verifier
from quantspec.drafters.cascade import Cascade
from quantspec.drafters.config import CascadeOptions, EagleOptions
from quantspec.drafters.medusa import Medusa, MedusaState
from quantspec.drafters.medusa_files import read_medusa
from quantspec.drafters.medusa_head import MedusaHead, NativeMedusaHead
from quantspec.drafters.tree import best_first
from quantspec.errors import ModelError
from quantspec.kernels.cpu import library
from quantspec.types import Budget, SamplingParams, Verdict

PARAMS = {
    "greedy": SamplingParams(max_new_tokens=40),
    "sampled": SamplingParams(max_new_tokens=40, temperature=0.8, top_p=0.9),
    "penalties": SamplingParams(max_new_tokens=40, temperature=0.7, repetition_penalty=1.3, presence_penalty=0.4),
}
PROMPTS = [[3, 10, 17], [5], [40, 2, 9, 16]]


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory):
    root = tmp_path_factory.mktemp("medusa")
    models = load_family(root)
    noise = torch.Generator().manual_seed(9)
    random = {name: torch.randn(each.shape, generator=noise) for name, each in head_tensors().items()}
    trimmed = VLLM | {"truncated_vocab_size": len(IDS), "quantspec": {"tau": {"0": 0.3, "0.8": 0.7}}}
    return models | {
        "whole": write(root / "whole", VLLM, head_tensors()),
        "trimmed": write(root / "trimmed", trimmed, head_tensors(ids=IDS)),
        "random": write(root / "random", VLLM, random),
    }


def oracle(weight: dict[str, torch.Tensor], feature: torch.Tensor, head: int) -> torch.Tensor:
    """Logits ``[V]``, from the paper's formula."""
    for layer in range(LAYERS):
        y = weight[f"blocks.{head}.layers.{layer}.weight"] @ feature + weight[f"blocks.{head}.layers.{layer}.bias"]
        feature = feature + y / (1 + (-y).exp())
    return weight[f"lm_heads.{head}.weight"] @ feature


@pytest.mark.parametrize("kind", [MedusaHead, NativeMedusaHead])
def test_the_heads_are_the_papers(family, kind: type[MedusaHead]) -> None:
    if kind is NativeMedusaHead and library.usable() is not None:
        pytest.skip("no native library here")
    config, tensors, _ = read_medusa(family["whole"])
    features = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(1))
    found = kind(config, tensors, torch.device("cpu"), torch.float32).logits(features, 2)
    assert found.shape == (2, 5, VOCAB)
    for head, row in itertools.product(range(2), range(5)):
        # fp32 sums of 32 products in another order.
        torch.testing.assert_close(found[head, row], oracle(tensors, features[row], head), rtol=1e-4, atol=1e-4)


def test_best_first_finds_the_best_nodes_of_the_whole_tree() -> None:
    """Against all paths of a tree whose probabilities depend on the whole path."""
    depth, width, nodes = 3, 4, 13
    generator = torch.Generator().manual_seed(2)
    table: dict[tuple[int, ...], list[float]] = {}

    def ranked(path: tuple[int, ...]) -> tuple[list[int], list[float]]:
        if path not in table:
            table[path] = (2 * torch.randn(9, generator=generator)).log_softmax(0).tolist()
        best = sorted(range(9), key=lambda token: -table[path][token])[:width]
        return best, [table[path][token] for token in best]

    stop = ranked(())[0][1]
    tree = best_first(ranked, depth, Budget(nodes, depth), {stop})
    scores: dict[tuple[int, ...], float] = {(): 0.0}
    for path in [p for d in range(depth) for p in itertools.product(range(9), repeat=d)]:
        if path in scores and stop not in path:
            tokens, log_probs = ranked(path)
            scores |= {(*path, t): scores[path] + s for t, s in zip(tokens, log_probs, strict=True)}
    del scores[()]
    paths: list[tuple[int, ...]] = []
    for token, parent in zip(tree.tokens, tree.parents, strict=True):
        paths.append((*(paths[parent] if parent >= 0 else ()), token))
    assert paths == sorted(scores, key=lambda path: -scores[path])[:nodes]
    assert tree.log_scores == pytest.approx([scores[path] for path in paths])
    # A price ends the tree at the first node that does not pay for itself.
    third = math.exp(tree.log_scores[3])
    assert len(best_first(ranked, depth, Budget(nodes, depth, min_score=third), {stop})) == 3


def drafted(drafter: Medusa, tokens: list[int], feature: torch.Tensor, params: SamplingParams, budget: Budget):
    chain = WarpChain(params, tokens[:1], frozenset())
    view = View(tuple(tokens), 1, chain, chain.start(), Stream(5), frozenset(), 20, VOCAB)
    rows = torch.cat([torch.zeros(len(tokens) - 2, HIDDEN), feature[None]])
    return drafter.propose([MedusaState(rows)], [view], [budget])[0], view


@pytest.mark.parametrize("params", PARAMS.values(), ids=PARAMS)
def test_scores_are_path_products_of_the_heads_own_rows(family, params: SamplingParams) -> None:
    """Under penalties a row depends on the tokens before it, and under noise on its position."""
    drafter = Medusa(family["trimmed"], EagleOptions(top_k=3, depth=8))
    drafter.prepare(TargetParts(family["target"]))
    feature = torch.randn(HIDDEN, generator=torch.Generator().manual_seed(3))
    draft, view = drafted(drafter, [3, 10, 17, 24], feature, params, Budget(12, 8))
    weight, tau = head_tensors(ids=IDS), 0.7 if params.temperature else 0.3
    assert len(draft) == 12 or (params.top_p < 1 and len(draft) > 5)
    assert max(draft.depths()) == HEADS
    assert set(draft.tokens) <= set(IDS.tolist())
    paths, scores = [], []
    for token, parent in zip(draft.tokens, draft.parents, strict=True):
        path, score = (paths[parent], scores[parent]) if parent >= 0 else ((), 1.0)
        row = view.scores(oracle(weight, feature, len(path))[None], [path], IDS, tau)[0]
        paths.append((*path, token))
        scores.append(score * float(row[IDS.tolist().index(token)].exp()))
    assert list(draft.scores) == pytest.approx(scores, rel=1e-3)  # fp32, and truncation a few entries sooner or later


def test_nothing_is_drafted_past_the_end_or_from_a_feature_that_lags(family) -> None:
    drafter = Medusa(family["whole"])
    drafter.prepare(TargetParts(family["target"]))
    feature, params = torch.randn(HIDDEN), SamplingParams()
    assert len(drafted(drafter, [3, 10, 17], feature, params, Budget(0, 8))[0]) == 0
    assert max(drafted(drafter, [3, 10, 17], feature, params, Budget(9, 2))[0].depths()) == 2
    chain = WarpChain(params, [3], frozenset())
    view = View((3, 10, 17), 1, chain, chain.start(), Stream(5), frozenset(), 20, VOCAB)
    for state in (MedusaState(), MedusaState(torch.zeros(1, HIDDEN))):
        assert len(drafter.propose([state], [view], [Budget(9, 8)])[0]) == 0


def test_features_are_kept_for_what_may_be_taken_back(family) -> None:
    drafter, state = Medusa(family["whole"]), MedusaState()
    rows = torch.arange(6.0)[:, None].expand(6, HIDDEN)
    drafter.observe(state, Verdict((), (), 1, (1,), ("",), taps={"norm": rows}))
    drafter.finalize(state, 4)
    drafter.truncate(state, 5)
    assert (state.base, state.count) == (3, 5)
    assert state.features is not None
    assert state.features[:, 0].tolist() == [3.0, 4.0]
    drafter.close(state)
    assert state.features is None


@pytest.mark.parametrize("params", PARAMS.values(), ids=PARAMS)
@pytest.mark.parametrize("head", ["whole", "trimmed", "random"])
def test_text_is_that_of_plain_decoding(family, generate, head: str, params: SamplingParams) -> None:
    plain = generate(family["target"], PROMPTS, params)
    run = generate(family["target"], PROMPTS, params, Medusa(family[head]))
    assert run.texts == plain.texts
    if head == "random":
        assert any(len(v.draft) > len(v.path) for verdicts in run.verdicts for v in verdicts)  # rejections
    else:
        assert run.acceptance > 1.3  # heads that count by seven foresee much of the text


@pytest.mark.parametrize("params", PARAMS.values(), ids=PARAMS)
@pytest.mark.parametrize("head", ["whole", "random"])
def test_below_a_cascade_too(family, generate, head: str, params: SamplingParams) -> None:
    plain = generate(family["target"], PROMPTS, params)
    cascade = Cascade(Medusa(family[head]), Verifier(family["relative"], stage="intermediate"), CascadeOptions())
    run = generate(family["target"], PROMPTS, params, cascade)
    assert run.texts == plain.texts
    assert run.acceptance > 1.3


def test_heads_of_another_target_are_refused(family, tmp_path) -> None:
    shapes = {name: [2 * n if n == HIDDEN else n for n in tensor.shape] for name, tensor in head_tensors().items()}
    tensors = {name: torch.ones(shape) for name, shape in shapes.items()}
    drafter = Medusa(write(tmp_path / "wide", VLLM | {"hidden_size": 2 * HIDDEN}, tensors))
    with pytest.raises(ModelError, match="made for a target of width 64 and 48 tokens, not 32 and 48"):
        drafter.prepare(TargetParts(family["target"]))
