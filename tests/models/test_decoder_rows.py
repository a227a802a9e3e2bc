"""The reference in exact mode: a row has the same bits at any width, tree, chunking and batch."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch

from quantspec.models.decoder import Decoder
from quantspec.models.load import load_model
from quantspec.types import Batch

from .conftest import VOCAB, Pair, make_pair
from .decoding import decode, prefilled, random_tree

GetPair = Callable[[str], Pair]
LENGTH = 150  # the end of an attention block (128) lies within


@pytest.fixture(scope="module", params=["llama-biases-wide-heads", "mistral-wide-window", "qwen3", "target"])
def model(request: pytest.FixtureRequest, pair: GetPair, tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    if request.param == "target":  # the widths of the default family's target
        folder = make_pair(
            tmp_path_factory.mktemp("target"), "llama", hidden_size=256, intermediate_size=768, num_hidden_layers=2
        ).folder
    else:
        folder = pair(request.param).folder
    decoder = load_model(folder, backend="reference-exact")
    assert isinstance(decoder, Decoder)
    assert decoder.row_invariant
    return decoder


def test_rows_keep_their_bits(model: Decoder) -> None:
    rng = random.Random(0)
    text = rng.choices(range(VOCAB), k=LENGTH)
    truth = decode(model, text, model.new_cache(LENGTH, 1))

    # Prefill in any chunking, and at every width from 1 to 64 somewhere in the text.
    for chunks in ([LENGTH], [100, 1, 49], [64] * 3):
        cache, start = model.new_cache(LENGTH + 64, 64), 0
        for n in chunks:
            output = model.forward(Batch.chain(text[start : start + n], start), [cache], taps=("norm",))
            assert torch.equal(output.logits, truth.logits[start : start + n])
            assert torch.equal(output.taps["norm"], truth.taps["norm"][start : start + n])
            cache.commit(range(len(text[start : start + n])))
            start += n
    for n in range(1, 65):
        cache.truncate(start := rng.randrange(0, LENGTH - n))
        output = model.forward(Batch.chain(text[start : start + n], start), [cache])
        cache.length = LENGTH  # the rows just written are those of the text again
        assert torch.equal(output.logits, truth.logits[start : start + n]), f"{n} rows at {start}"


@pytest.mark.parametrize("cached", [0, 125, 251])
def test_trees_keep_their_bits(model: Decoder, cached: int) -> None:
    """Every node of random trees equals its path decoded alone, also across the ends of attention blocks (128, 256)."""
    rng = random.Random(cached)
    text = rng.choices(range(VOCAB), k=cached)
    cache = prefilled(model, text, LENGTH)
    tokens, parents = random_tree(rng, 40)
    tree = model.forward(Batch.of([(tokens, parents)], [cached]), [cache]).logits
    for leaf in rng.sample(range(40), 3):
        path = [leaf]
        while parents[path[-1]] >= 0:
            path.append(parents[path[-1]])
        path.reverse()
        alone = prefilled(model, text, LENGTH)
        assert torch.equal(decode(model, [tokens[node] for node in path], alone).logits, tree[path])

    # What a commit of a path that is no prefix leaves behind is what decoding it leaves behind.
    cache.commit(path)
    following = model.forward(Batch.chain([7, 8, 9], cache.length), [cache]).logits
    assert torch.equal(following, model.forward(Batch.chain([7, 8, 9], alone.length), [alone]).logits)


def test_batches_keep_their_bits(model: Decoder) -> None:
    rng = random.Random(1)
    lengths, caches, rows, alone = (3, 130, 17), [], [], []
    for length in lengths:
        caches.append(prefilled(model, rng.choices(range(VOCAB), k=length), LENGTH))
        rows.append(random_tree(rng, rng.randrange(1, 14)))
        alone.append(model.forward(Batch.of([rows[-1]], [length]), caches[-1:]).logits)
    together = model.forward(Batch.of(rows, lengths), caches).logits
    assert torch.equal(together, torch.cat(alone))
    last = model.forward(Batch.of(rows, lengths, num_logits=[1, 1, 1]), caches).logits
    assert torch.equal(last, torch.cat([each[-1:] for each in alone]))
