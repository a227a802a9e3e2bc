"""Train a P-EAGLE head (arXiv 2602.01469): an EAGLE-3 network that drafts all its tokens in one forward.

The first token of a draft is that of EAGLE-3. Slots after it read a mask, one learned stream and one learned token, at
rising positions; each learns the base's distribution, none counts more. Long texts are learned in parts whose gradients
add up to the whole one (`partitions`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from quantspec.calibrate.train import workers
from quantspec.calibrate.train.config import PEagleConfig
from quantspec.calibrate.train.loop import Metrics
from quantspec.calibrate.train.losses import LOSSES
from quantspec.calibrate.train.methods.eagle3 import Eagle3Method
from quantspec.calibrate.train.methods.eagle3_net import Eagle3Net
from quantspec.calibrate.train.methods.peagle_net import PEagleNet
from quantspec.calibrate.train.methods.peagle_rows import AnchoredMask, padded, parts, sample
from quantspec.calibrate.train.net import LlamaNet
from quantspec.calibrate.train.rollout import Batch, Rollouts
from quantspec.calibrate.train.trainer import Guess, train
from quantspec.drafters.eagle3_head import Eagle3Config as Eagle3HeadConfig
from quantspec.drafters.peagle_files import PEagleConfig as PEagleHeadConfig
from quantspec.drafters.peagle_files import is_peagle, read_peagle, save_flat
from quantspec.errors import ModelError, UsageError
from quantspec.models.config import read_config

Part = tuple[torch.Tensor, torch.Tensor]
"""Elements [B, R] of a batch, -1 for padding, and which of them count, bool [B, R]."""


def run(config: PEagleConfig, stop_after: int | None = None) -> dict[str, Any]:
    """Train (or go on training) a head and write it to `config.out`; see `trainer.train`."""
    if workers.wanted(config):
        return workers.launch(run, config)
    return train(config, partial(PEagleMethod, config), stop_after)


_SLOT = 0.25
"""Weight of what a masked slot says by itself, beside what it says after the token before it."""


class PEagleMethod(Eagle3Method):
    """See `trainer.Method` and `Eagle3Method`. `mask_token` is the target token that stands for those to come: the one
    that the texts need least."""

    name = "peagle"
    config: PEagleConfig
    net: PEagleNet

    def __init__(self, config: PEagleConfig, base: LlamaNet, texts: Rollouts) -> None:
        if not (config.depths >= 1 and config.partitions >= 1 and config.layers >= 1 and config.path_rank >= 0):
            raise UsageError("depths, partitions and layers must be at least 1, and a path's rank at least 0")
        most = min(base.shape.hidden, config.draft_vocab_size or base.vocab)
        if config.path_rank > most:
            whose = "the base's LM head" if most == base.shape.hidden else "an LM head of the draft vocabulary"
            raise UsageError(f"a path's rank of {config.path_rank} is above {most}, the rank of {whose}")
        if not (0 < config.keep <= 1 and 0 <= config.keep_least <= 1):
            raise UsageError(f"keep {config.keep} and keep_least {config.keep_least} must be shares, keep above 0")
        self.mask_token = int(torch.bincount(texts.ids.long(), minlength=base.vocab).argmin())
        super().__init__(config, base, texts)
        self.mask = AnchoredMask(int(texts.starts.diff().max()) - 1, config.depths)

    def _new_net(self) -> Eagle3Net:
        return PEagleNet(
            self.shape, self.base.shape.hidden, len(self.taps), len(self.ids), self.flags, self.base.vocab,
            self.mask_token, self.config.path_rank,
        )  # fmt: skip

    def _borrow(self) -> None:
        super()._borrow()
        embedding = self.net.embed_tokens.weight.copy_(self.base.model.embed_tokens.weight)
        if (path := self.net.path) is not None:
            # What the rank leaves of the LM head, and embeddings as large as the outputs beside them.
            lm_head = self.net.lm_head.weight
            main = torch.linalg.eigh(lm_head.T @ lm_head).eigenvectors[:, -self.config.path_rank :]
            path.lm_head.weight.copy_(lm_head @ main)
            for layer in (path.gate_proj, path.up_proj):
                layer.weight[:, embedding.shape[1] :] /= embedding.pow(2).mean().sqrt()

    def _read(self, folder: Path) -> tuple[Eagle3HeadConfig, dict[str, torch.Tensor], torch.Tensor | None]:
        """Either kind of head: what an EAGLE-3 head lacks begins as it does without one."""
        if not is_peagle(read_config(folder)):
            return super()._read(folder)
        found, tensors, ids = read_peagle(folder)
        if found.mask_token_id != self.mask_token:
            raise ModelError(
                f"{folder} masks with token {found.mask_token_id}, these texts need {self.mask_token} least",
                hint="give the rollouts that it was trained on",
            )
        return found.head, tensors, ids

    def loss(self, batch: Batch, progress: float, noise: torch.Generator) -> tuple[torch.Tensor, Metrics]:
        """Mean loss, over the elements drawn, against the base's distribution on the draft vocabulary.

        With more than one part the gradients are those already summed over parts: only one part's activations are in
        memory at a time.
        """
        wanted = batch.weights(0.0)[:, 1:] > 0
        divided = self._parts(wanted.cpu(), (batch.lens - 1).tolist(), noise)
        rows = sum(int((own & self._judged(elements, wanted)).sum()) for elements, own in divided)
        hits = torch.full((*wanted.shape, self.config.depths), -1, dtype=torch.int8)
        weights = [p for p in self.net.parameters() if p.requires_grad]
        part_loss = partial(self._part_loss, batch, wanted, self._feature_weight(progress), hits)
        if len(divided) == 1:
            total = part_loss(*divided[0]) / max(rows, 1)
        else:
            total = torch.zeros((), device=wanted.device)
            gradients: list[torch.Tensor | None] = [None] * len(weights)
            for elements, own in divided:
                loss = part_loss(elements, own) / max(rows, 1)
                total += loss.detach()
                for i, more in enumerate(torch.autograd.grad(loss, weights, allow_unused=True)):
                    have = gradients[i]
                    gradients[i] = more if have is None else have if more is None else have.add_(more)
            total = _Summed.apply(total, gradients, *weights)
        return total, _accuracy(hits)

    def _parts(self, wanted: torch.Tensor, slots: list[int], generator: torch.Generator) -> list[Part]:
        """The elements drawn of each text of the batch, in `config.partitions` parts."""
        config, device = self.config, self.ids.device
        texts = []
        for row, count in zip(wanted, slots, strict=True):
            drawn = sample(row, count, config.depths, config.keep, config.keep_least, generator)
            texts.append(parts(drawn, count, config.depths, config.partitions))
        return [
            (padded([part[0] for part in each], -1).to(device), padded([part[1] for part in each], 0).to(device))
            for each in zip(*texts, strict=True)
        ]

    def _judged(self, elements: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        """Bool [B, R]: elements whose token was generated."""
        slot = (elements // self.config.depths + elements % self.config.depths).clamp(min=0)
        return wanted.gather(1, slot) & (elements >= 0)

    def _part_loss(
        self, batch: Batch, wanted: torch.Tensor, feature_weight: float, hits: torch.Tensor, elements: torch.Tensor,
        own: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        """Summed over the part's own elements; notes in `hits [B, S, depths]` which ones guessed the base's choice."""
        counted = own & self._judged(elements, wanted)
        outputs = self._outputs_of(batch, elements)[counted]
        text, row = counted.nonzero(as_tuple=True)
        anchor, depth = elements[text, row] // self.config.depths, elements[text, row] % self.config.depths
        guess, told = self._guesses(outputs, depth, batch.ids[text, anchor + depth + 1])
        width = batch.ids.shape[1]
        asked, which = (text * width + anchor + depth + 1).unique(return_inverse=True)
        with torch.no_grad():
            features = batch.features.flatten(0, 1)[asked]
            logits = self.base.head(features).float()
            right = self.ids[told.argmax(-1)] == logits.argmax(-1)[which]
            hits[text.cpu(), anchor.cpu(), depth.cpu()] = right.to("cpu", torch.int8)
            labels = logits[:, self.ids].softmax(-1)[which]
        loss = LOSSES[self.config.loss]
        total = loss(told, labels).sum()
        if told is not guess:
            deeper = depth > 0
            total = total + _SLOT * loss(guess[deeper], labels[deeper]).sum()
        if feature_weight:
            apart = F.smooth_l1_loss(outputs, features[which], reduction="none")
            total = total + feature_weight * apart.mean(-1).sum()
        return total

    def _guesses(
        self, outputs: torch.Tensor, depth: torch.Tensor, before: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [n, draft vocabulary] of elements with `outputs` [n, hidden] at `depth` [n]: by themselves, and after
        the tokens `before` [n], which those of depth 0 have read."""
        guess = self.net.lm_head(outputs).float()
        if self.net.path is None:
            return guess, guess
        added = self.net.path(outputs, self.net.embed_tokens(before)).float()
        return guess, guess + added * (depth > 0)[:, None]

    def _outputs_of(self, batch: Batch, elements: torch.Tensor) -> torch.Tensor:
        """Normed outputs [B, R, hidden] of elements [B, R]."""
        if batch.ids.shape[1] - 1 > self.mask.length:
            self.mask = AnchoredMask(batch.ids.shape[1] - 1, self.config.depths)
        streams = [batch.streams[tap][:, :-1] for tap in self.taps]
        return self.net(batch.ids[:, 1:], streams, elements, self.config.depths, self.mask.of(elements))

    @torch.no_grad()
    def guesses(self, batch: Batch) -> Iterator[Guess]:
        """See `trainer.Method`. Of a chain only what follows right guesses: a wrong one ends it."""
        wanted, depths = batch.weights(0.0)[:, 1:] > 0, self.config.depths
        count, reached = wanted.shape[1], wanted
        elements = torch.arange(count * depths, device=wanted.device).expand(len(wanted), -1)
        outputs = self._outputs_of(batch, elements).unflatten(1, (count, depths))
        for depth in range(depths):
            judged = reached[:, : count - depth] & wanted[:, depth:]
            truth = self.base.head(batch.features[:, 1 + depth :][judged]).float()
            before, asked = batch.ids[:, 1 + depth :][judged], outputs[:, : count - depth, depth][judged]
            guess = torch.full_like(truth, -torch.inf)
            guess[:, self.ids] = self._guesses(asked, torch.full_like(before, depth), before)[1]
            yield truth, guess
            reached = torch.zeros_like(wanted)
            reached[:, : count - depth][judged] = truth.argmax(-1) == guess.argmax(-1)

    def save(self, out: Path, tau: Mapping[str, float]) -> None:
        """The flat form: see `drafters.peagle_files`."""
        config, tensors, ids = self._saved(tau)
        save_flat(out, PEagleHeadConfig(config, self.mask_token, self.config.path_rank), tensors, ids)


class _Summed(torch.autograd.Function):
    """A loss whose gradients are known."""

    @staticmethod
    def forward(
        ctx: Any, loss: torch.Tensor, gradients: list[torch.Tensor | None], *weights: nn.Parameter
    ) -> torch.Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return None, None, *(None if each is None else each * upstream[0] for each in ctx.gradients)


def _accuracy(hits: torch.Tensor) -> Metrics:
    """Per depth the share of right guesses where all before were right: `hits [B, S, depths]`, -1 where none was."""
    metrics, reached = Metrics(), torch.ones(hits.shape[:2], dtype=torch.bool)
    for depth in range(hits.shape[2]):
        asked = reached & (hits[..., depth] >= 0)
        reached = reached & (hits[..., depth] == 1)
        metrics[f"accuracy.{depth}"] = int(reached.sum()) / max(int(asked.sum()), 1)
    return metrics
