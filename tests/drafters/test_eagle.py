import math
from itertools import product
from pathlib import Path

import pytest
import torch
from tiny_eagle import HEAD_CONFIG, HEAD_DIM, HEADS, HIDDEN, KV_HEADS, MLP, VOCAB, head_tensors, save, save_family
from torch import Tensor
from torch.nn import functional as F

from quantspec.calibrate.train.config import Shape
from quantspec.calibrate.train.methods.eagle import EagleHead as TrainedHead
from quantspec.core.drafter import TargetParts, View
from quantspec.core.noise import Stream
from quantspec.core.sampling import WarpChain
from quantspec.drafters.config import EagleOptions
from quantspec.drafters.eagle import Eagle
from quantspec.drafters.feature_tree import FeatureState
from quantspec.models.load import load_model
from quantspec.types import EMPTY_DRAFT, Budget, Draft, SamplingParams, Verdict


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory):
    folders = save_family(tmp_path_factory.mktemp("eagle"))
    return {"target": load_model(folders["target"]), "head": folders["head"]}


# --- the network against an independent, dense computation ---


def oracle(tensors: dict[str, Tensor], embedding: Tensor, features: Tensor, tokens: list[int]) -> Tensor:
    """Outputs ``[n, H]`` of slots 0 .. n-1 from ``features [n, H]`` and ``tokens [n]``, all at once, without caches."""
    n = len(tokens)
    weight = {name.removeprefix("layers.0."): tensor for name, tensor in tensors.items()}
    x = torch.cat([embedding[tokens], features], dim=1) @ weight["fc.weight"].T + weight["fc.bias"]

    def rotated(name: str, heads: int) -> Tensor:
        y = (x @ weight[f"self_attn.{name}_proj.weight"].T).view(n, heads, HEAD_DIM).double()
        pairs = torch.complex(y[..., : HEAD_DIM // 2], y[..., HEAD_DIM // 2 :])
        frequency = 100.0 ** (-torch.arange(0, HEAD_DIM, 2).double() / HEAD_DIM)
        angle = torch.arange(n).double()[:, None] * frequency
        pairs = pairs * torch.polar(torch.ones_like(angle), angle)[:, None]
        return torch.cat([pairs.real, pairs.imag], dim=-1)

    q, k = rotated("q", HEADS), rotated("k", KV_HEADS)
    v = (x @ weight["self_attn.v_proj.weight"].T).view(n, KV_HEADS, HEAD_DIM).double()
    mixed = torch.zeros(n, HEADS, HEAD_DIM, dtype=torch.float64)
    for i, head in product(range(n), range(HEADS)):
        group = head // (HEADS // KV_HEADS)
        attention = (k[: i + 1, group] @ q[i, head] / HEAD_DIM**0.5).softmax(0)
        mixed[i, head] = attention @ v[: i + 1, group]
    x = x + mixed.flatten(1).float() @ weight["self_attn.o_proj.weight"].T
    normed = x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() * weight["post_attention_layernorm.weight"]
    gate, up = (normed @ weight[f"mlp.{name}_proj.weight"].T for name in ("gate", "up"))
    return x + (F.silu(gate) * up) @ weight["mlp.down_proj.weight"].T


def oracle_log_probs(tensors, model, features: Tensor, tokens: list[int], path: list[int]) -> Tensor:
    """The log-probabilities ``[V]`` after ``path``, drafted below ``tokens``; all but the last have features."""
    embedding = model.embed(range(VOCAB))
    for drafted in range(len(path) + 1):
        outputs = oracle(tensors, embedding, features, [*tokens[1:], *path[:drafted]])
        features = torch.cat([features, outputs[-1:]])  # what follows continues from the estimate
    return model.head(outputs[-1:])[0].log_softmax(-1)


def view_of(tokens: list[int], params: SamplingParams | None = None, remaining: int = 20, stop_ids=frozenset()) -> View:
    chain = WarpChain(params or SamplingParams(), tokens[:1], stop_ids)
    return View(tuple(tokens), 1, chain, chain.start(), Stream(5), stop_ids, remaining, VOCAB)


def eagle(family, **options) -> Eagle:
    drafter = Eagle(family["head"], EagleOptions(**options))
    drafter.prepare(TargetParts(family["target"]))
    return drafter


def observed(drafter: Eagle, features: Tensor) -> FeatureState:
    state = drafter.open(view_of([0] * (len(features) + 1)))
    drafter.observe(state, Verdict((), (), 0, (0,), ("target",), taps={"norm": features}))
    return state


def propose(drafter: Eagle, state: FeatureState, view: View, budget: Budget) -> Draft:
    return drafter.propose([state], [view], [budget])[0]


def text_and_features(length: int, seed: int = 3) -> tuple[list[int], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCAB, (length,), generator=generator).tolist()
    return tokens, torch.randn(length - 1, HIDDEN, generator=generator)


def same(a: Draft, b: Draft) -> None:
    assert (a.tokens, a.parents) == (b.tokens, b.parents)
    assert a.scores == pytest.approx(b.scores, rel=1e-4)  # sums over keys in another order, in fp32


@pytest.mark.parametrize("length", [2, 9])
def test_every_node_scores_what_a_dense_recomputation_of_its_path_gives(family, length: int) -> None:
    tokens, features = text_and_features(length)
    drafter = eagle(family, top_k=5, depth=4)
    draft = propose(drafter, observed(drafter, features), view_of(tokens), Budget(15, 4))
    assert len(draft) == 15
    assert max(draft.depths()) >= 2
    paths: list[list[int]] = []
    for node, (token, parent) in enumerate(zip(draft.tokens, draft.parents, strict=True)):
        paths.append([*(paths[parent] if parent >= 0 else []), token])
        log_score = sum(
            float(oracle_log_probs(head_tensors(), family["target"], features, tokens, paths[-1][:i])[paths[-1][i]])
            for i in range(len(paths[-1]))
        )
        # Attention sums in another order and in fp32: relative differences of 1e-6, magnified by a few layers.
        assert math.log(draft.scores[node]) == pytest.approx(log_score, abs=1e-4)


def test_the_tree_holds_the_best_of_all_paths(family) -> None:
    """With every token as a child, growing only the frontier must find the best nodes of the whole tree of depth 2."""
    tokens, features = text_and_features(5)
    drafter = eagle(family, top_k=VOCAB, depth=2)
    draft = propose(drafter, observed(drafter, features), view_of(tokens), Budget(9, 9))
    first = oracle_log_probs(head_tensors(), family["target"], features, tokens, [])
    scores = {(a,): float(first[a]) for a in range(VOCAB)}
    for a in first.topk(12).indices.tolist():  # nothing below the 12 best can be among the 9 best
        second = oracle_log_probs(head_tensors(), family["target"], features, tokens, [a])
        scores |= {(a, b): float(first[a] + second[b]) for b in range(VOCAB)}
    best = sorted(scores, key=lambda path: -scores[path])[:9]
    found = [
        (token,) if parent < 0 else (draft.tokens[parent], token)
        for token, parent in zip(draft.tokens, draft.parents, strict=True)
    ]
    assert set(found) == set(best)


def test_at_temperature_the_scores_carry_the_noise_and_tau(family) -> None:
    tokens, features = text_and_features(4)
    drafter = eagle(family, top_k=3, depth=1)
    params = SamplingParams(temperature=0.8)
    view = view_of(tokens, params)
    draft = propose(drafter, observed(drafter, features), view, Budget(3, 9))
    logits = oracle_log_probs(head_tensors(), family["target"], features, tokens, [])
    coupled = logits / 0.8 - torch.tensor(view.stream.noise(len(tokens), VOCAB))
    expected = (coupled / 0.7).softmax(-1).topk(3)
    assert draft.tokens == tuple(expected.indices.tolist())
    assert draft.scores == pytest.approx(expected.values.tolist(), rel=1e-3)  # fp32 logits, divided twice


def test_training_simulates_the_same_drafts(family) -> None:
    """The trainer's unrolled head, given the tokens that were drafted, puts out what generation saw."""
    tokens, features = text_and_features(6)
    drafter = eagle(family, top_k=1, depth=2)
    draft = propose(drafter, observed(drafter, features), view_of(tokens), Budget(2, 2))
    shape = Shape(HIDDEN, 1, HEADS, KV_HEADS, MLP, head_dim=HEAD_DIM, rope_theta=100.0, rms_eps=1e-6)
    trained = TrainedHead(shape)
    trained.load_state_dict(head_tensors())
    embedded = family["target"].embed([*tokens[1:], draft.tokens[0]])
    with torch.no_grad():
        # The last slot has no true feature: step 1 of the unrolling reads the estimate in its place.
        true, guessed = trained.unrolled(embedded[None], torch.cat([features, features[:1]])[None], steps=2)
    rows = torch.stack([true[0, len(tokens) - 2], guessed[0, len(tokens) - 1]])
    log_probs = family["target"].head(rows).log_softmax(-1)
    assert draft.tokens == tuple(log_probs.argmax(-1).tolist())
    # Two implementations of the same formulas, in fp32.
    assert draft.scores == pytest.approx(log_probs.max(-1).values.cumsum(0).exp().tolist(), rel=1e-4)


@pytest.mark.parametrize("seed", range(4))
def test_keeping_state_equals_starting_afresh(family, seed: int) -> None:
    """Fill by fill, with trees in between, rejections, confirmations: drafts are those of a fresh state."""
    generator = torch.Generator().manual_seed(seed)
    tokens, features = text_and_features(40, seed)
    drafter = eagle(family, top_k=3, depth=3)
    state, known, final = observed(drafter, features[:3]), 3, 1
    for _ in range(8):
        same(
            propose(drafter, state, view_of(tokens[: known + 1]), Budget(8, 9)),
            propose(drafter, observed(drafter, features[:known]), view_of(tokens[: known + 1]), Budget(8, 9)),
        )
        assert state.count == state.filled == known
        step = int(torch.randint(3, (1,), generator=generator))
        if step == 0 and known > final:
            known = int(torch.randint(final, known, (1,), generator=generator))
            drafter.truncate(state, known)
            tokens[known:] = torch.randint(VOCAB, (len(tokens) - known,), generator=generator).tolist()
            features[known:] = torch.randn(len(features) - known, HIDDEN, generator=generator)
        elif step == 1:
            final = known
            drafter.finalize(state, final + 1)
            assert len(state.features) <= 2
        more = int(torch.randint(1, 4, (1,), generator=generator))
        drafter.observe(state, Verdict((), (), 0, (0,), (), taps={"norm": features[known : known + more]}))
        known += more


def test_a_long_prompt_is_read_in_chunks(family, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, features = text_and_features(30)
    drafter = eagle(family, top_k=3, depth=2)
    forward, rows = drafter._head.forward, list[int]()
    monkeypatch.setattr(drafter._head, "forward", lambda x, *rest: rows.append(len(x)) or forward(x, *rest))
    whole = propose(drafter, observed(drafter, features), view_of(tokens), Budget(6, 9))
    assert max(rows) > 8
    rows.clear()
    monkeypatch.setattr("quantspec.drafters.feature_tree.CHUNK", 8)
    same(propose(drafter, observed(drafter, features), view_of(tokens), Budget(6, 9)), whole)
    assert max(rows) == 8


# --- which feature, which token: a head one can compute by hand ---


@pytest.mark.parametrize(("reads", "first"), [("token", 8), ("feature", 4)])
def test_the_last_slot_pairs_the_last_token_with_the_feature_before_it(tmp_path: Path, reads: str, first: int) -> None:
    """Embedding, head and layers are the identity and ``fc`` adds one: drafts count up from what the slot read."""
    size = 16
    config = {**HEAD_CONFIG, "vocab_size": size, "hidden_size": size, "num_attention_heads": 2, "intermediate_size": 4}
    add_one, nothing = 5 * torch.eye(size).roll(1, 0), torch.zeros(size, size)
    tensors = {
        "fc.weight": torch.cat([add_one, nothing] if reads == "token" else [nothing, add_one], dim=1),
        "fc.bias": torch.zeros(size),
        **{f"layers.0.self_attn.{name}_proj.weight": torch.zeros(size, size) for name in "qkvo"},
        "layers.0.mlp.gate_proj.weight": torch.zeros(4, size),
        "layers.0.mlp.up_proj.weight": torch.zeros(4, size),
        "layers.0.mlp.down_proj.weight": torch.zeros(size, 4),
        "layers.0.post_attention_layernorm.weight": torch.ones(size),
    }

    class Identity:
        vocab_size = hidden_size = size
        backend = "known"

        def embed(self, tokens) -> Tensor:
            return torch.eye(size)[list(tokens)]

        def head(self, x: Tensor) -> Tensor:
            return x

    drafter = Eagle(save(tmp_path / "head", config, tensors), EagleOptions(top_k=1, depth=3))
    drafter.prepare(TargetParts(Identity()))
    text = [11, 2, 3, 7]
    state = observed(drafter, torch.eye(size)[text[:-1]])  # f_i marks its own token, for tokens 0 .. T-2
    draft = propose(drafter, state, view_of(text), Budget(3, 3))
    # By token: 7 is last, so 8, 9, 10. By feature: the last one known is that of the 3 before it, so 4, 5, 6.
    assert draft.tokens == (first, first + 1, first + 2)


# --- the protocol -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", [1, 2])
def test_features_that_are_missing_are_guessed(family, missing: int) -> None:
    """Each is the output of the slot before it; once the true ones are there nothing is left of the guesses."""
    tokens, features = text_and_features(9)
    count = len(features) - missing
    drafter, view = eagle(family), view_of(tokens)
    state = observed(drafter, features[:count])
    draft = propose(drafter, state, view, Budget(8, 8))
    guessed = features[:count]
    for known in range(count, len(features)):
        bare = observed(drafter, guessed)
        with torch.inference_mode():
            guessed = torch.cat((guessed, drafter._fill(bare, tokens[: known + 1])))
    expected = propose(drafter, observed(drafter, guessed), view, Budget(8, 8))
    assert (draft.tokens, draft.parents) == (expected.tokens, expected.parents)
    assert draft.scores == pytest.approx(expected.scores, rel=1e-4)  # fp32 forwards of other widths
    true = propose(drafter, observed(drafter, features), view, Budget(8, 8))
    assert draft.scores != pytest.approx(true.scores, rel=1e-4)
    drafter.observe(state, Verdict((), (), 0, (0,), (), taps={"norm": features[count:]}))
    caught_up = propose(drafter, state, view, Budget(8, 8))
    assert (caught_up.tokens, caught_up.parents) == (true.tokens, true.parents)
    assert caught_up.scores == pytest.approx(true.scores, rel=1e-4)


def test_without_the_features_of_the_text_so_far_nothing_is_proposed(family) -> None:
    tokens, features = text_and_features(6)
    drafter = eagle(family)
    state = observed(drafter, features[:4])
    assert propose(drafter, state, view_of([*tokens, 7, 8]), Budget(8, 8)) is EMPTY_DRAFT  # three are missing
    drafter.observe(state, Verdict((), (), 0, (0,), (), taps={"norm": features[4:]}))
    assert len(propose(drafter, state, view_of(tokens), Budget(8, 8))) == 8
    drafter.truncate(state, 4)  # two tokens came back and one was put in their place
    assert state.count == 4
    assert len(propose(drafter, state, view_of(tokens[:5]), Budget(8, 8))) == 8
    drafter.close(state)


def test_budget_depth_room_and_end_tokens_bound_the_tree(family) -> None:
    tokens, features = text_and_features(6)
    drafter = eagle(family, top_k=4, depth=5)
    state = observed(drafter, features)

    def draft(budget: Budget, **view) -> Draft:
        return propose(drafter, state, view_of(tokens, **view), budget)

    assert draft(Budget(0, 8)) is EMPTY_DRAFT
    assert draft(Budget(8, 8), remaining=1) is EMPTY_DRAFT
    assert max(draft(Budget(40, 8)).depths()) == 5
    assert max(draft(Budget(40, 2)).depths()) == 2
    assert max(draft(Budget(40, 8), remaining=4).depths()) == 3
    free = draft(Budget(12, 8))
    ended = draft(Budget(12, 8), stop_ids=frozenset({free.tokens[0]}))
    assert 0 in free.parents
    assert 0 not in ended.parents
    assert ended.tokens[0] == free.tokens[0]
    paid = draft(Budget(12, 8, min_score=0.2))
    assert 0 < len(paid) < len(free)
    assert min(paid.scores) > 0.2
