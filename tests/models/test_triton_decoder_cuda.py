"""What no interpreter can show of the decoder on Triton's kernels: captured graphs, and the bits that a GPU gives."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from quantspec.models.base import CausalModel
from quantspec.models.config import ModelConfig
from quantspec.models.load import load_decoder
from quantspec.numerics.kv import KVFormat
from quantspec.numerics.scheme import Scheme
from quantspec.types import Batch

from .conftest import VOCAB, make_pair
from .decoding import decode, prefilled, random_tree
from .test_cpu_decoder import packed_copy

if not torch.cuda.is_available():
    pytest.skip("there is no CUDA device that torch can use", allow_module_level=True)
pytest.importorskip("triton", reason="triton is not installed")

from quantspec.models.load_triton import load_triton_decoder
from quantspec.models.triton_decoder import TritonDecoder

LENGTH = 330  # past the end of a chunk, and past the windows
CUDA = torch.device("cuda")
SIZES = {"hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8, "head_dim": 64}
WINDOW = {"use_sliding_window": True, "sliding_window": 21, "max_window_layers": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("w4")
    return packed_copy(make_pair(folder / "dense", "qwen2", **SIZES, **WINDOW).folder, folder / "w", Scheme(4, 128))


BFLOAT16 = torch.bfloat16
KINDS = [(BFLOAT16, None), (torch.float16, None), (torch.float32, None), (BFLOAT16, 8), (BFLOAT16, 4)]


@pytest.fixture(scope="module", params=KINDS, ids=str)
def model(folder: Path, request: pytest.FixtureRequest) -> TritonDecoder:
    dtype, kv_bits = request.param
    config = ModelConfig.load(folder)
    kv_format = None if kv_bits is None else KVFormat(kv_bits, config.head_dim)
    return load_triton_decoder(folder, config, CUDA, dtype, head_bits=8, kv_format=kv_format)


@pytest.fixture(scope="module")
def text() -> list[int]:
    return random.Random(0).choices(range(VOCAB), k=LENGTH)


@pytest.fixture(scope="module")
def truth(model: TritonDecoder, text: list[int]) -> torch.Tensor:
    return decode(model, text, model.new_cache(LENGTH, 1)).logits


def test_near_the_reference(folder: Path, text: list[int]) -> None:
    config = ModelConfig.load(folder)
    with torch.inference_mode():
        reference = load_decoder(folder, config, torch.device("cpu"), exact=False)
    expected = prefilled_logits(reference, text)
    # fp32 sums of up to 1536 terms in another order, through three layers; in bf16, a dozen roundings a layer.
    for dtype, atol in ((torch.float32, 1e-3), (torch.bfloat16, 2e-1)):
        logits = prefilled_logits(load_triton_decoder(folder, config, CUDA, dtype), text)
        torch.testing.assert_close(logits, expected, rtol=0, atol=atol * float(expected.std()))


def prefilled_logits(model: CausalModel, text: list[int]) -> torch.Tensor:
    return model.forward(Batch.chain(text), [model.new_cache(len(text), 0)]).logits.cpu()


def test_chains(model: TritonDecoder, text: list[int], truth: torch.Tensor) -> None:
    rng = random.Random(0)
    cache = prefilled(model, text, 0)
    for n in [*range(1, 66), *range(1, 66), LENGTH]:  # the second time, by graphs
        cache.truncate(start := rng.randrange(0, LENGTH - n + 1))
        logits = model.forward(Batch.chain(text[start : start + n], start), [cache]).logits
        cache.length = LENGTH
        assert torch.equal(logits, truth[start : start + n]), f"{n} rows at {start}"


@pytest.mark.parametrize("cached", [0, 19, 250])
def test_trees(model: TritonDecoder, text: list[int], cached: int) -> None:
    rng = random.Random(cached)
    for n in (2, 7, 40, 64, 150):
        cache, alone = model.new_cache(2 * LENGTH, 150), prefilled(model, text[:cached], LENGTH)
        if cached:
            model.forward(Batch.chain(text[:cached], num_logits=0), [cache])
            cache.commit(range(cached))
        tokens, parents = random_tree(rng, n)
        tree = model.forward(Batch.of([(tokens, parents)], [cached]), [cache]).logits
        path = [n - 1]
        while parents[path[-1]] >= 0:
            path.append(parents[path[-1]])
        path.reverse()
        assert torch.equal(decode(model, [tokens[node] for node in path], alone).logits, tree[path])
        cache.commit(path)
        following = Batch.chain([7, 8, 9], cache.length)
        assert torch.equal(model.forward(following, [cache]).logits, model.forward(following, [alone]).logits)


def test_batches(model: TritonDecoder, text: list[int]) -> None:
    rng, lengths = random.Random(1), (3, 130, 0, 17)
    caches = [prefilled(model, text[:length], LENGTH) for length in lengths]
    rows = [random_tree(rng, rng.randrange(1, 60)) for _ in lengths]
    alone = [model.forward(Batch.of([rows[s]], [lengths[s]]), [caches[s]]).logits for s in range(4)]
    assert torch.equal(model.forward(Batch.of(rows, lengths), caches).logits, torch.cat(alone))


def test_graphs_serve_every_context_without_waiting(model: TritonDecoder, text: list[int], truth: torch.Tensor) -> None:
    cache = prefilled(model, text[:40], LENGTH)
    decode(model, text[40:43], cache)  # launched, captured, replayed
    captured = cache.storage.graphs[8, ("norm",), None]
    assert captured is not None
    assert not model.notes
    rows = []
    torch.cuda.set_sync_debug_mode("error")
    try:
        for start in range(43, 300):
            rows.append(model.forward(Batch.chain([text[start]], start), [cache], ("norm",)).logits)
            cache.commit([0])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert cache.storage.graphs[8, ("norm",), None] is captured
    assert torch.equal(torch.cat(rows), truth[43:300])
