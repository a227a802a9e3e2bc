"""Medusa heads: the loss against loops, what they start from, resuming to the same bits, and what is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from train_helpers import RUN, quick

from quantspec.calibrate.train import rollout
from quantspec.calibrate.train.checkpoint import load_net
from quantspec.calibrate.train.config import MedusaConfig, RolloutConfig
from quantspec.calibrate.train.methods import medusa
from quantspec.calibrate.train.methods.medusa import MedusaMethod
from quantspec.calibrate.train.rollout import Rollouts, fingerprint, read_rollouts
from quantspec.drafters.medusa_files import read_medusa
from quantspec.drafters.medusa_head import MedusaHead
from quantspec.engine.llm import load
from quantspec.types import SamplingParams


@pytest.fixture(scope="module")
def texts(model: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("rollouts") / "texts"
    rollout.run(RolloutConfig(model, corpus, out, texts=16, slots=8, max_len=48, run=RUN))
    return out


def method_of(model: Path, texts: Rollouts, **options) -> MedusaMethod:
    return MedusaMethod(MedusaConfig(model, model, model, **options), load_net(model), texts)


def moved(method: MedusaMethod) -> MedusaMethod:
    with torch.no_grad():
        for p in method.net.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(7)) * 0.05)
    return method


def test_heads_start_as_the_bases_own(model: Path, texts: Path) -> None:
    read = read_rollouts(texts)
    method = method_of(model, read, medusa_num_layers=2)
    features = read.features[:5].float()
    for head in range(4):
        assert method.net(features, head).equal(method.base.head(features))


def test_the_loss_is_that_of_loops_over_texts_slots_and_heads(model: Path, texts: Path) -> None:
    read = read_rollouts(texts)
    method = moved(method_of(model, read, medusa_num_heads=3, draft_vocab_size=200))
    loss, metrics = method.loss(read.batch([0, 1, 2]), 0.5, torch.Generator())
    losses, hits = [[], [], []], [[], [], []]
    for text in range(3):
        first, end, prompt = int(read.starts[text]), int(read.starts[text + 1]), int(read.prompt_lens[text])
        features = read.features[first:end].float()
        for slot in range(end - first - 1):
            for head in range(3):
                at = slot + 1 + head  # the row that draws the token `at + 1`, which must be a generated one
                if not prompt - 1 <= at < end - first - 1:
                    continue
                truth, logits = method.base.head(features[at]), method.net(features[slot], head)
                hits[head].append(int(method.ids[logits.argmax()]) == int(truth.argmax()))
                if int(truth.argmax()) in method.ids.tolist():
                    label = truth[method.ids].softmax(-1)
                    losses[head].append(-float((label * logits.log_softmax(-1)).sum().detach()))
    expected = sum(0.8**head * sum(each) / len(each) for head, each in enumerate(losses))
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-4)  # means in fp32, in another order
    assert [metrics[f"accuracy.{head}"] for head in range(3)] == pytest.approx([sum(h) / len(h) for h in hits])


@pytest.mark.parametrize("vocab", [0, 200])
def test_what_is_saved_computes_what_was_trained(model: Path, texts: Path, tmp_path: Path, vocab: int) -> None:
    read = read_rollouts(texts)
    method = moved(method_of(model, read, medusa_num_heads=2, medusa_num_layers=2, draft_vocab_size=vocab))
    method.save(tmp_path / "head", {"0.8": 0.6})
    config, tensors, ids = read_medusa(tmp_path / "head")
    assert (config.heads, config.layers, config.tau, config.base) == (2, 2, {0.8: 0.6}, fingerprint(model))
    assert (ids is None) == (not vocab)
    if ids is not None:
        assert ids.equal(method.ids)
    method.net.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})  # rounded alike
    features = read.features[:6].float()
    found = MedusaHead(config, tensors, torch.device("cpu"), torch.float32).logits(features, 2)
    for head in range(2):
        torch.testing.assert_close(found[head], method.net(features, head))


def test_heads_learn_resume_to_the_same_bits_and_are_measured(model: Path, texts: Path, tmp_path: Path) -> None:
    def config(out: Path, held: Path | None = None) -> MedusaConfig:
        return MedusaConfig(model, texts, out, held, medusa_num_heads=2, optim=quick(12, lr=0.01), run=RUN)

    result = medusa.run(config(tmp_path / "whole", texts))
    assert result["tree_acceptance"] > 1.0
    assert set(result["tau"]) == {"0", "0.8", "1"}
    rows = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    curve = [row["loss"] for row in rows if "loss" in row]
    assert sum(curve[-4:]) < sum(curve[:4])
    medusa.run(config(tmp_path / "cut"), stop_after=5)
    medusa.run(config(tmp_path / "cut"))
    one, two = (read_medusa(tmp_path / name)[1] for name in ("whole", "cut"))
    assert all(one[name].equal(two[name]) for name in one)
    head = str(tmp_path / "whole")
    # Trained heads change the text no more than random ones.
    plain, drafted = (
        load(str(model), **options) for options in ({"method": "none"}, {"method": "medusa", "head": head})
    )
    for params in (SamplingParams(max_new_tokens=24), SamplingParams(max_new_tokens=24, temperature=0.9, seed=4)):
        found = drafted.generate("What is 3 + 4?", params)
        assert found.token_ids == plain.generate("What is 3 + 4?", params).token_ids
        assert found.stats.drafted_tokens > 0
