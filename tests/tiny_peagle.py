"""P-EAGLE heads for the tiny targets of ``tiny_eagle``, in every published layout.

Loaded by ``tests/conftest.py``; a test says ``from tiny_peagle import ...``.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tiny_eagle import HEAD_DIM, HEADS, HIDDEN, KV_HEADS, VOCAB, normed, save
from tiny_eagle3 import FLAT, IDS, SPECULATORS, head_tensors
from torch import Tensor
from torch.nn import functional as F

MASK_TOKEN = 3
LAYERS = {"num_hidden_layers": 2}
PEAGLE_FLAT = FLAT | LAYERS | {"eagle_aux_hidden_state_layer_ids": [1, 2], "mask_token_id": MASK_TOKEN}
PEAGLE_SPECULATORS = SPECULATORS | {
    "architectures": ["PEagleSpeculator"],
    "speculators_model_type": "peagle",
    "mask_token_id": MASK_TOKEN,
    "transformer_layer_config": SPECULATORS["transformer_layer_config"] | LAYERS,
    "speculators_config": {"algorithm": "peagle"},
}


def peagle_tensors(*, layers: int = 2, scale: float = 0.3, rank: int = 0, **options) -> dict[str, Tensor]:
    """An EAGLE-3 head that mostly counts up by seven, an embedding (the target's), a random mask, and of a ``rank`` a
    random path network."""
    generator = torch.Generator().manual_seed(9)
    taps, ids = options.get("taps", 2), options.get("ids", IDS)
    mask = torch.randn(1, 1, taps * HIDDEN, generator=generator)
    shapes = {
        "gate_proj": (2 * rank, 2 * HIDDEN),
        "up_proj": (2 * rank, 2 * HIDDEN),
        "down_proj": (rank, 2 * rank),
        "lm_head": (VOCAB if ids is None else len(ids), rank),
    }
    path = {f"path.{name}.weight": torch.randn(shape, generator=generator) / 2 for name, shape in shapes.items()}
    return head_tensors(layers=layers, scale=scale, **options) | (path if rank else {}) | {
        "mask_hidden": mask,
        "embed_tokens.weight": 0.6 * torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(0)),
    }  # fmt: skip


def peagle_folder(folder: Path, **options) -> Path:
    """A flat head that reads the target's two layers."""
    config = PEAGLE_FLAT | dict.fromkeys(options.get("flags", ()), True)
    config["num_hidden_layers"] = options.get("layers", 2)
    ids = options.get("ids", IDS)
    config["draft_vocab_size"] = VOCAB if ids is None else len(ids)
    if options.get("rank"):
        config["path_rank"] = options["rank"]
    return save(folder, config, peagle_tensors(**options))


def rotated(y: Tensor, position: int) -> Tensor:
    """One slot's heads ``[n, head_dim]`` at a position."""
    a, b = y.chunk(2, dim=-1)
    angle = position * 100.0 ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def dense_outputs(options: dict, streams: list[Tensor], tokens: list[int], depth: int) -> Tensor:
    """``[depth, HIDDEN]``: what the LM head reads for a chain below ``tokens``, slot by slot and head by head."""
    weight, flags = peagle_tensors(**options), options.get("flags", ())
    masks = weight["mask_hidden"][0].chunk(len(streams), 1)
    streams = [torch.cat([s, mask.expand(depth - 1, -1)]) for s, mask in zip(streams, masks, strict=True)]
    if "fc_norm" in flags:
        streams = [normed(stream, weight[f"fc_norm.{i}.weight"]) for i, stream in enumerate(streams)]
    both = torch.cat(streams, 1)
    if "norm_before_fc" in flags:
        both = normed(both, weight["input_norm.weight"])
    state = both @ weight["fc.weight"].T
    embedded = weight["embed_tokens.weight"][[*tokens[1:], *[MASK_TOKEN] * (depth - 1)]]
    hidden = normed(state, weight["layers.0.hidden_norm.weight"])
    x = hidden if "norm_before_residual" in flags else state
    for i in range(options.get("layers", 2)):
        layer = f"layers.{i}."
        read = normed(embedded if not i else x, weight[f"{layer}input_layernorm.weight"])
        if not i:
            read = torch.cat([read, hidden], 1)
        q, k, v = (
            (read @ weight[f"{layer}self_attn.{name}_proj.weight"].T).view(len(x), -1, HEAD_DIM) for name in "qkv"
        )
        mixed = torch.zeros(len(x), HEADS, HEAD_DIM)
        for slot in range(len(x)):
            for head in range(HEADS):
                group = head * KV_HEADS // HEADS
                keys = torch.stack([rotated(k[j, group], j) for j in range(slot + 1)])
                scores = keys @ rotated(q[slot, head], slot) / HEAD_DIM**0.5
                mixed[slot, head] = scores.softmax(0) @ v[: slot + 1, group]
        x = x + mixed.flatten(1) @ weight[f"{layer}self_attn.o_proj.weight"].T
        y = normed(x, weight[f"{layer}post_attention_layernorm.weight"])
        gate, up = (y @ weight[f"{layer}mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        x = x + (F.silu(gate) * up) @ weight[f"{layer}mlp.down_proj.weight"].T
    return normed(x, weight["norm.weight"])[-depth:]


def dense_logits(options: dict, streams: list[Tensor], tokens: list[int], depth: int) -> Tensor:
    """``[depth, V]``: the rows of that chain, -inf for tokens that cannot be drafted."""
    weight = peagle_tensors(**options)
    return on_all(options, dense_outputs(options, streams, tokens, depth) @ weight["lm_head.weight"].T, -torch.inf)


def on_all(options: dict, rows: Tensor, other: float) -> Tensor:
    """Rows ``[n, V]`` of those on the draft vocabulary."""
    ids = options.get("ids", IDS)
    return rows if ids is None else torch.full((len(rows), VOCAB), other).index_copy(1, ids, rows)
