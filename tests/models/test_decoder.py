"""The eager decoder gives transformers' logits, however the rows are fed."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import pairwise

import pytest
import torch

from quantspec.models.base import CausalModel
from quantspec.models.cache import KVCache
from quantspec.models.decoder import Decoder
from quantspec.models.load import load_model
from quantspec.types import Batch

from .conftest import MODELS, VOCAB, Pair

# fp32 sums of a few hundred terms in another order differ by about 1e-6 here; a wrong mask, position or weight by 1e-2.
TOLERANCE = 1e-4
TREE = (-1, -1, 0, 0, 1, 2, 2, 5, 7)

GetPair = Callable[[str], Pair]


def random_tokens(n: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(VOCAB), k=n)


def close(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    return actual.shape == expected.shape and float((actual - expected).abs().max()) <= TOLERANCE


def feed(model: CausalModel, cache: KVCache, tokens: Sequence[int], chunks: Sequence[int]) -> torch.Tensor:
    """Commit tokens in chunks of these lengths; the logits of all of them."""
    rows, start = [], cache.length
    assert sum(chunks) == len(tokens)
    for low, high in pairwise([0, *torch.tensor(chunks).cumsum(0).tolist()]):
        rows.append(model.forward(Batch.chain(tokens[low:high], start + low), [cache]).logits)
        cache.commit(range(high - low))
    return torch.cat(rows)


def paths(parents: Sequence[int], tokens: Sequence[int]) -> list[list[int]]:
    """The tokens from the root down to each node."""
    result: list[list[int]] = []
    for parent, token in zip(parents, tokens, strict=True):
        result.append([*(result[parent] if parent >= 0 else []), token])
    return result


@pytest.fixture(params=["exact", "fast"])
def mode(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("name", MODELS)
def test_prefill_decode_tree_commit_truncate(pair: GetPair, name: str, mode: str) -> None:
    reference = pair(name)
    model = load_model(reference.folder, backend=f"reference-{mode}")
    assert isinstance(model, Decoder)
    assert model.row_invariant == (mode == "exact")
    text = random_tokens(157)  # past the windows, the original context of scaled ropes, and one block of attention
    cache = model.new_cache(200, 16)
    logits = feed(model, cache, text, [1, 2, 121, 9, 17, 1, 1, 5])
    assert close(logits, reference.logits(text))

    # A tree below the text: every node equals the last row of its own path.
    nodes = random_tokens(len(TREE), seed=1)
    tree = model.forward(Batch.of([(nodes, TREE)], [cache.length]), [cache]).logits
    by_path = [reference.logits([*text, *path])[-1] for path in paths(TREE, nodes)]
    assert close(tree, torch.stack(by_path))

    # A path that is no prefix of the rows is kept, and more text follows it.
    cache.commit([0, 2, 5, 7])
    text += [nodes[i] for i in (0, 2, 5, 7)]
    more = random_tokens(6, seed=2)
    assert close(feed(model, cache, more, [4, 2]), reference.logits(text + more)[-6:])

    # Forget the commit and some of the prompt, and go on differently.
    cache.truncate(60)
    assert close(feed(model, cache, more, [6]), reference.logits(text[:60] + more)[-6:])


@pytest.mark.parametrize("name", ["llama", "mistral-window", "qwen3-bias-layer-types"])
def test_batch_of_several_sequences(pair: GetPair, name: str, mode: str) -> None:
    """A chain, a tree and a single row in one forward, over caches of different lengths; logits of trailing rows."""
    reference = pair(name)
    model = load_model(reference.folder, backend=f"reference-{mode}")
    texts = [random_tokens(n, seed=n) for n in (40, 3, 17)]
    caches = [model.new_cache(64, 16) for _ in texts]
    for text, cache in zip(texts, caches, strict=True):
        feed(model, cache, text, [len(text)])
    rows = [(random_tokens(5, 5), range(-1, 4)), (random_tokens(len(TREE), 6), TREE), (random_tokens(1, 7), (-1,))]
    batch = Batch.of(rows, [len(text) for text in texts], num_logits=[2, len(TREE), 0])
    output = model.forward(batch, caches, taps=(1,))
    expected = [reference.logits([*texts[0], *rows[0][0]])[-2:]]
    expected += [reference.logits([*texts[1], *path])[-1:] for path in paths(TREE, rows[1][0])]
    assert close(output.logits, torch.cat(expected))
    assert output.taps[1].shape == (15, model.hidden_size)


@pytest.mark.parametrize("name", ["llama-tied-mha", "qwen3"])
def test_taps_and_parts(pair: GetPair, name: str, mode: str) -> None:
    reference = pair(name)
    model = load_model(reference.folder, backend=f"reference-{mode}")
    assert isinstance(model, Decoder)
    text = random_tokens(21)
    with torch.no_grad():
        hidden = reference.module(torch.tensor([text]), output_hidden_states=True).hidden_states
    cache = model.new_cache(32, 4)
    output = model.forward(Batch.chain(text, num_logits=1), [cache], taps=("embed", 0, 2, "norm"))
    assert list(output.taps) == ["embed", 0, 2, "norm"]
    assert close(output.taps["embed"], hidden[0][0])
    assert close(output.taps[0], hidden[1][0])
    assert close(output.taps["norm"], hidden[3][0])  # transformers norms the last one
    assert close(model.final_norm(output.taps[2]), hidden[3][0])
    assert close(model.embed(text), hidden[0][0])
    assert output.logits.shape == (1, VOCAB)
    assert close(model.head(output.taps["norm"])[-1:], reference.logits(text)[-1:])


def test_rows_without_logits(pair: GetPair, mode: str) -> None:
    model = load_model(pair("llama").folder, backend=f"reference-{mode}")
    cache = model.new_cache(32, 4)
    assert model.forward(Batch.chain([1, 2, 3], num_logits=0), [cache]).logits.shape == (0, VOCAB)


def test_a_large_tree_is_attended_row_by_row(pair: GetPair) -> None:
    """More nodes than one block of exact attention may hold: the same rows as in small trees."""
    reference = pair("llama")
    model = load_model(reference.folder, backend="reference-exact")
    text, parents = random_tokens(30), [-1, *((i - 1) // 2 for i in range(1, 90))]
    nodes = random_tokens(90, seed=3)
    cache = model.new_cache(64, 128)
    feed(model, cache, text, [30])
    large = model.forward(Batch.of([(nodes, parents)], [30]), [cache]).logits
    small = model.forward(Batch.of([(nodes[:40], parents[:40])], [30]), [cache]).logits
    assert torch.equal(large[:40], small)
    assert close(large[-1], reference.logits([*text, *paths(parents, nodes)[-1]])[-1])
