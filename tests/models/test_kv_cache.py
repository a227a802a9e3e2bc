"""Decoders with a cache of 8 or 4-bit keys and values: rows keep their bits, and the numbers are the oracle's."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from quantspec.errors import UsageError
from quantspec.kernels.cpu import library
from quantspec.models.base import CausalModel, Output
from quantspec.models.cache import KVCache
from quantspec.models.config import KV_CALIBRATED, ModelConfig
from quantspec.models.cpu_decoder import CpuDecoder
from quantspec.models.load import load_decoder, load_model
from quantspec.models.load_cpu import load_cpu_decoder
from quantspec.numerics.kv import KVFormat
from quantspec.types import Batch

from .conftest import VOCAB, Pair, change_config, make_pair
from .decoding import decode, prefilled, random_tree

GetPair = Callable[[str], Pair]
LENGTH = 140  # more than one block of rows, and of decoded slots
KINDS = {
    64: ("llama", {"hidden_size": 128}),
    96: ("qwen3", {}),
    128: ("mistral", {"sliding_window": 21, "num_key_value_heads": 1}),
    18: ("qwen2", {}),
}
NATIVE = pytest.mark.skipif(library.usable() is not None, reason=str(library.usable()))


@pytest.fixture(scope="module", params=[8, 4])
def bits(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    architecture, options = KINDS[request.param]
    sizes = {"head_dim": request.param, "num_hidden_layers": 2, **options}
    return make_pair(tmp_path_factory.mktemp("kv"), architecture, **sizes).folder


@torch.no_grad()
def load(folder: Path, bits: int, kind: str) -> Any:
    config = ModelConfig.load(folder)
    form = KVFormat(bits, config.head_dim)
    if kind == "native":
        return load_cpu_decoder(folder, config, "fp32", form)
    return load_decoder(folder, config, torch.device("cpu"), kind == "exact", kv_format=form)


@pytest.fixture(scope="module", params=["exact", pytest.param("native", marks=NATIVE)])
def model(request: pytest.FixtureRequest, folder: Path, bits: int) -> CausalModel:
    return load(folder, bits, request.param)


@pytest.fixture(scope="module")
def text() -> list[int]:
    return random.Random(0).choices(range(VOCAB), k=LENGTH)


@pytest.fixture(scope="module")
def truth(model: CausalModel, text: list[int]) -> Output:
    return decode(model, text, model.new_cache(LENGTH, 1))


def test_chains_keep_their_bits(model: CausalModel, text: list[int], truth: Output) -> None:
    """A prompt in any chunking, and every width from 1 to 64 somewhere in the text."""
    rng = random.Random(2)
    for chunks in ([LENGTH], [3, 1, 90, 46]):
        cache, start = model.new_cache(LENGTH, 64), 0
        for n in chunks:
            output = model.forward(Batch.chain(text[start : start + n], start), [cache], taps=("norm",))
            assert torch.equal(output.logits, truth.logits[start : start + n])
            assert torch.equal(output.taps["norm"], truth.taps["norm"][start : start + n])
            cache.commit(range(n))
            start += n
    for n in range(1, 65, 3):
        cache.truncate(start := rng.randrange(0, LENGTH - n))
        output = model.forward(Batch.chain(text[start : start + n], start), [cache])
        cache.length = LENGTH  # type: ignore[misc]  # the rows just written are those of the text again
        assert torch.equal(output.logits, truth.logits[start : start + n]), f"{n} rows at {start}"


@pytest.mark.parametrize("cached", [0, 61])
def test_trees_keep_their_bits(model: CausalModel, text: list[int], cached: int) -> None:
    """Every node equals its path decoded alone, whatever was rejected beside it, and so does what follows a commit."""
    rng = random.Random(cached)
    cache = prefilled(model, text[:cached], LENGTH)
    tokens, parents = random_tree(rng, 40)
    tree = model.forward(Batch.of([(tokens, parents)], [cached]), [cache]).logits
    for leaf in rng.sample(range(40), 2):
        path = [leaf]
        while parents[path[-1]] >= 0:
            path.append(parents[path[-1]])
        path.reverse()
        alone = prefilled(model, text[:cached], LENGTH)
        assert torch.equal(decode(model, [tokens[node] for node in path], alone).logits, tree[path])
    cache.commit(path)
    assert torch.equal(cache.kv[:, :, : cache.length], alone.kv[:, :, : cache.length])
    following = model.forward(Batch.chain([7, 8, 9], cache.length), [cache]).logits
    assert torch.equal(following, model.forward(Batch.chain([7, 8, 9], alone.length), [alone]).logits)


def test_batches_keep_their_bits(model: CausalModel, text: list[int]) -> None:
    rng, lengths = random.Random(1), (3, 70, 17)
    caches = [prefilled(model, text[:length], LENGTH) for length in lengths]
    rows = [random_tree(rng, rng.randrange(1, 14)) for _ in lengths]
    alone = [
        model.forward(Batch.of([row], [length]), [cache]).logits
        for row, length, cache in zip(rows, lengths, caches, strict=True)
    ]
    assert torch.equal(model.forward(Batch.of(rows, lengths), caches).logits, torch.cat(alone))


@NATIVE
def test_threads_do_not_matter(folder: Path, bits: int, text: list[int]) -> None:
    model, kernels, logits = load(folder, bits, "native"), library.load(), []
    before = kernels.qs_threads()
    for threads in (1, 2):
        kernels.qs_set_threads(threads)
        logits.append(model.forward(Batch.chain(text), [model.new_cache(LENGTH, 0)]).logits)
    kernels.qs_set_threads(before)
    assert torch.equal(*logits)


@NATIVE
def test_native_is_the_references_attention_over_the_decoded_cache(folder: Path, bits: int, text: list[int]) -> None:
    """Both fill a cache of their own; codes that differ (an input near a tie) are few and one apart."""
    models = [load(folder, bits, kind) for kind in ("native", "fast")]
    caches = [prefilled(model, text, 4) for model in models]
    form = KVFormat(bits, models[0].config.head_dim)
    native, eager = (form.decode(cache.kv[0, :, :LENGTH]) for cache in caches)  # layer 0 has the same inputs
    step = eager.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)  # or less: the largest may have been clipped
    assert ((native - eager).abs() <= 1.001 * step).all()
    assert ((native - eager).abs() > 0.01 * step).float().mean() < 1e-3
    caches[0].kv.copy_(caches[1].kv)
    logits = [
        model.forward(Batch.chain([1, 2, 3], LENGTH), [cache]).logits
        for model, cache in zip(models, caches, strict=True)
    ]
    # Sums in another order differ by about 1e-6, which may flip single codes of the three new rows: 1e-3 and a few
    # hundredths were seen. A wrong scale, channel or mask differs by the size of the logits, about 1.
    torch.testing.assert_close(*logits, rtol=0, atol=5e-3 if bits == 8 else 0.1)


def test_codes_take_the_place_of_fp32(model: CausalModel, bits: int) -> None:
    """A quarter and an eighth of the bytes, but for scales."""
    cache = model.new_cache(1000, 24)
    assert isinstance(cache, KVCache)
    row = cache.format.row_bytes  # type: ignore[union-attr]
    assert cache.kv.dtype == torch.uint8
    assert cache.nbytes == 2 * 2 * cache.kv_heads * 1024 * row


def test_the_text_stays_close(folder: Path, text: list[int]) -> None:
    """Random models are no worse than this; 8 bits are nearer than 4."""
    plain, far = load_decoder(folder, ModelConfig.load(folder), torch.device("cpu"), exact=False), {}
    expected = plain.forward(Batch.chain(text), [plain.new_cache(LENGTH, 0)]).logits
    for bits in (8, 4):
        model = load(folder, bits, "fast")
        logits = model.forward(Batch.chain(text), [model.new_cache(LENGTH, 0)]).logits
        far[bits] = float((logits - expected).norm() / expected.norm())
    # Half a step is 1/255 and 1/15 of the largest value; through softmax and two layers it stays below 2% and 30%.
    assert far[8] < 0.02
    assert far[8] < far[4] < 0.3


def test_a_fault_shows_where_it_is_attended(model: CausalModel, text: list[int]) -> None:
    cache = prefilled(model, text[:20], LENGTH)
    form = cache.format
    rows = torch.full((1, 2 * cache.kv_heads, form.head_dim), float("nan"))
    cache.write(0, 6, rows)
    logits = model.forward(Batch.chain(text[20:22], 20), [cache]).logits
    assert logits.isnan().all()
    cache.truncate(6)  # what is cut off shows no more
    assert model.forward(Batch.chain(text[6:8], 6), [cache]).logits.isfinite().all()


def test_commit_and_truncate_move_bytes() -> None:
    form = KVFormat(4, 20)
    cache = KVCache(2, 3, 20, 40, 8, device=torch.device("cpu"), dtype=torch.float32, format=form)
    rng, kept = random.Random(0), []
    for step in range(60):
        if rng.random() < 0.2:
            cache.truncate(rng.randrange(len(kept) + 1))
            kept = kept[: cache.length]
        n = rng.randrange(1, 9)
        rows = torch.randn(n, 6, 20, generator=torch.Generator().manual_seed(step))
        for layer in range(2):
            cache.write(layer, cache.length, rows)
        chosen = sorted(rng.sample(range(n), rng.randrange(n + 1)))[: 40 - len(kept)]
        cache.commit(chosen)
        kept += [form.decode(form.encode(rows[i])) for i in chosen]
        keys, values = cache.read(1, 48)
        expected = torch.stack(kept, 1) if kept else torch.empty(6, 0, 20)
        assert torch.equal(torch.cat((keys, values))[:, : len(kept)], expected)


def test_int8_without_factors_says_so_and_int4_is_refused(pair: GetPair, tmp_path: Path) -> None:
    folder = pair("llama").folder
    model = load_model(folder, kv_cache_dtype="int8")
    assert [note for note in model.notes if "no calibrated key factors" in note]
    with pytest.raises(UsageError, match="no calibrated key factors") as refused:
        load_model(folder, kv_cache_dtype="int4")
    assert "--kv-cache-dtype int4" in (refused.value.hint or "")
    calibrated = make_pair(tmp_path / "calibrated", "llama").folder
    change_config(calibrated, **{KV_CALIBRATED: True})
    for dtype in ("int8", "int4"):
        model = load_model(calibrated, kv_cache_dtype=dtype)  # type: ignore[arg-type]
        assert not [note for note in model.notes if "key factors" in note]
        assert model.new_cache(4, 0).kv.dtype == torch.uint8  # type: ignore[attr-defined]


@pytest.mark.parametrize("backend", ["reference-exact", "reference-fast", pytest.param("cpu-fp32", marks=NATIVE)])
def test_backends_take_it(pair: GetPair, backend: str) -> None:
    model = load_model(pair("llama").folder, backend=backend, kv_cache_dtype="int8")
    assert model.backend == backend
    assert model.new_cache(4, 0).kv.dtype == torch.uint8  # type: ignore[attr-defined]


def test_others_refuse_in_one_line(pair: GetPair, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"has no int8 cache of keys and values|does not run on cpu"):
        load_model(pair("llama").folder, backend="triton", kv_cache_dtype="int8")
    foreign = make_pair(tmp_path / "foreign", "gemma", head_dim=16).folder
    with pytest.raises(UsageError, match="transformers keeps its keys and values"):
        load_model(foreign, kv_cache_dtype="int8")


@NATIVE
def test_a_cache_of_another_precision_is_refused(folder: Path) -> None:
    eight, four = (load(folder, bits, "native") for bits in (8, 4))
    assert isinstance(eight, CpuDecoder)
    with pytest.raises(AssertionError, match="a cache of another"):
        eight.forward(Batch.chain([1]), [four.new_cache(4, 0)])
