"""P-EAGLE's path network: trees against a dense recomputation, one forward a round, text, files."""

import math
from pathlib import Path

import pytest
import torch
from tiny_eagle import HIDDEN, VOCAB, load_family, save
from tiny_eagle3 import FLAT, IDS, head_tensors
from tiny_peagle import (
    PEAGLE_FLAT,
    PEAGLE_SPECULATORS,
    dense_logits,
    dense_outputs,
    on_all,
    peagle_folder,
    peagle_tensors,
)
from torch import Tensor
from torch.nn.functional import silu

from quantspec.core.drafter import TargetParts, View
from quantspec.core.noise import Stream
from quantspec.core.sampling import WarpChain
from quantspec.drafters.config import EagleOptions
from quantspec.drafters.eagle3_files import read_eagle3_config
from quantspec.drafters.feature_tree import FeatureState
from quantspec.drafters.peagle import PEagle
from quantspec.drafters.peagle_files import read_peagle, save_flat, save_speculators
from quantspec.errors import ModelError
from quantspec.types import Budget, Draft, SamplingParams, Verdict

RANK, TAPS = 6, (0, 1)
VARIANTS = {
    "two layers": {"rank": RANK},
    "whole vocabulary": {"rank": RANK, "ids": None},
    "3.1": {"rank": RANK, "flags": ("fc_norm", "norm_output")},
}


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory):
    root = tmp_path_factory.mktemp("peagle")
    heads = {name: peagle_folder(root / name, **options) for name, options in VARIANTS.items()}
    return load_family(root) | heads


def view_of(tokens: list[int], params: SamplingParams | None = None, stops: frozenset[int] = frozenset()) -> View:
    chain = WarpChain(params or SamplingParams(), tokens[:1], stops)
    return View(tuple(tokens), 1, chain, chain.start(), Stream(5), stops, 20, VOCAB)


def drafter_of(family, variant: str, top_k: int, depth: int = 5) -> PEagle:
    drafter = PEagle(family[variant], EagleOptions(depth=depth, top_k=top_k))
    drafter.prepare(TargetParts(family["target"]))
    return drafter


def observed(drafter: PEagle, streams: list[Tensor], view: View) -> FeatureState:
    state = drafter.open(view)
    drafter.observe(state, Verdict((), (), 0, (0,), ("target",), taps=dict(zip(TAPS, streams, strict=True))))
    return state


def propose(drafter: PEagle, state: FeatureState, view: View, budget: Budget) -> Draft:
    draft = drafter.propose([state], [view], [budget])[0]
    assert isinstance(draft, Draft)
    return draft


def text_and_streams(length: int) -> tuple[list[int], list[Tensor]]:
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(VOCAB, (length,), generator=generator).tolist()
    return tokens, [torch.randn(length - 1, HIDDEN, generator=generator) for _ in TAPS]


def paths_of(draft: Draft) -> list[tuple[int, ...]]:
    paths: list[tuple[int, ...]] = []
    for token, parent in zip(draft.tokens, draft.parents, strict=True):
        paths.append((*(paths[parent] if parent >= 0 else ()), token))
    return paths


class Expected:
    """What follows a path, by the formula, token by token."""

    def __init__(self, options: dict, streams: list[Tensor], tokens: list[int], depth: int) -> None:
        self.options, self.weight = options, peagle_tensors(**options)
        self.outputs = dense_outputs(options, streams, tokens, depth)
        self.rows = dense_logits(options, streams, tokens, depth)

    def after(self, path: tuple[int, ...]) -> Tensor:
        """``[1, V]``."""
        row = self.rows[len(path) : len(path) + 1]
        if not path:
            return row  # the first slot has read the token before it
        read = torch.cat([self.outputs[len(path)], self.weight["embed_tokens.weight"][path[-1]]])
        gate, up = (self.weight[f"path.{name}_proj.weight"] @ read for name in ("gate", "up"))
        down = self.weight["path.down_proj.weight"] @ (silu(gate) * up)
        return row + on_all(self.options, (self.weight["path.lm_head.weight"] @ down)[None], 0.0)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("params", [{}, {"temperature": 0.9}, {"temperature": 0.9, "repetition_penalty": 1.5}])
def test_every_node_is_one_of_the_best_after_the_tokens_above_it(family, variant: str, params: dict) -> None:
    tokens, streams = text_and_streams(9)
    depth, top_k, nodes = 4, 3, 14
    view, expected = view_of(tokens, SamplingParams(**params)), Expected(VARIANTS[variant], streams, tokens, depth)
    drafter = drafter_of(family, variant, top_k, depth)
    draft = propose(drafter, observed(drafter, streams, view), view, Budget(nodes, 9))
    assert len(draft) == nodes
    assert max(draft.depths()) == depth
    scores, corrected = {(): 0.0}, 0
    for path, score in zip(paths_of(draft), draft.scores, strict=True):
        *above, token = path
        row = view.scores(expected.after(tuple(above)), [above])[0]
        plain = view.scores(expected.rows[len(above)][None], [above])[0]
        assert token in row.topk(top_k).indices
        corrected += token not in plain.topk(top_k).indices
        scores[path] = scores[tuple(above)] + float(row[token])
        # Sums in another order, in fp32, and rows divided by the penalty before.
        assert math.log(score) == pytest.approx(scores[path], abs=1e-3)
    assert corrected, "some would not be there without the path"
    # The best of every level is expanded: the best path of all is there.
    best: tuple[int, ...] = ()
    while len(best) < 2:
        best = (*best, int(view.scores(expected.after(best), [best])[0].argmax()))
        assert best in scores


