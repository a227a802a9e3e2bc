"""The P-EAGLE network for training (arXiv 2602.01469): EAGLE-3's, with a learned mask and an embedding of its own, and
perhaps a small network that corrects its slots by the tokens before them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import nn

from quantspec.calibrate.train.config import Shape
from quantspec.calibrate.train.methods.eagle3_net import Eagle3Net, FirstLayer, Flags
from quantspec.calibrate.train.net import Layer, rope_table


class PathNet(nn.Module):
    """What the token before a masked slot adds to the slot's logits: low-rank, as a Markov head's (DSpark), and it sees
    the slot's output too. See `drafters.peagle_path`, which runs it."""

    def __init__(self, hidden: int, rank: int, vocab: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(2 * hidden, 2 * rank, bias=False)
        self.up_proj = nn.Linear(2 * hidden, 2 * rank, bias=False)
        self.down_proj = nn.Linear(2 * rank, rank, bias=False)
        self.lm_head = nn.Linear(rank, vocab, bias=False)

    def forward(self, outputs: torch.Tensor, embedded: torch.Tensor) -> torch.Tensor:
        """Corrections [n, vocab] of slots with normed `outputs` [n, hidden] after tokens `embedded` [n, hidden]."""
        read = torch.cat([outputs, embedded], -1)
        return self.lm_head(self.down_proj(nn.functional.silu(self.gate_proj(read)) * self.up_proj(read)))


class PEagleNet(Eagle3Net):
    """See `Eagle3Net`; `tokens` is the target's vocabulary, `mask_token` the one that masked slots read, `path_rank`
    that of a `PathNet`, 0 for none.

    `mask_hidden [1, 1, taps * width]` stands for the streams of slots that the base has not seen.
    """

    def __init__(
        self, shape: Shape, width: int, taps: int, vocab: int, flags: Flags, tokens: int, mask_token: int,
        path_rank: int = 0,
    ) -> None:  # fmt: skip
        super().__init__(shape, width, taps, vocab, flags)
        self.mask_token = mask_token
        self.path = PathNet(shape.hidden, path_rank, vocab) if path_rank else None
        self.embed_tokens = nn.Embedding(tokens, shape.hidden)
        self.mask_hidden = nn.Parameter(torch.zeros(1, 1, taps * width))

    def init_weights(self, seed: int) -> PEagleNet:
        """See `Eagle3Net`; normal values for the mask."""
        super().init_weights(seed)
        self.mask_hidden.data.normal_(generator=torch.Generator().manual_seed(seed + 1))
        return self

    def forward(
        self, ids: torch.Tensor, streams: Sequence[torch.Tensor], elements: torch.Tensor, depths: int,
        mask: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        """Normed outputs [B, R, hidden], the LM head's input, of elements [B, R] (see `peagle_rows`).

        Slot i has token `ids[:, i]` and the tapped `streams` [B, S, width] before it; `mask` bool [B, R, R] says who
        sees whom. What padding puts out has no meaning.
        """
        rows = elements.clamp_min(0)
        anchor, depth = rows // depths, rows % depths
        # Behind all slots stands the mask, for whoever is deeper than 0.
        source = torch.where(depth == 0, anchor, ids.shape[1])[..., None].expand(-1, -1, self.shape.hidden)
        absent = self.fuse(list(self.mask_hidden.chunk(len(streams), -1)))
        state = torch.cat([self.fuse(streams), absent.expand(len(ids), -1, -1)], 1).gather(1, source)
        tokens = nn.functional.pad(ids, (0, 1), value=self.mask_token)
        embedded = self.embed_tokens(tokens).gather(1, source)
        cos, sin = (table[:, None] for table in rope_table(self.shape, anchor + depth))
        first = cast(FirstLayer, self.layers[0])
        x, read = first.read(embedded, state)
        for number, module in enumerate(self.layers):
            layer = cast(Layer, module)  # or the first, which has all that is used here
            read = layer.input_layernorm(x) if number else read
            x = x + layer.self_attn.mix(*layer.self_attn.qkv(read, cos, sin), mask[:, None])
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        return self.norm(x)
