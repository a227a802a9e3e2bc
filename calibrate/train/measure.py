"""How good a drafter is, measured offline on held-out text that its base wrote: acceptance by simulation, and tau.

Greedy text is a function of the base, so a tree drafted at any of its positions can be checked against the text itself,
without running the base again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from quantspec.calibrate.train.net import LlamaNet, rope_table
from quantspec.calibrate.train.rollout import Rollouts

if TYPE_CHECKING:
    from quantspec.calibrate.train.eagle import EagleHead

TREE_NODES, TREE_DEPTH, TREE_TOP_K = 15, 6, 4
_TAUS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2, 1.5, 2.0)
_MAX_TEXTS = 60


class TreeDrafter:
    """EAGLE-2's dynamic tree over one text: the keys of all true-feature slots are computed once."""

    def __init__(self, head: EagleHead, base: LlamaNet, ids: torch.Tensor, features: torch.Tensor) -> None:
        self.head, self.base, (self.layer,) = head, base, head.layers
        x = head.mix_in(base.model.embed_tokens(ids[1:]), features[:-1])[None]
        q, k, v = self.layer.self_attn.qkv(x, *rope_table(head.shape, torch.arange(x.shape[1])))
        x = x + self.layer.self_attn.mix(q, k, v, None)
        self.predicted = (x + self.layer.mlp(self.layer.post_attention_layernorm(x)))[0]
        self.keys, self.values = k[0], v[0]

    def draft(self, last: int, nodes: int, depth: int, top_k: int) -> tuple[list[int], list[int]]:
        """Tokens and parents (-1: the root) of the best tree under the committed token at index `last`."""
        tokens, parents, scores, ancestors = [], [], [], []
        slots = last  # true-feature slots 0 .. last - 1; the root's prediction stands in slot last - 1
        frontier, hidden = [-1], self.predicted[slots - 1][None]
        own_k = own_v = self.keys[:, :0]
        rows: list[list[int]] = [[]]
        for level in range(depth):
            log_q = self.base.head(hidden).log_softmax(-1)
            values, ids = log_q.topk(top_k)
            children = []
            for f, parent in enumerate(frontier):
                for score, token in zip(values[f].tolist(), ids[f].tolist(), strict=True):
                    tokens.append(token)
                    parents.append(parent)
                    scores.append(score + (scores[parent] if parent >= 0 else 0.0))
                    ancestors.append(rows[f])
                    children.append((scores[-1], len(tokens) - 1, f))
            if level == depth - 1:
                break
            best = sorted(children, reverse=True)[:top_k]
            frontier = [node for _, node, _ in best]
            x = self.head.mix_in(
                self.base.model.embed_tokens(torch.tensor([tokens[n] for n in frontier])),
                hidden[[f for _, _, f in best]],
            )[None]
            positions = torch.full((1, len(frontier)), slots + level)
            q, k, v = self.layer.self_attn.qkv(x, *(t[:, None] for t in rope_table(self.head.shape, positions)))
            first = own_k.shape[1]
            own_k, own_v = torch.cat([own_k, k[0]], 1), torch.cat([own_v, v[0]], 1)
            rows = [[*ancestors[n], first + i] for i, n in enumerate(frontier)]
            mask = torch.zeros(len(frontier), slots + own_k.shape[1], dtype=torch.bool)
            mask[:, :slots] = True
            for i, row in enumerate(rows):
                mask[i, [slots + a for a in row]] = True
            all_k, all_v = (
                torch.cat([c[:, :slots], o], 1)[None] for c, o in ((self.keys, own_k), (self.values, own_v))
            )
            x = x + self.layer.self_attn.mix(q, all_k, all_v, mask)
            hidden = (x + self.layer.mlp(self.layer.post_attention_layernorm(x)))[0]
        # Path products never grow with depth and earlier indices win ties, so the best nodes form a tree.
        chosen = sorted(sorted(range(len(tokens)), key=lambda n: (-scores[n], n))[:nodes])
        place = {n: i for i, n in enumerate(chosen)} | {-1: -1}
        return [tokens[n] for n in chosen], [place[parents[n]] for n in chosen]


def accepted(tokens: list[int], parents: list[int], truth: list[int]) -> int:
    """Length of the longest prefix of `truth` that the tree holds."""
    at, length = -1, 0
    for token in truth:
        child = next((i for i, (t, p) in enumerate(zip(tokens, parents, strict=True)) if p == at and t == token), None)
        if child is None:
            break
        at, length = child, length + 1
    return length


@torch.no_grad()
def tree_acceptance(head: EagleHead, base: LlamaNet, texts: Rollouts) -> float:
    """Tokens per forward of the base on its greedy held-out texts, bonus token included and prefill excluded."""
    committed = rounds = 0
    for index in greedy_texts(texts):
        batch = texts.batch([index])
        ids, end = batch.ids[0], int(batch.lens[0])
        drafter = TreeDrafter(head, base, ids, batch.features[0])
        last = int(batch.prompt_lens[0])
        while last < end - 1:
            tree = drafter.draft(last, TREE_NODES, TREE_DEPTH, TREE_TOP_K)
            gain = min(accepted(*tree, ids[last + 1 : end].tolist()) + 1, end - 1 - last)
            last, committed, rounds = last + gain, committed + gain, rounds + 1
    return committed / max(1, rounds)


def chain_acceptance(agrees: list[list[bool]], length: int) -> float:
    """Tokens per target forward when a drafter proposes `length` tokens at a time; `agrees` per generated position."""
    committed = rounds = 0
    for text in agrees:
        at = 0
        while at < len(text):
            run = next((i for i, hit in enumerate(text[at : at + length]) if not hit), min(length, len(text) - at))
            gain = min(run + 1, len(text) - at)
            at, committed, rounds = at + gain, committed + gain, rounds + 1
    return committed / max(1, rounds)


def greedy_texts(texts: Rollouts) -> list[int]:
    return [i for i in range(len(texts)) if texts.temperatures[i] == 0][:_MAX_TEXTS]


@torch.no_grad()
def fit_tau(
    head: EagleHead, base: LlamaNet, texts: Rollouts, temperatures: tuple[float, ...] = (0.8, 1.0)
) -> dict[str, float]:
    """Per temperature the tau for which softmax((log q - log E) / tau) finds the verifier's draw likeliest.

    E is the exponential noise that drafter and verifier share: the verifier draws argmax(log p - log E).
    """
    result = {}
    for temperature in temperatures:
        generator = torch.Generator().manual_seed(0)
        likelihood = torch.zeros(len(_TAUS), dtype=torch.float64)
        chosen = [i for i in range(len(texts)) if abs(float(texts.temperatures[i]) - temperature) < 1e-3][:_MAX_TEXTS]
        for index in chosen or range(min(len(texts), _MAX_TEXTS)):
            batch = texts.batch([index])
            rows = batch.weights(0.0)[:, 1:] > 0
            predicted = head.unrolled(base.model.embed_tokens(batch.ids[:, 1:]), batch.features[:, :-1], 2)
            log_p = (base.head(batch.features[:, 1:][rows]) / temperature).log_softmax(-1)
            surprise = -torch.empty_like(log_p).exponential_(generator=generator).log()
            drawn = (log_p + surprise).argmax(-1, keepdim=True)
            for guess in predicted:
                scores = (base.head(guess[rows]) / temperature).log_softmax(-1) + surprise
                likelihood += torch.stack([(scores / t).log_softmax(-1).gather(1, drawn).double().sum() for t in _TAUS])
        result[f"{temperature:g}"] = _TAUS[int(likelihood.argmax())]
    return result
