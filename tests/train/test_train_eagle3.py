"""EAGLE-3's training-time test against drafting slot by slot, its loss against loops, its vocabulary and its files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.functional import normalize, smooth_l1_loss
from train_helpers import TINY

from quantspec.calibrate.train.checkpoint import fake_quantize, load_net
from quantspec.calibrate.train.config import Eagle3Config, Optim
from quantspec.calibrate.train.features import OnlineFeatures
from quantspec.calibrate.train.methods.eagle3 import Eagle3Method, default_taps
from quantspec.calibrate.train.methods.eagle3_net import Eagle3Net, Flags
from quantspec.calibrate.train.rollout import Batch, Rollouts, fingerprint
from quantspec.calibrate.train.trainer import loss_under, simulated_length
from quantspec.calibrate.train.vocabulary import draft_vocabulary
from quantspec.drafters.eagle3_files import read_eagle3
from quantspec.drafters.eagle3_head import FLAGS, Eagle3Head
from quantspec.drafters.eagle3_head import Eagle3Config as HeadConfig
from quantspec.errors import ModelError, UsageError
from quantspec.models.config import ModelConfig
from quantspec.numerics.scheme import Scheme

VOCAB = 384
SLOTS, STEPS, TAPS = 9, 4, 2


def random_net(layers: int, flags: tuple[str, ...], vocab: int = 50) -> Eagle3Net:
    shape = replace(TINY, layers=layers)
    net = Eagle3Net(shape, TINY.hidden, TAPS, vocab, Flags(**dict.fromkeys(flags, True))).requires_grad_(False)
    generator = torch.Generator().manual_seed(11)
    for p in net.parameters():
        p.copy_(torch.randn(p.shape, generator=generator) * 0.2)
    return net


def generating(net: Eagle3Net) -> Eagle3Head:
    """The drafter's own implementation of the same head."""
    shape, flags = net.shape, frozenset(name for name, on in vars(net.flags).items() if on)
    layer = {
        "model_type": "llama", "vocab_size": VOCAB, "hidden_size": shape.hidden, "intermediate_size": shape.mlp,
        "num_hidden_layers": shape.layers, "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads, "head_dim": shape.head_dim, "max_position_embeddings": 64,
        "rope_theta": shape.rope_theta, "rms_norm_eps": shape.rms_eps,
    }  # fmt: skip
    config = HeadConfig(ModelConfig.of(layer), layer, TINY.hidden, net.lm_head.out_features, (0, 1), flags)
    assert config.shapes() == {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}
    return Eagle3Head(config, net.state_dict(), torch.device("cpu"), torch.float32)


def drafted(head: Eagle3Head, embedded: torch.Tensor, streams: list[torch.Tensor], slot: int) -> list[torch.Tensor]:
    """Logits of a chain that starts at ``slot``: its slots so far at once, then one at a time on its own output."""
    kv, features = head.new_kv(SLOTS + STEPS), head.fuse([stream[: slot + 1] for stream in streams])
    bias = torch.full((slot + 1, slot + 1), -torch.inf).triu(1)
    output = head.forward(features, embedded[: slot + 1], slice(0, slot + 1), kv, 0, bias)[-1:]
    logits = [head.logits(output)[0]]
    for position in range(slot + 1, min(slot + STEPS, SLOTS)):
        one = slice(position, position + 1)
        output = head.forward(output, embedded[one], one, kv, position, torch.zeros(1, 1))
        logits.append(head.logits(output)[0])
    return logits


@pytest.mark.parametrize(
    ("layers", "flags"),
    [
        (1, ()),
        (1, ("fc_norm", "norm_output")),
        (1, ("norm_before_fc", "norm_before_residual")),
        (3, ()),
        (2, FLAGS[:2]),
    ],
)
def test_the_training_time_test_is_what_drafting_computes(layers: int, flags: tuple[str, ...]) -> None:
    net, generator = random_net(layers, flags), torch.Generator().manual_seed(3)
    embedded = torch.randn(SLOTS, TINY.hidden, generator=generator)
    streams = [torch.randn(SLOTS, TINY.hidden, generator=generator) for _ in range(TAPS)]
    slots = torch.tensor([[7, 2, 3, 8, 0]])
    outputs = net.unrolled(embedded[None], net.fuse([stream[None] for stream in streams]), STEPS, slots)
    head = generating(net)
    for place, slot in enumerate(slots[0].tolist()):
        for step, logits in enumerate(drafted(head, embedded, streams, slot)):
            # fp32 with another order of sums, fed back up to three times; values are about 2.
            torch.testing.assert_close(net.lm_head(outputs[step][0, place]), logits, rtol=1e-4, atol=1e-4)