def test_a_chain_follows_its_own_tokens_in_one_forward(family, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, streams = text_and_streams(8)
    view, expected = view_of(tokens), Expected(VARIANTS["two layers"], streams, tokens, 5)
    drafter = drafter_of(family, "two layers", 1)
    sizes, forward = [], drafter._head.forward
    monkeypatch.setattr(drafter._head, "forward", lambda x, *rest: (sizes.append(len(x)), forward(x, *rest))[1])
    draft = propose(drafter, observed(drafter, streams, view), view, Budget(5, 5))
    chain: tuple[int, ...] = ()
    for _ in range(5):
        chain = (*chain, int(expected.after(chain).argmax()))
    assert draft.is_chain
    assert draft.tokens == chain
    assert sizes == [7 + 4]
    dear = Budget(5, 5, level_price=10.0)  # as a level is for a head that has yet to run it
    for budget, count in (
        (Budget(3, 9), 3),
        (Budget(9, 2), 2),
        (Budget(9, 9, draft.scores[3]), 3),
        (Budget(0, 0), 0),
        (dear, 5),
    ):
        assert propose(drafter, observed(drafter, streams, view), view, budget).tokens == chain[:count]
    ended = view_of(tokens, stops=frozenset({chain[2]}))
    assert propose(drafter, observed(drafter, streams, ended), ended, Budget(5, 5)).tokens == chain[:3]


PROMPTS = [[seed % VOCAB, (7 * seed) % VOCAB, 5] for seed in range(24)]
PARAMS = [
    SamplingParams(max_new_tokens=10),
    SamplingParams(max_new_tokens=10, temperature=0.8, top_p=0.95),
    SamplingParams(max_new_tokens=10, temperature=1.1, repetition_penalty=1.2),
] * 8


@pytest.mark.parametrize(("variant", "top_k"), [("two layers", 3), ("whole vocabulary", 1), ("3.1", 2)])
def test_text_is_that_of_plain_decoding(family, generate, variant: str, top_k: int) -> None:
    """Greedy, sampled, and with a penalty, in turn."""
    plain = generate(family["target"], PROMPTS, PARAMS, eos=frozenset({9})).texts
    drafter, budget = drafter_of(family, variant, top_k), Budget(5 * top_k, 5)
    run = generate(family["target"], PROMPTS, PARAMS, drafter, budget=budget, eos=frozenset({9}))
    assert run.texts == plain
    assert 1.02 <= run.acceptance <= 3.5  # proposals are accepted, and rejected


# --- files ------------------------------------------------------------------------------------------------------------


def test_both_written_forms_are_read_again(tmp_path: Path) -> None:
    written = peagle_tensors(rank=RANK)
    config, tensors, ids = read_peagle(save(tmp_path / "head", PEAGLE_SPECULATORS | {"path_rank": RANK}, written))
    assert config.path_rank == RANK
    assert tensors.keys() == written.keys() - {"d2t", "t2d"}
    save_flat(tmp_path / "flat", config, tensors, ids)
    names = {"verifier": "org/target", "verifier_architectures": ["LlamaForCausalLM"]}
    save_speculators(tmp_path / "speculators", config, tensors, ids, **names)
    for form in ("flat", "speculators"):
        again, same, same_ids = read_peagle(tmp_path / form)
        assert again.shapes() == config.shapes()
        assert ids is not None
        assert same_ids is not None
        assert ids.equal(same_ids)
        assert same.keys() == tensors.keys()
        assert all(tensor.equal(tensors[name]) for name, tensor in same.items())


def test_without_its_path_it_is_the_papers_head(tmp_path: Path) -> None:
    config, tensors, ids = read_peagle(peagle_folder(tmp_path / "head", rank=RANK))
    bare, rest = config.without_path(tensors)
    save_flat(tmp_path / "bare", bare, rest, ids)
    again, same, _ = read_peagle(tmp_path / "bare")
    assert again.path_rank == 0
    assert same.keys() == peagle_tensors().keys() - {"d2t", "t2d"}


@pytest.mark.parametrize(
    ("raw", "tensors", "message"),
    [
        (PEAGLE_FLAT, peagle_tensors(rank=RANK), "path.*_proj.weight has no place"),
        (PEAGLE_FLAT | {"path_rank": RANK}, peagle_tensors(), "no tensor path.gate_proj.weight"),
        (PEAGLE_FLAT | {"path_rank": 5}, peagle_tensors(rank=RANK), r"is \[12, 64\], but config.json asks for"),
        (PEAGLE_FLAT | {"path_rank": HIDDEN + 1}, peagle_tensors(rank=RANK), "path_rank must be a whole number"),
        (PEAGLE_FLAT | {"path_rank": 0}, peagle_tensors(), "from 1 to 32, not 0"),
        (PEAGLE_FLAT | {"path_rank": True}, peagle_tensors(), "not True"),
    ],
)
def test_a_wrong_checkpoint_is_one_line(tmp_path: Path, raw: dict, tensors: dict, message: str) -> None:
    with pytest.raises(ModelError, match=message) as refused:
        read_peagle(save(tmp_path / "head", raw, tensors))
    assert "\n" not in str(refused.value)


def test_an_eagle3_head_has_none(tmp_path: Path) -> None:
    folder = save(tmp_path / "head", FLAT | {"path_rank": RANK}, head_tensors(ids=IDS))
    with pytest.raises(ModelError, match="path_rank"):
        read_eagle3_config(folder)
