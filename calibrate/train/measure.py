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
LOOP = 0.6
"""Below this share of distinct 4-grams a text counts as a loop."""


class TreeDrafter:
    """EAGLE-2's dynamic tree over one text: the keys of all true-feature slots are computed once."""

    def __init__(self, head: EagleHead, base: LlamaNet, ids: torch.Tensor, features: torch.Tensor) -> None:
        self.head, self.base, layer = head, base, head.layer
        x = head.mix_in(base.model.embed_tokens(ids[1:]), features[:-1])[None]
        q, k, v = layer.self_attn.qkv(x, *rope_table(head.shape, torch.arange(x.shape[1])))
        x = x + layer.self_attn.mix(q, k, v, None)
        self.predicted = (x + layer.mlp(layer.post_attention_layernorm(x)))[0]
        self.keys, self.values = k[0], v[0]

    def draft(self, last: int, nodes: int, depth: int, top_k: int) -> tuple[list[int], list[int]]:
        """Tokens and parents (-1: the root) of the best tree under the committed token at index `last`."""
        grown = _Grown(self.keys[:, :last], self.values[:, :last])
        frontier, hidden = [-1], self.predicted[last - 1][None]
        for level in range(depth):
            best = grown.add(frontier, self.base.head(hidden).log_softmax(-1).topk(top_k))
            if level == depth - 1:
                break
            parents = [frontier.index(grown.parents[node]) for node in best]
            hidden = self._expand(grown, best, hidden[parents], last + level)
            frontier = best
        return grown.best(nodes)

    def _expand(self, grown: _Grown, nodes: list[int], features: torch.Tensor, position: int) -> torch.Tensor:
        """Predicted features [m, hidden] of tree nodes, from their parents' [m, hidden]."""
        layer = self.head.layer
        embedded = self.base.model.embed_tokens(torch.tensor([grown.tokens[node] for node in nodes]))
        x = self.head.mix_in(embedded, features)[None]
        positions = torch.full((1, len(nodes)), position)
        q, k, v = layer.self_attn.qkv(x, *(t[:, None] for t in rope_table(self.head.shape, positions)))
        mask = grown.cache(nodes, k[0], v[0])
        x = x + layer.self_attn.mix(q, grown.keys[None], grown.values[None], mask)
        return (x + layer.mlp(layer.post_attention_layernorm(x)))[0]


class _Grown:
    """All nodes of a growing tree, with the keys and values of those that were expanded."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.keys, self.values, self.prefix = keys, values, keys.shape[1]
        self.tokens: list[int] = []
        self.parents: list[int] = []
        self.scores: list[float] = []
        self.columns: dict[int, list[int]] = {-1: []}
        """Of each expanded node: its own and its ancestors' places among the keys."""

    def add(self, frontier: list[int], top: tuple[torch.Tensor, torch.Tensor]) -> list[int]:
        """Children of the frontier from its log-probabilities and ids [m, k]; returns the k best of them."""
        first = len(self.tokens)
        for parent, scores, ids in zip(frontier, top[0].tolist(), top[1].tolist(), strict=True):
            self.tokens += ids
            self.parents += [parent] * len(ids)
            self.scores += [score + (self.scores[parent] if parent >= 0 else 0.0) for score in scores]
        children = range(first, len(self.tokens))
        return sorted(children, key=lambda node: -self.scores[node])[: top[0].shape[1]]

    def cache(self, nodes: list[int], keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Append keys and values [kv_heads, m, d] of `nodes`; returns which keys each may see, [m, all]."""
        start = self.keys.shape[1]
        self.keys, self.values = torch.cat([self.keys, keys], 1), torch.cat([self.values, values], 1)
        mask = torch.zeros(len(nodes), self.keys.shape[1], dtype=torch.bool)
        mask[:, : self.prefix] = True
        for i, node in enumerate(nodes):
            self.columns[node] = [*self.columns[self.parents[node]], start + i]
            mask[i, self.columns[node]] = True
        return mask

    def best(self, count: int) -> tuple[list[int], list[int]]:
        """Tokens and parents of the `count` best nodes.

        Path products never grow with depth and earlier nodes win ties, so these form a tree.
        """
        order = sorted(range(len(self.tokens)), key=lambda node: (-self.scores[node], node))
        chosen = sorted(order[:count])
        place = {-1: -1} | {node: i for i, node in enumerate(chosen)}
        return [self.tokens[node] for node in chosen], [place[self.parents[node]] for node in chosen]


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
    """Greedy texts that do not repeat themselves: a loop is easy to draft and would flatter every figure."""
    greedy = [i for i in range(len(texts)) if texts.temperatures[i] == 0]
    return [i for i in greedy if distinct_4grams(texts, i) >= LOOP][:_MAX_TEXTS]


def distinct_4grams(texts: Rollouts, index: int) -> float:
    """Share of different ones among the runs of four generated tokens of a text."""
    first, end = int(texts.starts[index] + texts.prompt_lens[index]), int(texts.starts[index + 1])
    grams = texts.ids[first:end].unfold(0, 4, 1).tolist() if end - first >= 4 else []
    return len(set(map(tuple, grams))) / len(grams) if grams else 1.0


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
