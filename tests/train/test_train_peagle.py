"""P-EAGLE's training: which elements are drawn, what they see, that parts add up to the whole, and its files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.functional import smooth_l1_loss
from train_helpers import RUN, quick

from quantspec.calibrate.train.checkpoint import load_net
from quantspec.calibrate.train.config import Eagle3Config, PEagleConfig
from quantspec.calibrate.train.features import OnlineFeatures
from quantspec.calibrate.train.methods import peagle, peagle_rows
from quantspec.calibrate.train.methods.eagle3 import Eagle3Method
from quantspec.calibrate.train.methods.peagle import PEagleMethod
from quantspec.calibrate.train.methods.peagle_rows import AnchoredMask, parts, sample
from quantspec.calibrate.train.rollout import Batch, Rollout, Rollouts, fingerprint, write_rollouts
from quantspec.drafters.peagle_files import read_peagle
from quantspec.errors import ModelError, QuantSpecError, UsageError

DEPTHS = 4


def drawn(slots: int = 40, seed: int = 1, keep: float = 0.8) -> torch.Tensor:
    wanted = torch.arange(slots) >= 6
    return sample(wanted, slots, DEPTHS, keep, 0.2, torch.Generator().manual_seed(seed))


# --- elements ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("table", [True, False])
@pytest.mark.parametrize("slots", [1, 5, 12])
def test_the_mask_is_the_rule_of_every_pair(slots: int, table: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sample of a text no longer than the mask's, beside one with less of it and padding behind; by a table, and
    without one, as texts too long for a table have it."""
    monkeypatch.setattr(peagle_rows, "MOST_ENTRIES", (12 * DEPTHS) ** 2 - (not table))
    assert (AnchoredMask(12, DEPTHS).table is not None) == table
    whole = drawn(slots)
    batch = torch.stack([whole, whole.clone()])
    batch[1, len(whole) // 2 + 1 :] = -1
    for row, elements in zip(AnchoredMask(12, DEPTHS).of(batch), batch.tolist(), strict=True):
        for i, query in enumerate(elements):
            assert row[i].any()  # padding too: a softmax over nothing is not a number
            for j, key in enumerate(elements):
                (a, d), (b, e) = divmod(query, DEPTHS), divmod(key, DEPTHS)
                expected = key >= 0 and ((e == 0 and b <= a) or (a == b and e <= d))
                assert query < 0 or bool(row[i, j]) == expected, (query, key)


@pytest.mark.parametrize("seed", range(3))
def test_what_is_drawn_has_its_chain_and_is_as_much_as_asked(seed: int) -> None:
    elements = drawn(40, seed)
    assert elements.equal(elements.unique())
    kept = {(int(e) // DEPTHS, int(e) % DEPTHS) for e in elements}
    for depth, count in enumerate((40, 0.8 * 33, 0.64 * 32, 0.512 * 31)):
        slots = sorted(a + d for a, d in kept if d == depth)
        assert len(slots) == int(count)
        assert all(0 <= slot < 40 for slot in slots)
        assert not depth or min(slots) >= 6  # what is learned was generated
    assert all((a, d - 1) in kept for a, d in kept if d)
    assert not elements.equal(drawn(40, seed + 10))


def test_few_slots_keep_the_least_share_and_none_past_the_end() -> None:
    deep = sample(torch.ones(100, dtype=torch.bool), 100, 8, 0.5, 0.2, torch.Generator().manual_seed(0))
    counts = torch.bincount(deep % 8).tolist()
    assert counts == [100, int(99 * 0.5), int(98 * 0.25), *(int((100 - d) * 0.2) for d in range(3, 8))]
    assert sample(torch.ones(2, dtype=torch.bool), 2, 8, 1.0, 0.2, torch.Generator()).tolist() == [0, 1, 8]


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_parts_own_every_element_once_and_bring_all_that_theirs_see(count: int) -> None:
    elements, mask = drawn(20), AnchoredMask(20, DEPTHS)
    whole, owned = mask.of(elements[None])[0], []
    for chosen, own in parts(elements, 20, DEPTHS, count):
        owned += chosen[own].tolist()
        for element in chosen[own].tolist():
            seen = elements[whole[(elements == element).nonzero()[0, 0]]]
            assert set(seen.tolist()) <= set(chosen.tolist())
        assert bool((chosen[~own] % DEPTHS == 0).all())
    assert sorted(owned) == elements.tolist()


# --- loss and gradients -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def texts(model: Path) -> Rollouts:
    """Three texts of random tokens, and the base's true features."""
    net, generator, lens = load_net(model), torch.Generator().manual_seed(5), (22, 17, 9)
    ids = [torch.randint(2, 300, (n,), generator=generator) for n in lens]
    with torch.no_grad():
        features = torch.cat([net.features(each[None])[0] for each in ids])
    starts = torch.tensor([0, *lens]).cumsum(0)
    return Rollouts(torch.cat(ids).int(), features, starts, torch.tensor([4, 6, 3]), torch.zeros(3), fingerprint(model))


def method_of(model: Path, texts: Rollouts, **options) -> PEagleMethod:
    """All weights away from their start, where layers would be the identity."""
    config = PEagleConfig(model, model, model, layer_ids=(0, 1), layers=2, **{"depths": DEPTHS, **options})
    method, generator = PEagleMethod(config, load_net(model), texts), torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in method.net.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    return method


def batch_of(method: PEagleMethod, texts: Rollouts) -> Batch:
    return OnlineFeatures(method.base, method.taps, own=True).fill(texts.batch([0, 1, 2]))


def gradients(method: PEagleMethod, batch: Batch) -> tuple[float, dict[str, torch.Tensor], dict[str, float]]:
    method.net.zero_grad()
    loss, metrics = method.loss(batch, 0.5, torch.Generator().manual_seed(3))
    loss.backward()
    found = {name: p.grad.clone() for name, p in method.net.named_parameters() if p.grad is not None}
    return float(loss.detach()), found, metrics


def test_training_starts_from_either_kind_of_head(model: Path, texts: Rollouts, tmp_path: Path) -> None:
    """Layers that it lacks are the identity; an EAGLE-3 head's embedding and mask are those of a new one."""
    shape = {"draft_vocab_size": 200, "mlp": 128}
    first = method_of(model, texts, **shape)
    first.save(tmp_path / "head", {})
    config = PEagleConfig(model, model, model, layer_ids=(0, 1), layers=3, depths=DEPTHS, **shape)
    start = replace(config, start=tmp_path / "head")
    second = PEagleMethod(start, load_net(model), texts)
    for name, tensor in first.net.state_dict().items():
        assert second.net.state_dict()[name].equal(tensor.bfloat16().float()), name
    batch = batch_of(second, texts)
    shallow = PEagleMethod(replace(start, layers=2), load_net(model), texts)
    elements = torch.arange(3 * DEPTHS).expand(3, -1)
    assert second._outputs_of(batch, elements).equal(shallow._outputs_of(batch, elements))
    first.mask_token += 1
    first.save(tmp_path / "head", {})
    with pytest.raises(ModelError, match=r"masks with token \d+, these texts need \d+ least"):
        PEagleMethod(start, load_net(model), texts)
    eagle3 = Eagle3Method(
        Eagle3Config(model, model, model, layer_ids=(0, 1), layers=2, **shape), load_net(model), texts
    )
    eagle3.save(tmp_path / "eagle3", {})
    third = PEagleMethod(replace(config, start=tmp_path / "eagle3"), load_net(model), texts)
    assert third.net.embed_tokens.weight.equal(third.base.model.embed_tokens.weight)
    assert third.net.fc.weight.equal(eagle3.net.fc.weight.bfloat16().float())


@pytest.mark.parametrize(("count", "rank"), [(2, 0), (3, 8), (8, 0)])
def test_parts_give_the_gradients_of_the_whole(model: Path, texts: Rollouts, count: int, rank: int) -> None:
    method = method_of(model, texts, draft_vocab_size=200, fc_norm=True, feature_weight=3.0, path_rank=rank)
    batch = batch_of(method, texts)
    loss, whole, metrics = gradients(method, batch)
    assert len(whole) == len(list(method.net.parameters()))
    method.config = replace(method.config, partitions=count)
    split_loss, split, split_metrics = gradients(method, batch)
    assert split_loss == pytest.approx(loss, rel=1e-6)  # sums in another order, in fp32
    assert split_metrics == metrics
    for name, gradient in whole.items():
        assert float((split[name] - gradient).norm()) <= 1e-5 * float(gradient.norm()), name  # the promise


def test_features_are_learned_until_they_are_not(model: Path, texts: Rollouts) -> None:
    method = method_of(model, texts, draft_vocab_size=200, feature_weight=3.0, feature_until=0.6)
    batch, drawn = batch_of(method, texts), torch.Generator
    early, late = (float(method.loss(batch, at, drawn().manual_seed(3))[0]) for at in (0.59, 0.6))
    method.config = replace(method.config, feature_weight=0.0)
    assert late == float(method.loss(batch, 0.59, drawn().manual_seed(3))[0]) < early


@pytest.mark.parametrize(("weight", "rank"), [(0.0, 0), (3.0, 0), (0.0, 8)])
def test_the_loss_is_that_of_loops_over_texts_and_elements(
    model: Path, texts: Rollouts, weight: float, rank: int
) -> None:
    """Each element alone with what it sees, which must not depend on what else was drawn."""
    method = method_of(model, texts, draft_vocab_size=200, feature_weight=weight, path_rank=rank)
    loss, metrics = method.loss(batch_of(method, texts), 0.5, torch.Generator().manual_seed(3))
    generator, losses, right = torch.Generator().manual_seed(3), [], {}
    for text in range(3):
        batch = OnlineFeatures(method.base, method.taps, own=True).fill(texts.batch([text]))
        slots, prompt = int(batch.lens[0]) - 1, int(batch.prompt_lens[0])
        wanted = torch.tensor([prompt - 2 <= slot < slots - 1 for slot in range(slots)])
        for element in sample(wanted, slots, DEPTHS, 0.8, 0.2, generator).tolist():
            anchor, depth = divmod(element, DEPTHS)
            if not wanted[anchor + depth]:
                continue
            seen = [a * DEPTHS for a in range(anchor)] + [anchor * DEPTHS + d for d in range(depth + 1)]
            with torch.no_grad():
                output = method._outputs_of(batch, torch.tensor([seen]))[0, -1]
                apart = float(smooth_l1_loss(output, batch.features[0, anchor + depth + 1]))
                logits = method.net.lm_head(output)
                truth = method.base.head(batch.features[0, anchor + depth + 1])
                labels, alone = truth[method.ids].softmax(-1), logits
                if rank and depth:
                    logits = alone + path_of(method, output, int(batch.ids[0, anchor + depth + 1]))
            cross = -float((labels * logits.log_softmax(-1)).sum())
            if rank and depth:
                cross -= 0.25 * float((labels * alone.log_softmax(-1)).sum())
            losses.append(cross + weight * apart)
            right[text, anchor, depth] = int(method.ids[logits.argmax()]) == int(truth.argmax())
    assert float(loss.detach()) == pytest.approx(sum(losses) / len(losses), rel=1e-4)  # means in fp32, in another order
    for depth in range(DEPTHS):
        asked = [hit for (t, a, d), hit in right.items() if d == depth and all(right.get((t, a, e)) for e in range(d))]
        assert metrics[f"accuracy.{depth}"] == pytest.approx(sum(asked) / max(len(asked), 1))


def path_of(method: PEagleMethod, output: torch.Tensor, before: int) -> torch.Tensor:
    """What the path network adds after a token."""
    weight = {name: p.detach() for name, p in method.net.named_parameters()}
    read = torch.cat([output, weight["embed_tokens.weight"][before]])
    gate, up = (weight[f"path.{name}_proj.weight"] @ read for name in ("gate", "up"))
    return weight["path.lm_head.weight"] @ (weight["path.down_proj.weight"] @ (torch.nn.functional.silu(gate) * up))


@pytest.mark.parametrize("rank", [0, 2])
def test_guesses_are_those_of_chains_whose_tokens_were_right_so_far(model: Path, texts: Rollouts, rank: int) -> None:
    method = method_of(model, texts, draft_vocab_size=2, path_rank=rank)
    whole = method.base.head
    method.base.head = lambda x: whole(x) - 50.0 * ~method.drafted  # a choice of two, so that some guesses are right
    batch = OnlineFeatures(method.base, method.taps, own=True).fill(texts.batch([0]))
    slots, prompt, alive = int(batch.lens[0]) - 1, int(batch.prompt_lens[0]), None
    for depth, (truth, guess) in enumerate(method.guesses(batch)):
        starts = range(prompt - 2, slots - 1) if alive is None else alive
        starts = [anchor for anchor in starts if anchor + depth < slots - 1]
        assert len(truth) == len(guess) == len(starts)
        alive = []
        for anchor, expected, row in zip(starts, truth, guess, strict=True):
            seen = [a * DEPTHS for a in range(anchor)] + [anchor * DEPTHS + d for d in range(depth + 1)]
            with torch.no_grad():
                output = method._outputs_of(batch, torch.tensor([seen]))[0, -1]
                logits = method.net.lm_head(output)
                if rank and depth:
                    logits = logits + path_of(method, output, int(batch.ids[0, anchor + depth + 1]))
                base = method.base.head(batch.features[0, anchor + depth + 1])
            # fp32 sums over other numbers of keys; logits are about 2
            torch.testing.assert_close(row[method.ids], logits, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(expected, base, rtol=1e-4, atol=1e-4)
            alive += [anchor] if int(row.argmax()) == int(base.argmax()) else []
        assert depth or 0 < len(alive) < len(starts)
    assert depth == DEPTHS - 1


@pytest.mark.parametrize("loss", ["kl", "lk"])
def test_other_losses_are_those_of_the_same_rows(model: Path, texts: Rollouts, loss: str) -> None:
    """KL is cross-entropy less the labels' entropy, with the same gradient; LK lies below it."""
    methods = {name: method_of(model, texts, loss=name) for name in ("ce", loss)}
    batch = batch_of(methods["ce"], texts)
    (ce, gradient, _), (other, others, _) = (gradients(method, batch) for method in methods.values())
    assert 0 < other < ce
    for name, expected in gradient.items():
        if loss == "kl":
            assert float((others[name] - expected).norm()) <= 1e-4 * float(expected.norm()), name  # fp32
    assert loss == "kl" or not others["fc.weight"].allclose(gradient["fc.weight"], rtol=0.01)


# --- files and the recipe ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 8])
def test_a_saved_head_drafts_what_training_saw(model: Path, texts: Rollouts, tmp_path: Path, rank: int) -> None:
    """The drafter's chain is the argmax of the net's own elements, in the checkpoint's bf16."""
    from quantspec.core.drafter import TargetParts, View
    from quantspec.core.noise import Stream
    from quantspec.core.sampling import WarpChain
    from quantspec.drafters.config import EagleOptions
    from quantspec.drafters.peagle import PEagle
    from quantspec.models.load import load_model
    from quantspec.types import Budget, SamplingParams, Verdict

    method = method_of(model, texts, draft_vocab_size=200, norm_output=True, path_rank=rank)
    with torch.no_grad():
        for p in method.net.parameters():
            p.copy_(p.bfloat16().float())
    method.save(tmp_path / "head", {"0.8": 0.6})
    config, tensors, ids = read_peagle(tmp_path / "head")
    assert config.mask_token_id == method.mask_token
    assert (config.head.taps, config.head.tau, config.head.flags) == ((0, 1), {0.8: 0.6}, {"norm_output"})
    assert ids is not None
    assert ids.equal(method.ids)
    assert tensors.keys() == method.net.state_dict().keys()

    batch, chain = OnlineFeatures(method.base, method.taps, own=True).fill(texts.batch([0])), DEPTHS
    drafter, tokens = PEagle(tmp_path / "head", EagleOptions(depth=chain, top_k=1)), batch.ids[0, :12].tolist()
    drafter.prepare(TargetParts(load_model(model)))
    warp = WarpChain(SamplingParams(), tokens[:1], frozenset())
    view = View(tuple(tokens), 1, warp, warp.start(), Stream(5), frozenset(), 20, method.base.vocab)
    state = drafter.open(view)
    drafter.observe(state, Verdict((), (), 0, (0,), (), taps={tap: batch.streams[tap][0, :11] for tap in (0, 1)}))
    elements = [a * DEPTHS for a in range(10)] + [10 * DEPTHS + d for d in range(chain)]
    with torch.no_grad():
        outputs = method._outputs_of(batch, torch.tensor([elements]))[0, -chain:]
        rows, expected = method.net.lm_head(outputs), list[int]()
        for depth in range(chain):
            added = path_of(method, outputs[depth], expected[-1]) if rank and depth else 0.0
            expected.append(int(method.ids[(rows[depth] + added).argmax()]))
    assert not rank or expected != method.ids[rows.argmax(-1)].tolist()
    draft = drafter.propose([state], [view], [Budget(chain, chain)])[0]
    assert list(draft.tokens) == expected


def rollouts_folder(model: Path, texts: Rollouts, folder: Path) -> Path:
    spans = zip(texts.starts.tolist(), texts.starts[1:].tolist(), texts.prompt_lens.tolist(), strict=False)
    written = [Rollout(texts.ids[a:b], texts.features[a:b].half(), prompt, 0.0) for a, b, prompt in spans]
    write_rollouts(folder / "part-0.safetensors", written * 2, fingerprint(model))
    return folder


def test_the_recipe_learns_goes_on_and_starts_from_an_eagle3_head(model: Path, texts: Rollouts, tmp_path: Path) -> None:
    written = rollouts_folder(model, texts, tmp_path / "rollouts")
    eagle3 = Eagle3Method(Eagle3Config(model, written, model, layer_ids=(0, 1)), load_net(model), texts)
    eagle3.save(tmp_path / "eagle3", {})
    config = PEagleConfig(
        model, written, tmp_path / "out", layer_ids=(0, 1), layers=2, depths=3, start=tmp_path / "eagle3",
        optim=quick(24, lr=0.01), run=RUN,
    )  # fmt: skip
    started = PEagleMethod(config, load_net(model), texts).net.state_dict()
    for name, tensor in eagle3.net.state_dict().items():
        assert started[name].equal(tensor.bfloat16().float())
    peagle.run(config, stop_after=4)
    result = peagle.run(config)
    assert result["steps"] == 24
    rows = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == 24
    assert losses[-1] < 0.9 * losses[0]  # of a base whose own entropy is most of it
    assert read_peagle(tmp_path / "out")[0].head.model.num_layers == 2


def test_a_path_network_starts_where_there_was_none(model: Path, texts: Rollouts, tmp_path: Path) -> None:
    """It adds nothing at first; a head that has one needs its rank."""
    first = method_of(model, texts, path_rank=8, mlp=128)
    bare = method_of(model, texts, mlp=128)
    for name, method in (("with", first), ("bare", bare)):
        method.save(tmp_path / name, {})
    config = PEagleConfig(model, model, model, layer_ids=(0, 1), layers=2, depths=DEPTHS, mlp=128, path_rank=8)
    fresh = PEagleMethod(replace(config, start=tmp_path / "bare"), load_net(model), texts)
    batch = batch_of(fresh, texts)
    for (truth, guess), (same, plain) in zip(fresh.guesses(batch), bare.guesses(batch), strict=True):
        assert truth.equal(same)
        torch.testing.assert_close(guess, plain, rtol=0.05, atol=0.05)  # one of them in the checkpoint's bf16
    again = PEagleMethod(replace(config, start=tmp_path / "with"), load_net(model), texts)
    assert again.net.state_dict()["path.up_proj.weight"].equal(first.net.path.up_proj.weight.bfloat16().float())
    with pytest.raises(ModelError, match=r"path\.\w+\.weight has another shape") as refused:
        PEagleMethod(replace(config, start=tmp_path / "with", path_rank=0), load_net(model), texts)
    assert refused.value.hint == "give its path rank"


def test_a_path_begins_with_what_the_lm_head_says_most(model: Path, texts: Rollouts) -> None:
    method = PEagleMethod(PEagleConfig(model, model, model, layer_ids=(0, 1), path_rank=8), load_net(model), texts)
    assert method.net.path is not None
    weight, path = method.net.lm_head.weight.detach(), method.net.path.lm_head.weight.detach()
    u, s, _ = torch.linalg.svd(weight.double(), full_matrices=False)
    best = (u[:, :8] * s[:8] ** 2) @ u[:, :8].T
    # Eigenvectors of W^T W in fp32 err by 1e-7 of the largest eigenvalue over the gap to the next one.
    assert float((path.double() @ path.double().T - best).norm() / best.norm()) < 1e-3
    assert s[7] > 1.001 * s[8]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path_rank": 33}, "a path's rank of 33 is above 32, the rank of the base's LM head"),
        ({"path_rank": 21, "draft_vocab_size": 20}, "above 20, the rank of an LM head of the draft vocabulary"),
        ({"path_rank": -1}, "a path's rank at least 0"),
        ({"keep": 0.0}, "keep 0.0"),
        ({"depths": 0}, "at least 1"),
        ({"partitions": 0}, "at least 1"),
        ({"draft_vocab_size": 100}, "drafts other tokens"),
        ({"layer_ids": (1,)}, "reads its base otherwise"),
        ({"mlp": 64}, "another shape"),
    ],
)
def test_what_cannot_be_is_told(model: Path, texts: Rollouts, tmp_path: Path, options: dict, message: str) -> None:
    head = Eagle3Method(
        Eagle3Config(model, model, model, layer_ids=(0, 1), draft_vocab_size=200), load_net(model), texts
    )
    head.save(tmp_path / "eagle3", {})
    given = {"layer_ids": (0, 1), "draft_vocab_size": 200, "start": tmp_path / "eagle3", **options}
    config = PEagleConfig(model, model, model, **given)
    with pytest.raises(QuantSpecError, match=message) as refused:
        PEagleMethod(config, load_net(model), texts)
    assert isinstance(refused.value, UsageError | ModelError)
    assert "\n" not in str(refused.value)
