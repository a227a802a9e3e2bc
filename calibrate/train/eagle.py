"""Train an EAGLE-1/2 head (arXiv 2401.15077): fc over (embedding, feature), one decoder layer, the base's own head.

Slot i reads the feature f_i and the *next* token t_{i+1}, regresses f_{i+1}, and so predicts t_{i+2}. Training
simulates drafting (as HASS, arXiv 2408.15766): in step j a slot reads the feature that step j - 1 predicted one slot
earlier, and attends to true-feature slots up to i - j and then to the slots of its own draft, just as at generation.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from quantspec.calibrate.train import workers
from quantspec.calibrate.train.checkpoint import llama_config, load_net
from quantspec.calibrate.train.config import EagleConfig, Shape
from quantspec.calibrate.train.loop import Metrics, fit
from quantspec.calibrate.train.net import Layer, LlamaNet, rope_table
from quantspec.calibrate.train.rollout import Batch, RolloutBatches, fingerprint, read_rollouts
from quantspec.errors import ModelError
from quantspec.models.atomic import make_folder, save_tensors, write_json


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
    """Train (or go on training) a head and write it to `config.out`; returns steps, accuracies, tau and acceptance."""
    if workers.wanted(config):
        return workers.launch(run, config)
    from quantspec.calibrate.train.measure import fit_tau, tree_acceptance

    device = config.run.device
    base = load_net(config.base, device)
    head = EagleHead(base.shape).init_weights(config.optim.seed).to(device)
    texts = read_rollouts(config.rollouts)
    batches = RolloutBatches(texts, config.optim.batch // workers.world(), config.optim.seed)
    noise = torch.Generator().manual_seed(config.optim.seed)
    name = fingerprint(config.base)
    seen = 0

    def loss_of(step: int, progress: float) -> tuple[torch.Tensor, Metrics]:
        nonlocal seen
        batch = batches[step * workers.world() + workers.rank()].to(device)
        if texts.model != name:
            with torch.no_grad():
                batch = replace(batch, features=base.features(batch.ids))
        seen += int(batch.lens.sum()) * workers.world()
        noise.manual_seed(config.optim.seed * 1_000_003 + step * workers.world() + workers.rank())
        unroll = config.unroll if progress >= config.unroll_from else 1
        with torch.autocast("cuda", torch.bfloat16, enabled=device.startswith("cuda")):
            loss, metrics = head_loss(head, base, batch, unroll, config, noise)
        return loss, {"tokens": float(seen), **metrics}

    def restore(tokens: int) -> None:
        nonlocal seen
        seen = tokens

    steps = fit(
        head,
        loss_of,
        config.optim,
        config.run,
        config.out,
        counters=lambda: seen,
        restore=restore,
        stop_after=stop_after,
    )
    result: dict[str, Any] = {"steps": steps, "tokens": seen}
    tau = {}
    if config.held_out and workers.rank() == 0:
        held = read_rollouts(config.held_out)
        if held.model != name:
            raise ModelError(
                f"{config.held_out} was not written by {config.base}",
                hint="make held-out rollouts with the base itself",
            )
        tau = fit_tau(head, base, held)
        result |= {"tau": tau, "tree_acceptance": tree_acceptance(head, base, held)}
    if workers.rank() == 0:
        save_head(head, base, config, tau)
    return result


def head_loss(
    head: EagleHead, base: LlamaNet, batch: Batch, unroll: int, config: EagleConfig, generator: torch.Generator
) -> tuple[torch.Tensor, Metrics]:
    """SmoothL1 on features plus soft cross-entropy on tokens, generated text only, steps discounted by `step_decay`."""
    truth = batch.features[:, 1:]
    rms = batch.features.pow(2).mean().sqrt()
    noise = (torch.rand(truth.shape, generator=generator) * 2 - 1).to(truth.device) * config.noise * rms
    embedded = base.model.embed_tokens(batch.ids[:, 1:])
    steps = head.unrolled(embedded, batch.features[:, :-1] + noise, unroll)
    wanted = batch.weights(0.0)[:, 1:] > 0
    total, metrics = torch.zeros((), device=truth.device), {}
    for j, predicted in enumerate(steps):
        rows = wanted.clone()
        rows[:, :j] = False
        expected, guess = truth[rows], predicted[rows]
        labels = base.head(expected).softmax(-1)
        logits = base.head(guess).float()
        soft = F.cross_entropy(logits, labels)
        regression = F.smooth_l1_loss(guess, expected)
        total = total + config.step_decay**j * (config.ce_weight * soft + config.feature_weight * regression)
        metrics[f"accuracy.{j}"] = float((logits.argmax(-1) == labels.argmax(-1)).float().mean())
        metrics[f"feature.{j}"] = float(regression.detach())
    return total, metrics


def save_head(head: EagleHead, base: LlamaNet, config: EagleConfig, tau: dict[str, float]) -> None:
    """EAGLE-1/2 keys; embedding and LM head are left to the base."""
    make_folder(config.out)
    shape = Shape(**{**vars(base.shape), "layers": 1})
    section = {"base": fingerprint(config.base), "tau": tau}
    settings = {
        **llama_config(shape, base.vocab),
        "architectures": ["LlamaForCausalLMEagle"],
        "bias": True,
        "quantspec": section,
    }
    write_json(config.out / "config.json", settings)
    save_tensors(
        config.out / "model.safetensors",
        {k: v.detach().to("cpu", torch.bfloat16) for k, v in head.state_dict().items()},
    )


def load_head(folder: Path, base: LlamaNet) -> EagleHead:
    """A saved head in fp32, frozen, for `base`."""
    head = EagleHead(Shape(**{**vars(base.shape), "layers": 1}))
    head.load_state_dict({k: v.float() for k, v in load_file(str(folder / "model.safetensors")).items()})
    return head.requires_grad_(False).to(base.model.norm.weight.device)