def test_padding_and_later_tokens_change_nothing() -> None:
    """Slot i of step j reads nothing past token i + 1 + j."""
    net, generator = random_net(1, ()), torch.Generator().manual_seed(4)
    embedded = torch.randn(1, SLOTS, TINY.hidden, generator=generator)
    state = torch.randn(1, SLOTS, TINY.hidden, generator=generator)
    slots = torch.arange(6)[None]
    whole = net.unrolled(embedded, state, STEPS, slots)
    cut = net.unrolled(embedded[:, :6], state[:, :6], STEPS, slots)
    for step in range(STEPS):
        kept = slice(0, 6 - step)
        torch.testing.assert_close(whole[step][:, kept], cut[step][:, kept], rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def texts(model: Path) -> Rollouts:
    """Two texts of random tokens, and the base's true features."""
    net, generator = load_net(model), torch.Generator().manual_seed(5)
    ids = [torch.randint(2, 300, (n,), generator=generator) for n in (12, 9)]
    features = torch.cat([net.features(each[None])[0] for each in ids])
    starts, prompts = torch.tensor([0, 12, 21]), torch.tensor([4, 3])
    return Rollouts(torch.cat(ids).int(), features, starts, prompts, torch.zeros(2), fingerprint(model))


def method_of(model: Path, texts: Rollouts, **options) -> Eagle3Method:
    config = Eagle3Config(model, model, model, layer_ids=(0, 1), unroll=3, unroll_from=0.0, **options)
    return Eagle3Method(config, load_net(model), texts)


def batch_of(method: Eagle3Method, texts: Rollouts) -> Batch:
    return OnlineFeatures(method.base, method.taps, own=True).fill(texts.batch([0, 1]))


@pytest.mark.parametrize("weight", [0.0, 10.0])
def test_the_loss_is_that_of_loops_over_texts_slots_and_steps(model: Path, texts: Rollouts, weight: float) -> None:
    method = method_of(model, texts, draft_vocab_size=200, feature_weight=weight)
    with torch.no_grad():
        for p in method.net.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(7)) * 0.05)
    loss, metrics = method.loss(batch_of(method, texts), 0.5, torch.Generator())
    head, losses, hits, apart = generating(method.net), [[], [], []], [[], [], []], [[], [], []]
    for text in range(2):
        batch = texts.batch([text])
        length, prompt = int(batch.lens[0]), int(batch.prompt_lens[0])
        streams = [stream[0] for stream in method.base.streams(batch.ids, (0, 1)).values()]
        embedded = method.base.model.embed_tokens(batch.ids[0, 1:])
        truth = method.base.head(batch.features[0])
        for slot in range(prompt - 2, length - 1):  # the first draft follows the first generated token
            bias, kv = torch.full((slot + 1, slot + 1), -torch.inf).triu(1), head.new_kv(length + 4)
            with torch.no_grad():
                features = head.fuse([stream[: slot + 1] for stream in streams])
                output = head.forward(features, embedded[: slot + 1], slice(0, slot + 1), kv, 0, bias)[-1:]
                for step in range(3):
                    at = slot + 1 + step  # the row of the base that draws the token drafted here
                    if at >= length - 1:
                        break
                    if step:
                        one = slice(slot + step, slot + step + 1)
                        output = head.forward(output, embedded[one], one, kv, slot + step, torch.zeros(1, 1))
                    logits, choice = head.logits(output)[0], int(truth[at].argmax())
                    hits[step].append(int(method.ids[logits.argmax()]) == choice)
                    normed = method.net.norm(output[0])
                    apart[step].append(float(smooth_l1_loss(normed, batch.features[0, at])))
                    if choice in method.ids:
                        label = truth[at][method.ids].softmax(-1)
                        losses[step].append(-float((label * logits.log_softmax(-1)).sum()))
    assert any(len(a) != len(b) for a, b in zip(losses, hits, strict=True))  # the vocabulary lacks some choices
    means = [sum(a) / len(a) + weight * sum(b) / len(b) for a, b in zip(losses, apart, strict=True)]
    expected = sum(0.8**step * mean for step, mean in enumerate(means))
    assert float(loss) == pytest.approx(expected, rel=1e-4)  # means in fp32, in another order
    assert [metrics[f"accuracy.{step}"] for step in range(3)] == pytest.approx([sum(h) / len(h) for h in hits])


def test_a_step_teaches_those_before_it(model: Path, texts: Rollouts) -> None:
    """The state is handed on with its gradient: `fc` is read in step 0 alone, and learns from step 2."""
    method = method_of(model, texts)
    with torch.no_grad():  # layers start as the identity, through which the output would not see the embedding
        for p in method.net.layers.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(8)) * 0.1)
    *_, (_, last) = method._chains(batch_of(method, texts), 3)
    last.logsumexp(-1).sum().backward()
    assert float(method.net.fc.weight.grad.abs().sum()) > 0


def test_the_vocabulary_is_the_commonest_of_the_answers_then_the_lowest() -> None:
    ids = torch.tensor([9, 9, 9, 5, 7, 7, 3, 9, 2, 7, 4, 2]).int()
    texts = Rollouts(ids, torch.zeros(12, 1), torch.tensor([0, 7, 12]), torch.tensor([3, 2]), torch.zeros(2))
    # Answers: 5 7 7 3 and 2 7 4 2.
    assert draft_vocabulary(texts, 12, 2).tolist() == [2, 7]
    assert draft_vocabulary(texts, 12, 7).tolist() == [0, 1, 2, 3, 4, 5, 7]
    with pytest.raises(UsageError, match="13 tokens"):
        draft_vocabulary(texts, 12, 13)


