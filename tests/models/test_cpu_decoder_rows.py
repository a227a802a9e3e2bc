"""The packed decoder: a row has the same bits at any width, tree, chunking, batch and number of threads."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from quantspec.kernels.cpu import library
from quantspec.models.base import Output
from quantspec.models.config import ModelConfig
from quantspec.models.cpu_decoder import CpuDecoder
from quantspec.models.load_cpu import load_cpu_decoder
from quantspec.numerics.scheme import Scheme
from quantspec.types import Batch

from .conftest import VOCAB, Pair, make_pair
from .decoding import decode, prefilled, random_tree
from .test_cpu_decoder import packed_copy

GetPair = Callable[[str], Pair]
LENGTH = 330  # more than two blocks of rows, and past the windows

pytestmark = pytest.mark.skipif(library.usable() is not None, reason=str(library.usable()))


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = library.load().qs_threads()
    library.load().qs_set_threads(request.param)
    yield request.param
    library.load().qs_set_threads(before)


@pytest.fixture(scope="module", params=["int8", "fp32"])
def activations(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module", params=["wide", "windows", "odd"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, activations: str) -> CpuDecoder:
    """Several groups and panels per layer; sliding windows and one head per key; widths that fill nothing evenly."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "wide":
        sizes = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 2}
        source = make_pair(folder / "dense", "llama", **sizes).folder
    elif request.param == "windows":
        window = {"use_sliding_window": True, "sliding_window": 21, "max_window_layers": 1, "num_key_value_heads": 4}
        source = make_pair(folder / "dense", "qwen2", **window).folder
    else:
        sizes = {"hidden_size": 76, "intermediate_size": 101, "num_attention_heads": 6, "head_dim": 18}
        source = make_pair(folder / "dense", "qwen3", **sizes).folder
    packed = packed_copy(source, folder / "packed", Scheme(4, 32, symmetric=request.param == "wide"))
    return load_cpu_decoder(packed, ModelConfig.load(packed), activations)


@pytest.fixture(scope="module")
def text() -> list[int]:
    return random.Random(0).choices(range(VOCAB), k=LENGTH)


@pytest.fixture(scope="module")
def truth(model: CpuDecoder, text: list[int]) -> Output:
    return decode(model, text, model.new_cache(LENGTH, 1))


def test_chains(model: CpuDecoder, text: list[int], truth: Output, threads: int) -> None:
    """A prompt in any chunking, and every width from 1 to 64 somewhere in the text."""
    rng = random.Random(threads)
    for chunks in ([LENGTH], [100, 1, 163, 66], [64] * 5 + [10]):
        cache, start = model.new_cache(LENGTH, 0), 0
        for n in chunks:
            output = model.forward(Batch.chain(text[start : start + n], start), [cache], taps=("norm",))
            assert torch.equal(output.logits, truth.logits[start : start + n])
            assert torch.equal(output.taps["norm"], truth.taps["norm"][start : start + n])
            cache.commit(range(n))
            start += n
    for n in range(1, 65):
        cache.truncate(start := rng.randrange(0, LENGTH - n))
        output = model.forward(Batch.chain(text[start : start + n], start), [cache])
        cache.length = LENGTH  # the rows just written are those of the text again
        assert torch.equal(output.logits, truth.logits[start : start + n]), f"{n} rows at {start}"


@pytest.mark.parametrize("cached", [0, 19, 301])
def test_trees(model: CpuDecoder, text: list[int], threads: int, cached: int) -> None:
    """Every node of random trees equals its path decoded alone, and so does what follows a commit."""
    rng = random.Random(cached)
    for n in (2, 7, 40, 150):  # the last is more than one block of rows
        cache = model.new_cache(2 * LENGTH, 150)
        if cached:
            model.forward(Batch.chain(text[:cached], num_logits=0), [cache])
            cache.commit(range(cached))
        tokens, parents = random_tree(rng, n)
        tree = model.forward(Batch.of([(tokens, parents)], [cached]), [cache]).logits
        for leaf in rng.sample(range(n), 2):
            path = [leaf]
            while parents[path[-1]] >= 0:
                path.append(parents[path[-1]])
            path.reverse()
            alone = prefilled(model, text[:cached], LENGTH)
            assert torch.equal(decode(model, [tokens[node] for node in path], alone).logits, tree[path])
        cache.commit(path)
        following = model.forward(Batch.chain([7, 8, 9], cache.length), [cache]).logits
        assert torch.equal(following, model.forward(Batch.chain([7, 8, 9], alone.length), [alone]).logits)


def test_batches(model: CpuDecoder, text: list[int], threads: int) -> None:
    rng = random.Random(1)
    lengths, caches, rows, alone = (3, 130, 0, 17), [], [], []
    for length in lengths:
        caches.append(prefilled(model, text[:length], LENGTH))
        rows.append(random_tree(rng, rng.randrange(1, 60)))
        alone.append(model.forward(Batch.of([rows[-1]], [length]), caches[-1:]).logits)
    together = model.forward(Batch.of(rows, lengths), caches).logits
    assert torch.equal(together, torch.cat(alone))
    last = model.forward(Batch.of(rows, lengths, num_logits=[1, 0, 1, 1]), caches).logits
    assert torch.equal(last, torch.cat([alone[i][-1:] for i in (0, 2, 3)]))


def test_rows_outside_the_window_of_a_fault(tmp_path: Path) -> None:
    """A value that is not finite shows in the rows that attend it, not in the others of the same block of rows."""
    folder = make_pair(tmp_path / "one", "mistral", num_hidden_layers=1, sliding_window=9).folder
    model = load_cpu_decoder(folder, ModelConfig.load(folder), "fp32")
    cache, tokens = prefilled(model, list(range(6)), LENGTH), list(range(10, 26))
    cache.values[:, :, 2] = float("nan")
    alone = decode(model, tokens, cache).logits
    assert alone[:5].isnan().all()  # positions 6 to 10 attend slot 2
    assert alone[5:].isfinite().all()
    cache.truncate(6)
    together = model.forward(Batch.chain(tokens, 6), [cache]).logits
    assert torch.equal(together[5:], alone[5:])
