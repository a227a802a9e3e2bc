"""Train an EAGLE-3 head (arXiv 2503.01840) by training-time test: the same loss at every draft step, no features.

Slot i reads the base's streams at position i and token i + 1, and says what token i + 2 will be; in draft step j, token
i + 2 + j (see `Eagle3Net.unrolled`). Where the base's own choice is outside the draft vocabulary, nothing is learned.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from quantspec.calibrate.train import workers
from quantspec.calibrate.train.checkpoint import llama_config
from quantspec.calibrate.train.config import Eagle3Config
from quantspec.calibrate.train.loop import Metrics
from quantspec.calibrate.train.losses import mean_loss
from quantspec.calibrate.train.methods.eagle3_net import Eagle3Net, Flags
from quantspec.calibrate.train.net import LlamaNet
from quantspec.calibrate.train.rollout import Batch, Rollouts, fingerprint
from quantspec.calibrate.train.trainer import Guess, head_shape, train
from quantspec.calibrate.train.vocabulary import draft_vocabulary, membership
from quantspec.drafters.eagle3_files import read_eagle3, save_flat
from quantspec.drafters.eagle3_head import Eagle3Config as Eagle3HeadConfig
from quantspec.drafters.head_keys import LAYER_KEYS
from quantspec.errors import ModelError, UsageError
from quantspec.models.config import ModelConfig
from quantspec.models.weights import to_dense
from quantspec.types import Tap


def run(config: Eagle3Config, stop_after: int | None = None) -> dict[str, Any]:
    """Train (or go on training) a head and write it to `config.out`; see `trainer.train`."""
    if workers.wanted(config):
        return workers.launch(run, config)
    return train(config, partial(Eagle3Method, config), stop_after)


class Eagle3Method:
    """See `trainer.Method`. `ids` are the target ids of the draft vocabulary, ascending; `drafted` says which those
    are."""

    name = "eagle3"

    def __init__(self, config: Eagle3Config, base: LlamaNet, texts: Rollouts) -> None:
        self.config, self.base = config, base
        self.taps: tuple[Tap, ...] = config.layer_ids or default_taps(base.shape.layers)
        if not all(isinstance(tap, int) and 0 <= tap < base.shape.layers for tap in self.taps):
            raise UsageError(
                f"layer ids {', '.join(map(str, config.layer_ids))} of a base with {base.shape.layers} layers",
                hint=f"count layers from 0 to {base.shape.layers - 1}, or leave --layer-ids out",
            )
        device = base.model.norm.weight.device
        ids = draft_vocabulary(texts, base.vocab, config.draft_vocab_size or base.vocab)
        self.ids, self.drafted = ids.to(device), membership(ids, base.vocab).to(device)
        self.shape = head_shape(config, base.shape, config.layers)
        self.flags = Flags(config.fc_norm, config.norm_output, config.norm_before_fc, config.norm_before_residual)
        self.net = self._new_net().init_weights(config.optim.seed).to(device)
        with torch.no_grad():
            self._borrow()
            self._level(texts)
        if config.start is not None:
            self._start_from(config.start)
        self.net.lm_head.weight.requires_grad_(not config.keep_lm_head)

    def _new_net(self) -> Eagle3Net:
        return Eagle3Net(self.shape, self.base.shape.hidden, len(self.taps), len(self.ids), self.flags)

    def _borrow(self) -> None:
        """Begin with the base's own way from a state to tokens."""
        self.net.lm_head.weight.copy_(self.base.head_weight[self.ids])
        self.net.norm.weight.copy_(self.base.model.norm.weight)

    def _level(self, texts: Rollouts) -> None:
        """Scale `fc` so that every tap starts with the same weight: streams grow from layer to layer. One that ends in
        the base's last layer starts as the base's own features, about: what a draft step is taught to hand on."""
        hidden = self.base.shape.hidden
        if self.config.feature_weight and self.taps[-1] == self.base.shape.layers - 1:
            self.net.fc.weight.zero_()[:, -hidden:].copy_(torch.diag(self.base.model.norm.weight))
        if self.flags.fc_norm:
            return
        ids = texts.batch([0]).ids.to(self.ids.device)
        streams = self.base.streams(ids, self.taps)
        rms = torch.stack([streams[tap].pow(2).mean().sqrt() for tap in self.taps])
        if self.flags.norm_before_fc:
            rms = rms / rms.pow(2).mean().sqrt()
        self.net.fc.weight.div_(rms.repeat_interleave(hidden))

    def _start_from(self, folder: Path) -> None:
        """Take an EAGLE-3 head's weights; layers that it does not have start as the identity. Raises ``ModelError``."""
        found, stored, ids = self._read(folder)
        tensors = {name: to_dense(weight).float() for name, weight in stored.items()}
        own, flags = self.net.state_dict(), frozenset(name for name, on in vars(self.flags).items() if on)
        if (found.taps, found.flags) != (self.taps, flags):
            raise ModelError(f"{folder} reads its base otherwise", hint="give its layer ids and flags")
        if ids is not None and not ids.equal(self.ids.cpu()):
            raise ModelError(f"{folder} drafts other tokens", hint="give its draft vocabulary size and its rollouts")
        wrong = [name for name, tensor in tensors.items() if own.get(name, tensor[:0]).shape != tensor.shape]
        if wrong:
            hint = "give its path rank" if wrong[0].startswith("path.") else "give its MLP width"
            raise ModelError(f"{folder}: {wrong[0]} has another shape than this head's", hint=hint)
        self.net.load_state_dict(tensors, strict=False)

    def _read(self, folder: Path) -> tuple[Eagle3HeadConfig, dict[str, torch.Tensor], torch.Tensor | None]:
        """A head to start from."""
        return read_eagle3(folder)

    def loss(self, batch: Batch, progress: float, noise: torch.Generator) -> tuple[torch.Tensor, Metrics]:
        """Mean loss of every draft step against the base's distribution on the draft vocabulary, discounted."""
        steps = self.config.unroll if progress >= self.config.unroll_from else 1
        weight = self._feature_weight(progress)
        total, metrics = torch.zeros((), device=batch.ids.device), {}
        for j, (features, output) in enumerate(self._chains(batch, steps)):
            with torch.no_grad():
                truth = self.base.head(features).float()
            guess, choice = self.net.lm_head(output).float(), truth.argmax(-1)
            known = self.drafted[choice]
            labels = truth[known][:, self.ids].softmax(-1)
            soft = mean_loss(self.config.loss, guess[known], labels)
            if weight:
                apart = F.smooth_l1_loss(output, features, reduction="none").mean(-1)
                soft = soft + weight * apart.sum() / max(1, len(apart))
            total = total + self.config.step_decay**j * soft
            # A token that the head cannot say is a miss all the same.
            hits = self.ids[guess.detach().argmax(-1)] == choice
            metrics[f"accuracy.{j}"] = float(hits.float().mean())
        return total, metrics

    def _feature_weight(self, progress: float) -> float:
        return self.config.feature_weight if progress < self.config.feature_until else 0.0

    def _chains(self, batch: Batch, steps: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Per draft step, features [n, hidden] of the base and normed outputs [n, hidden] of the head for the same
        generated tokens: those of chains that start where generation would start one."""
        count = batch.ids.shape[1] - 1
        starts, ends = batch.prompt_lens - 2, batch.lens - 2  # the last token was never fed, and nothing follows it
        most = int((ends - starts).max())
        slots = (starts[:, None] + torch.arange(most, device=starts.device)).clamp(0, count - 1)
        embedded = self.base.model.embed_tokens(batch.ids[:, 1:])
        state = self.net.fuse([batch.streams[tap][:, :-1] for tap in self.taps])
        for j, output in enumerate(self.net.unrolled(embedded, state, steps, slots)):
            real = (starts[:, None] + torch.arange(most, device=starts.device)) < ends[:, None] - j
            rows = real.nonzero()
            yield batch.features[rows[:, 0], slots[real] + j + 1], output[real]

    @torch.no_grad()
    def guesses(self, batch: Batch) -> Iterator[Guess]:
        """See `trainer.Method`."""
        for features, output in self._chains(batch, max(2, self.config.unroll)):
            truth = self.base.head(features).float()
            guess = torch.full_like(truth, -torch.inf)
            guess[:, self.ids] = self.net.lm_head(output).float()
            yield truth, guess

    def save(self, out: Path, tau: Mapping[str, float]) -> None:
        """The flat EAGLE-3 form: see `drafters.eagle3_files`."""
        save_flat(out, *self._saved(tau))

    def _saved(self, tau: Mapping[str, float]) -> tuple[Eagle3HeadConfig, dict[str, torch.Tensor], torch.Tensor | None]:
        """What `read_eagle3` will return."""
        layer = {k: v for k, v in llama_config(self.shape, self.base.vocab).items() if k in LAYER_KEYS}
        config = Eagle3HeadConfig(
            ModelConfig.of(layer), layer, self.base.shape.hidden, len(self.ids), self.taps,
            frozenset(name for name, on in vars(self.flags).items() if on),
            {float(temperature): value for temperature, value in tau.items()}, fingerprint(self.config.base),
        )  # fmt: skip
        tensors = {name: tensor.detach().to("cpu", torch.bfloat16) for name, tensor in self.net.state_dict().items()}
        return config, tensors, self.ids.cpu() if len(self.ids) < self.base.vocab else None


def default_taps(layers: int) -> tuple[Tap, ...]:
    """What published heads read: the streams that enter layers 2, L // 2 and L - 3, and so leave those before."""
    if layers < 7:  # they would coincide
        raise UsageError(f"a base of {layers} layers has no default taps", hint="name three layers with --layer-ids")
    return (1, layers // 2 - 1, layers - 4)