def test_a_saved_head_says_what_it_was_trained_on(model: Path, texts: Rollouts, tmp_path: Path) -> None:
    method = method_of(model, texts, draft_vocab_size=200, fc_norm=True, norm_output=True, mlp=64)
    method.save(tmp_path / "head", {"0.8": 0.6})
    config, tensors, ids = read_eagle3(tmp_path / "head")
    assert (config.taps, config.flags, config.tau) == ((0, 1), {"fc_norm", "norm_output"}, {0.8: 0.6})
    assert config.base == fingerprint(model)
    assert config.model.intermediate_size == 64
    assert ids is not None
    assert ids.equal(method.ids)
    for name, tensor in method.net.state_dict().items():
        assert tensors[name].equal(tensor.bfloat16())


def test_a_kept_lm_head_stays_the_bases_while_all_else_learns(model: Path, texts: Rollouts) -> None:
    base = load_net(model)
    method = Eagle3Method(Eagle3Config(model, model, model, layer_ids=(0, 1), keep_lm_head=True), base, texts)
    batch = OnlineFeatures(base, method.taps, own=False).fill(texts.batch([0, 1]))
    loss, _ = method.loss(batch, 1.0, torch.Generator())
    loss.backward()
    assert torch.equal(method.net.lm_head.weight, base.head_weight[method.ids])
    assert {name for name, p in method.net.named_parameters() if p.grad is None} == {"lm_head.weight"}


def test_a_head_that_learns_features_starts_from_them(model: Path, texts: Rollouts) -> None:
    """Fused taps that end in the last layer are the base's features but for the length of each row."""
    method, features = method_of(model, texts, feature_weight=10.0), texts.batch([0]).features
    streams = method.base.streams(texts.batch([0]).ids, (0, 1))
    assert method.base.shape.layers == 2
    state = method.net.fuse([streams[0], streams[1]])
    torch.testing.assert_close(normalize(state, dim=-1), normalize(features, dim=-1), rtol=0, atol=1e-5)  # fp32


def test_features_are_learned_until_they_are_not(model: Path, texts: Rollouts) -> None:
    with_features, without = (method_of(model, texts, feature_weight=w, feature_until=0.6) for w in (10.0, 0.0))
    without.net.load_state_dict(with_features.net.state_dict())
    batch = batch_of(without, texts)
    early, late, tokens_alone = (
        float(method.loss(batch, progress, torch.Generator())[0])
        for method, progress in ((with_features, 0.59), (with_features, 0.6), (without, 0.59))
    )
    assert late == tokens_alone < early


def test_training_starts_from_a_head(model: Path, texts: Rollouts, tmp_path: Path) -> None:
    first = method_of(model, texts, draft_vocab_size=200, mlp=128)
    first.save(tmp_path / "head", {})
    second = method_of(model, texts, draft_vocab_size=200, mlp=128, start=tmp_path / "head", optim=Optim(seed=7))
    for name, tensor in first.net.state_dict().items():
        assert second.net.state_dict()[name].equal(tensor.bfloat16().float()), name
    with pytest.raises(ModelError, match="another shape"):
        method_of(model, texts, draft_vocab_size=200, mlp=256, start=tmp_path / "head")
    with pytest.raises(ModelError, match="drafts other tokens"):
        method_of(model, texts, mlp=128, start=tmp_path / "head")


def test_taps_are_checked_and_simulated_length_multiplies(model: Path, texts: Rollouts) -> None:
    assert default_taps(32) == (1, 15, 28)
    with pytest.raises(UsageError, match="no default taps"):
        default_taps(2)
    with pytest.raises(UsageError, match="2 layers"):
        Eagle3Method(Eagle3Config(model, model, model, layer_ids=(0, 2)), load_net(model), texts)
    assert simulated_length({"accuracy.0": 0.5, "accuracy.1": 0.4, "loss": 3.0}) == pytest.approx(1.7)


def test_the_last_part_of_training_learns_rounded_weights(model: Path, texts: Rollouts) -> None:
    """The loss is that of a net whose matrices were rounded, and its gradient arrives at the unrounded ones."""
    method, rounded, scheme = method_of(model, texts), method_of(model, texts), Scheme(4, 32)
    with torch.no_grad():
        for (name, p), own in zip(rounded.net.named_parameters(), method.net.parameters(), strict=True):
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))))
            own.copy_(p)
            if p.dim() == 2:
                p.copy_(fake_quantize(p, scheme))
    batch = batch_of(method, texts)
    loss, _ = loss_under(method, scheme, batch, 1.0, torch.Generator())
    expected, _ = rounded.loss(batch, 1.0, torch.Generator())
    # In fp32 w + (r - w) is r up to rounding.
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    unrounded, _ = method.loss(batch, 1.0, torch.Generator())
    assert float(loss.detach()) != pytest.approx(float(unrounded.detach()), rel=1e-4)
    loss.backward()
    expected.backward()
    for p, other in zip(method.net.parameters(), rounded.net.parameters(), strict=True):
        torch.testing.assert_close(p.grad, other.grad, rtol=1e-3, atol=1e-6)
