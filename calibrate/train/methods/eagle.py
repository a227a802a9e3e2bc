"""Train an EAGLE-1/2 head (arXiv 2401.15077): fc over (embedding, feature), one decoder layer, the base's own head.

Slot i reads the feature f_i and the *next* token t_{i+1}, regresses f_{i+1}, and so predicts t_{i+2}. Training
simulates drafting (as HASS, arXiv 2408.15766): in step j a slot reads the feature that step j - 1 predicted one slot
earlier, and attends to true-feature slots up to i - j and then to the slots of its own draft, just as at generation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional as F

from quantspec.calibrate.train import workers
from quantspec.calibrate.train.checkpoint import llama_config
from quantspec.calibrate.train.config import EagleConfig, Shape
from quantspec.calibrate.train.loop import Metrics
from quantspec.calibrate.train.losses import mean_loss
from quantspec.calibrate.train.net import Layer, LlamaNet, rope_table
from quantspec.calibrate.train.rollout import Batch, Rollouts, fingerprint
from quantspec.calibrate.train.trainer import Guess, head_shape, train
from quantspec.drafters.eagle_head import read_head
from quantspec.errors import ModelError
from quantspec.models.atomic import make_folder, save_tensors, write_json
from quantspec.models.weights import to_dense
from quantspec.types import Tap


class EagleHead(nn.Module):
    """The trained part; embedding and LM head are the base's."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.fc = nn.Linear(2 * shape.hidden, shape.hidden, bias=True)
        self.layers = nn.ModuleList([Layer(shape, input_norm=False)])

    @property
    def layer(self) -> Layer:
        return cast(Layer, self.layers[0])

    def init_weights(self, seed: int) -> EagleHead:
        generator = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                std = 0.0 if name.endswith(("o_proj.weight", "down_proj.weight")) else p.shape[1] ** -0.5
                p.data.copy_(torch.randn(p.shape, generator=generator) * std)
        nn.init.zeros_(self.fc.bias)
        return self

    def mix_in(self, embedded: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """[..., hidden] from token embeddings and features; the embedding comes first."""
        return self.fc(torch.cat([embedded, features], dim=-1))

    def unrolled(self, embedded: torch.Tensor, features: torch.Tensor, steps: int) -> list[torch.Tensor]:
        """Predicted features [B, S, hidden] per draft step; slot i of step j has read true features up to slot i - j.

        `embedded` [B, S, hidden] of t_{i+1}, `features` [B, S, hidden] = f_i. Slots i < j of step j have no such past
        and carry no meaning.
        """
        layer = self.layer
        cos, sin = rope_table(self.shape, torch.arange(embedded.shape[1], device=embedded.device))
        keys: list[torch.Tensor] = []
        values: list[torch.Tensor] = []
        outputs: list[torch.Tensor] = []
        for step in range(steps):
            if step:
                features = _shift(outputs[-1], 1, dim=1)
            x = self.mix_in(embedded, features)
            q, k, v = layer.self_attn.qkv(x, cos, sin)
            groups = self.shape.heads // self.shape.kv_heads
            keys.append(k.repeat_interleave(groups, 1))
            values.append(v.repeat_interleave(groups, 1))
            if step:
                mixed = layer.self_attn.o_proj(_draft_attention(q, keys, values).transpose(1, 2).flatten(2))
            else:
                mixed = layer.self_attn.mix(q, k, v, None)
            x = x + mixed
            outputs.append(x + layer.mlp(layer.post_attention_layernorm(x)))
        return outputs


def _shift(x: torch.Tensor, by: int, dim: int) -> torch.Tensor:
    """x moved `by` slots to the right along `dim`; slot 0 is repeated."""
    return (
        torch.cat([x.narrow(dim, 0, 1).expand_as(x.narrow(dim, 0, by)), x.narrow(dim, 0, x.shape[dim] - by)], dim)
        if by
        else x
    )


def _draft_attention(q: torch.Tensor, keys: list[torch.Tensor], values: list[torch.Tensor]) -> torch.Tensor:
    """Draft step j = len(keys) - 1, all [B, heads, S, d]: slot i sees true slots to i - j, then its own draft."""
    step, slots = len(keys) - 1, q.shape[2]
    scores = q @ keys[0].mT
    seen = torch.ones(slots, slots, dtype=torch.bool, device=q.device).tril(-step)
    scores = scores.masked_fill(~seen, float("-inf"))
    own_keys = [_shift(k, step - m, dim=2) for m, k in enumerate(keys) if m]
    own = torch.stack([(q * k).sum(-1) for k in own_keys], dim=-1)
    weights = (torch.cat([scores, own], dim=-1) * q.shape[-1] ** -0.5).softmax(-1)
    out = weights[..., :slots] @ values[0]
    for m in range(1, step + 1):
        out = out + weights[..., slots + m - 1, None] * _shift(values[m], step - m, dim=2)
    return out


def run(config: EagleConfig, stop_after: int | None = None) -> dict[str, Any]:
    """Train (or go on training) a head and write it to `config.out`; see `trainer.train`."""
    if workers.wanted(config):
        return workers.launch(run, config)
    return train(config, partial(EagleMethod, config), stop_after)


class EagleMethod:
    """See `trainer.Method`: SmoothL1 on features plus a loss on distributions."""

    name = "eagle"
    taps: tuple[Tap, ...] = ()

    def __init__(self, config: EagleConfig, base: LlamaNet, texts: Rollouts) -> None:
        self.config, self.base = config, base
        self.shape = head_shape(config, base.shape)
        self.net = EagleHead(self.shape).init_weights(config.optim.seed).to(base.model.norm.weight.device)
        if config.start is not None:
            self._start_from(config.start)

    def _start_from(self, folder: Path) -> None:
        """Take a head's weights. Raises ``ModelError``."""
        (_, stored), own = read_head(folder), self.net.state_dict()
        tensors = {name: to_dense(weight).float() for name, weight in stored.items()}
        if name := min(tensors.keys() ^ own.keys(), default=None):
            raise ModelError(
                f"{folder}: {name} is in only one of that head and the one to train",
                hint="start from a head with a bias and without vocabularies of its own",
            )
        if name := next((name for name in own if own[name].shape != tensors[name].shape), None):
            raise ModelError(f"{folder}: {name} has another shape than this head's", hint="give its MLP width")
        self.net.load_state_dict(tensors)

    def loss(self, batch: Batch, progress: float, noise: torch.Generator) -> tuple[torch.Tensor, Metrics]:
        """Generated text only, steps discounted by `step_decay`."""
        config, truth = self.config, batch.features[:, 1:]
        rms = batch.features.pow(2).mean().sqrt()
        noisy = (torch.rand(truth.shape, generator=noise) * 2 - 1).to(truth.device) * config.noise * rms
        embedded = self.base.model.embed_tokens(batch.ids[:, 1:])
        unroll = config.unroll if progress >= config.unroll_from else 1
        steps = self.net.unrolled(embedded, batch.features[:, :-1] + noisy, unroll)
        wanted = batch.weights(0.0)[:, 1:] > 0
        total, metrics = torch.zeros((), device=truth.device), {}
        for j, predicted in enumerate(steps):
            rows = wanted.clone()
            rows[:, :j] = False
            expected, guess = truth[rows], predicted[rows]
            labels = self.base.head(expected).softmax(-1)
            logits = self.base.head(guess).float()
            soft = mean_loss(config.loss, logits, labels)
            regression = F.smooth_l1_loss(guess, expected)
            total = total + config.step_decay**j * (config.ce_weight * soft + config.feature_weight * regression)
            metrics[f"accuracy.{j}"] = float((logits.argmax(-1) == labels.argmax(-1)).float().mean())
            metrics[f"feature.{j}"] = float(regression.detach())
        return total, metrics

    @torch.no_grad()
    def guesses(self, batch: Batch) -> Iterator[Guess]:
        """See `trainer.Method`."""
        embedded, steps = self.base.model.embed_tokens(batch.ids[:, 1:]), max(2, self.config.unroll)
        for j, guess in enumerate(self.net.unrolled(embedded, batch.features[:, :-1], steps)):
            rows = batch.weights(0.0)[:, 1:] > 0
            rows[:, :j] = False
            yield self.base.head(batch.features[:, 1:][rows]), self.base.head(guess[rows])

    def save(self, out: Path, tau: Mapping[str, float]) -> None:
        """EAGLE-1/2 keys; embedding and LM head are left to the base."""
        make_folder(out)
        settings = {
            **llama_config(self.shape, self.base.vocab),
            "architectures": ["LlamaForCausalLMEagle"],
            "bias": True,
            "quantspec": {"base": fingerprint(self.config.base), "tau": dict(tau)},
        }
        write_json(out / "config.json", settings)
        tensors = {k: v.detach().to("cpu", torch.bfloat16) for k, v in self.net.state_dict().items()}
        save_tensors(out / "model.safetensors", tensors)
