"""Rollouts, the EAGLE shift, unrolled draft steps and the offline measures, against slow or hand-made counterparts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from train_helpers import RUN, TINY

from quantspec.calibrate.train import measure
from quantspec.calibrate.train.checkpoint import load_net
from quantspec.calibrate.train.config import EagleConfig, RolloutConfig
from quantspec.calibrate.train.features import OnlineFeatures
from quantspec.calibrate.train.methods.eagle import EagleHead, EagleMethod
from quantspec.calibrate.train.net import LlamaNet
from quantspec.calibrate.train.prompts import Prompt
from quantspec.calibrate.train.rollout import Batch, Rollouts, fingerprint, generate, run, sample
from quantspec.errors import ModelError
from quantspec.models.atomic import write_json
from quantspec.models.json_files import read_object

MAX = 24
FOUR = torch.arange(4), torch.zeros(4, 1)


def greedy(net: torch.nn.Module, prompt: list[int]) -> list[int]:
    ids = list(prompt)
    while len(ids) < MAX and (len(ids) == len(prompt) or ids[-1] != 1):
        with torch.no_grad():
            ids.append(int(net(torch.tensor([ids]))[0, -1].argmax()))
    return ids


def texts_of(ids: torch.Tensor, features: torch.Tensor, prompt: int, temperature: float = 0.8) -> Rollouts:
    """One text."""
    return Rollouts(ids, features, torch.tensor([0, len(ids)]), torch.tensor([prompt]), torch.tensor([temperature]))


@pytest.fixture(scope="module")
def head() -> EagleHead:
    head = EagleHead(TINY).requires_grad_(False)
    generator = torch.Generator().manual_seed(11)
    for p in head.parameters():
        p.copy_(torch.randn(p.shape, generator=generator) * 0.2)
    return head


def test_greedy_rollouts_are_the_argmax_texts_and_end_at_eos(model: Path) -> None:
    net = load_net(model)
    net.model.embed_tokens.weight[1] *= 1.6  # the end token comes up now and then
    prompts = [[0, i, i + 3, 7 * i % 300] for i in range(4, 13)]
    config = RolloutConfig(model, model, model, slots=4, max_len=MAX)
    written = generate(net, (Prompt(np.array(p), 0.0) for p in prompts), config, [1])
    texts = {tuple(t.ids[:4].tolist()): t for t in written}
    assert len(texts) == len(prompts)
    assert {int(t.ids[-1]) == 1 for t in texts.values()} == {True, False}  # both ways to end were seen
    for prompt in prompts:
        text = texts[tuple(prompt)]
        assert text.ids.tolist() == greedy(net, prompt)
        features = net.features(text.ids[None].long())[0, :-1]
        # Features are stored in fp16: 11 bits of mantissa on values below 8.
        torch.testing.assert_close(text.features[:-1].float(), features, rtol=2e-3, atol=2e-3)
        assert not text.features[-1].any()


def test_samples_follow_the_distribution() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0]).expand(40_000, 4)
    drawn = sample(logits, torch.full((40_000,), 0.5), torch.Generator().manual_seed(0))
    shares = torch.bincount(drawn, minlength=4) / 40_000
    # Five standard deviations of a share at 40,000 draws are at most 0.0125.
    torch.testing.assert_close(shares, (logits[0] / 0.5).softmax(-1), rtol=0, atol=0.0125)
    assert sample(logits[:3], torch.zeros(3), torch.Generator()).tolist() == [2, 2, 2]


def test_prompts_end_at_the_answer_and_come_from_the_right_part(model: Path, corpus: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    from quantspec.calibrate.train.rollout import read_rollouts

    config = RolloutConfig(
        model, corpus, tmp_path, texts=6, slots=4, max_len=48, weights=(1.0, 0.0), held_out=True, run=RUN
    )
    assert run(config)["texts"] == 6
    texts, tokenizer = read_rollouts(tmp_path), Tokenizer.from_file(str(corpus / "tokenizer.json"))
    for i in range(6):
        start = int(texts.starts[i])
        prompt = tokenizer.decode(texts.ids[start : start + int(texts.prompt_lens[i])].tolist())
        assert prompt.endswith("?\nAnswer:")
        assert int(prompt.split()[3]) >= 32  # the held-out sums are 32 + 33 and on
    assert sorted(set(texts.temperatures.tolist())) == pytest.approx([0.0, 0.8, 1.0])


def test_weights_mark_what_predicts_generated_tokens() -> None:
    batch = Batch(torch.zeros(2, 6), torch.zeros(2, 6, 1), torch.tensor([6, 4]), torch.tensor([3, 2]))
    # Row t predicts token t + 1: the prompt's last row the first generated token, the last token none.
    assert batch.weights(0.25).tolist() == [[0.25, 0.25, 1, 1, 1, 0], [0.25, 1, 1, 0, 0, 0]]


def test_head_loss_sees_the_shifted_token_and_the_next_feature(model: Path, head: EagleHead) -> None:
    """Slot i reads token i + 1 and feature i, and is compared with feature i + 1: an oracle has no error."""
    net, config = load_net(model), EagleConfig(model, model, model, noise=0.0)
    ids = torch.tensor([[0, 10, 20, 30, 40, 50]])
    features = torch.randn(1, 6, TINY.hidden, generator=torch.Generator().manual_seed(2))
    features[0, -1] = 0

    class Oracle(EagleHead):
        def unrolled(self, embedded: torch.Tensor, given: torch.Tensor, steps: int) -> list[torch.Tensor]:
            assert embedded.equal(net.model.embed_tokens(ids[:, 1:]))
            assert given.equal(features[:, :-1])
            answer = torch.full_like(given, 9.0)
            answer[:, 1:-1] = features[:, 2:-1]  # slot 1 estimates f_2, and so on; slot 0 lies in the prompt
            return [answer] * steps

    batch = Batch(ids, features, torch.tensor([6]), torch.tensor([3]))
    method = EagleMethod(config, net, texts_of(ids[0], features[0], 3))
    method.net = Oracle(TINY)
    _, metrics = method.loss(batch, 0.0, torch.Generator())
    assert metrics["accuracy.0"] == 1.0
    assert metrics["feature.0"] == 0.0


def slow_chain(
    head: EagleHead, net: LlamaNet, ids: torch.Tensor, features: torch.Tensor, steps: int
) -> list[torch.Tensor]:
    """Draft `steps` deep by running the layer over the whole (mixed true and predicted) sequence every time."""
    embedded, given, outputs = net.model.embed_tokens(ids), features.clone(), []
    for _ in range(steps):
        out = head.unrolled(embedded[None, : len(given)], given[None], 1)[0][0]
        outputs.append(out[-1])
        given = torch.cat([given, out[-1:]])
    return outputs


def test_unrolled_steps_are_what_drafting_computes(model: Path, head: EagleHead) -> None:
    net, slots, steps = load_net(model), 9, 4
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 300, (slots,), generator=generator)  # t_1 .. t_9, the tokens that slots 0 .. 8 read
    features = torch.randn(slots, TINY.hidden, generator=generator)
    unrolled = head.unrolled(net.model.embed_tokens(ids)[None], features[None], steps)
    for first in range(slots - steps + 1):
        # True features up to slot `first`; then the head's own.
        expected = slow_chain(head, net, ids, features[: first + 1], steps)
        for step in range(steps):
            # fp32 with another order of sums, fed back up to three times; values are about 4.
            torch.testing.assert_close(unrolled[step][0, first + step], expected[step], rtol=1e-4, atol=1e-4)


def test_acceptance_counts_the_bonus_token() -> None:
    hit, miss = True, False
    # Chains of 2: [hit hit] + bonus, then [miss]: 4 tokens in 2 rounds.
    assert measure.chain_acceptance([[hit, hit, hit, miss]], 2) == 2.0
    assert measure.chain_acceptance([[miss, miss, miss]], 2) == 1.0


def test_tau_is_small_for_a_perfect_drafter_and_large_for_a_blind_one(model: Path) -> None:
    net = load_net(model)
    ids = torch.randint(2, 300, (30,), generator=torch.Generator().manual_seed(6)).int()
    texts = texts_of(ids, net.features(ids[None].long())[0].half(), 3)

    class Given(EagleHead):
        truth = 1.0

        def unrolled(self, embedded: torch.Tensor, given: torch.Tensor, steps: int) -> list[torch.Tensor]:
            return [texts.features.float()[None, 1:] * self.truth] * steps

    method, taus = EagleMethod(EagleConfig(model, model, model), net, texts), []
    for truth in (1.0, -1.0):
        method.net = Given(TINY)
        method.net.truth = truth
        taus.append(measure.fit_tau(method, OnlineFeatures(net, (), own=True), texts))
    assert set(taus[0]) == {"0", "0.8", "1"}
    for perfect, blind in zip(*(each.values() for each in taus), strict=True):
        assert perfect < blind


def test_a_saved_head_is_what_the_generating_side_reads(model: Path, head: EagleHead, tmp_path: Path) -> None:
    """The drafter's own implementation, on the saved folder, gives this net's outputs."""
    from quantspec.drafters.eagle_head import EagleHead as Drafter
    from quantspec.drafters.eagle_head import read_head

    net = load_net(model)
    method = EagleMethod(EagleConfig(model, model, tmp_path), net, texts_of(*FOUR, 2))
    method.net = head
    method.save(tmp_path, {"0.8": 0.6, "1": 0.7})
    saved = EagleHead(TINY)
    saved.load_state_dict({name: tensor.bfloat16().float() for name, tensor in head.state_dict().items()})
    drafter = Drafter(*read_head(tmp_path), torch.device("cpu"), torch.float32)
    assert drafter.config.tau_at(0.8) == 0.6
    again = EagleMethod(EagleConfig(model, model, model, start=tmp_path), net, method_texts := texts_of(*FOUR, 2))
    assert all(again.net.state_dict()[name].equal(tensor) for name, tensor in saved.state_dict().items())
    with pytest.raises(ModelError, match="another shape"):
        EagleMethod(EagleConfig(model, model, model, start=tmp_path, mlp=64), net, method_texts)
    tensors = {name: tensor for name, tensor in saved.state_dict().items() if name != "fc.bias"}
    save_file(tensors, tmp_path / "model.safetensors")
    write_json(tmp_path / "config.json", read_object(tmp_path / "config.json") | {"bias": False})
    with pytest.raises(ModelError, match=r"fc\.bias is in only one"):
        EagleMethod(EagleConfig(model, model, model, start=tmp_path), net, method_texts)
    slots, generator = 6, torch.Generator().manual_seed(8)
    features = torch.randn(slots, TINY.hidden, generator=generator)
    embedded = torch.randn(slots, TINY.hidden, generator=generator)
    with torch.no_grad():
        expected = saved.unrolled(embedded[None], features[None], 1)[0][0]
    mask = torch.full((slots, slots), -torch.inf).triu(1)
    got = drafter.forward(features, embedded, slice(0, slots), drafter.new_kv(slots), 0, mask)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)  # fp32, another order of sums
    assert len(fingerprint(model)) == 64
