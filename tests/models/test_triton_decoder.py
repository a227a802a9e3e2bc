"""The decoder on Triton's kernels, under their interpreter where there is no GPU: the reference's logits and taps, rows
with the same bits however they come, and what captured graphs must not change."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from quantspec.errors import UsageError
from quantspec.kernels.reference import Linear
from quantspec.models.base import CausalModel, Output
from quantspec.models.config import ModelConfig
from quantspec.models.load import load_decoder
from quantspec.models.weights import HEAD_SCHEMES
from quantspec.numerics.affine import dequantize, quantize
from quantspec.numerics.scheme import Scheme
from quantspec.types import Batch

from .conftest import make_pair
from .decoding import decode, prefilled
from .test_cpu_decoder import packed_copy

pytest.importorskip("triton", reason="triton is not installed")

from quantspec.kernels.triton import attention
from quantspec.models import triton_frame, triton_rounds
from quantspec.models.load_triton import load_triton_decoder
from quantspec.models.triton_decoder import TritonDecoder
from quantspec.models.triton_graphs import NO_GRAPHS, Graphs

SMALL = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 160}
SLIDING = {"use_sliding_window": True, "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
MODELS: dict[str, tuple[str, dict[str, Any], Scheme, tuple[str, ...]]] = {
    # Norms of queries and keys, biases, a window in one layer.
    "w4": (
        "qwen3",
        {**SMALL, **SLIDING, "hidden_size": 32, "intermediate_size": 48, "head_dim": 16, "attention_bias": True},
        Scheme(4, 32, symmetric=False),
        (),
    ),
    # Widths that fill nothing evenly and rows that are not aligned; a fused layer of two kinds; one embedding for both.
    "w8-odd": (
        "llama",
        {"hidden_size": 36, "intermediate_size": 50, "head_dim": 18, "num_attention_heads": 1}
        | {"num_key_value_heads": 1, "num_hidden_layers": 1, "vocab_size": 160, "tie_word_embeddings": True},
        Scheme(8, 32),
        ("k_proj",),
    ),
}
TREE = (-1, -1, 0, 0, 1, 2, 2, 5, 7)
TAPS = ("embed", 0, "norm")
# Of values of size 1 to 4. fp32: sums of up to 50 terms in another order. 16 bits: a dozen roundings in sequence, which
# the interpreter makes by cutting bf16 off. A wrong mask, position or weight shows in fp32 as 1e-2.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-2, torch.bfloat16: 2e-1}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for name, (architecture, options, scheme, keep) in MODELS.items():
        folder = tmp_path_factory.mktemp(name)
        made[name] = packed_copy(
            make_pair(folder / "dense", architecture, **options).folder, folder / "w", scheme, keep
        )
    return made


@pytest.fixture(scope="module")
def expected(folders: dict[str, Path]) -> dict[str, list[torch.Tensor]]:
    cpu = torch.device("cpu")
    with torch.inference_mode():
        return {
            name: script(load_decoder(folder, ModelConfig.load(folder), cpu, exact=False))
            for name, folder in folders.items()
        }


@pytest.fixture
def device(triton_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """Under the interpreter, which takes 0.1 s for a row: shorter chunks, so that short texts end some, and tiles that
    rows fill up sooner."""
    if triton_device.type == "cpu":
        monkeypatch.setattr(attention, "CHUNK", 64)
        monkeypatch.setattr(triton_frame, "TILES", (1, 4, 6, 9, 13, 18, 64))
    with torch.device("cpu"):
        yield triton_device


@pytest.fixture
def odd(folders: dict[str, Path], device: torch.device) -> TritonDecoder:
    return load(folders["w8-odd"], device, torch.float32)


@pytest.fixture
def w4(folders: dict[str, Path], device: torch.device) -> TritonDecoder:
    return load(folders["w4"], device, torch.bfloat16)


def load(folder: Path, device: torch.device, dtype: torch.dtype, **options: Any) -> TritonDecoder:
    return load_triton_decoder(folder, ModelConfig.load(folder), device, dtype, **options)


def text_of(n: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(160), k=n)


def script(model: CausalModel) -> list[torch.Tensor]:
    """Logits and taps of a text in chunks, a tree below it, what follows a commit, and what follows a truncation."""
    text, cache, results = text_of(9), model.new_cache(32, 16), []
    for low, high in pairwise([0, 1, 4, 9]):
        output = model.forward(Batch.chain(text[low:high], low), [cache], TAPS)
        cache.commit(range(high - low))
        results += [output.logits, *output.taps.values()]
    tree = model.forward(Batch.of([(text_of(len(TREE), 1), TREE)], [cache.length], [8]), [cache], TAPS)
    cache.commit([0, 2, 5, 7])
    results += [tree.logits, *tree.taps.values()]
    results.append(model.forward(Batch.chain(text_of(3, 2), cache.length), [cache]).logits)
    cache.truncate(7)
    results.append(model.forward(Batch.chain(text_of(3, 3), 7), [cache]).logits)
    return [result.cpu() for result in results]


@pytest.mark.parametrize(
    "name,dtype", [("w4", torch.float32), ("w4", torch.bfloat16), ("w8-odd", torch.float32), ("w8-odd", torch.float16)]
)
def test_near_the_reference(
    folders: dict[str, Path], expected: dict[str, list[torch.Tensor]], device: torch.device, name: str, dtype: Any
) -> None:
    for actual, reference in zip(script(load(folders[name], device, dtype)), expected[name], strict=True):
        assert actual.dtype == torch.float32
        torch.testing.assert_close(actual, reference, rtol=0, atol=TOLERANCE[dtype])


def test_chains(odd: TritonDecoder) -> None:
    """A row has the bits of plain decoding at every width from 1 to 17."""
    check_chains(odd, range(2, 18))


def test_chains_with_windows(w4: TritonDecoder) -> None:
    check_chains(w4, (2, 6))


def check_chains(model: TritonDecoder, widths: Sequence[int]) -> None:
    length = max(widths) + 1
    text = text_of(length)
    cache = model.new_cache(length, 0)
    truth, rng = decode(model, text, cache), random.Random(0)
    for n in widths:
        cache.truncate(start := rng.randrange(0, length - n + 1))
        output = model.forward(Batch.chain(text[start : start + n], start), [cache], ("norm",))
        cache.length = length  # the rows just written are those of the text again
        assert torch.equal(output.logits, truth.logits[start : start + n]), f"{n} rows at {start}"
        assert torch.equal(output.taps["norm"], truth.taps["norm"][start : start + n])


def test_trees(w4: TritonDecoder) -> None:
    check_tree(w4, 0)


def test_trees_across_the_end_of_a_chunk(odd: TritonDecoder) -> None:
    check_tree(odd, 61)


def check_tree(model: TritonDecoder, cached: int) -> None:
    """A path of a tree has the bits of that path decoded alone, and so does what follows its commit."""
    tokens, text, path = text_of(len(TREE), 1), text_of(cached), [0, 2, 5, 7, 8]
    cache = prefilled(model, text, 16)
    alone = model.new_cache(cached + 16, 64)
    alone.storage.kv.copy_(cache.storage.kv)
    alone.length = cached
    tree = model.forward(Batch.of([(tokens, TREE)], [cached]), [cache]).logits
    assert torch.equal(decode(model, [tokens[node] for node in path], alone).logits, tree[path])
    cache.commit(path)
    following = Batch.chain([7, 8, 9], cache.length)
    assert torch.equal(model.forward(following, [cache]).logits, model.forward(following, [alone]).logits)


def test_batches_and_rounds(odd: TritonDecoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences together as each alone, in rounds or in one; a sequence without rows; logits of the last rows."""
    model = odd
    lengths, rows = (3, 0, 5, 9), [(text_of(9, 1), TREE), ([], []), (text_of(13, 2), range(-1, 12)), ([4], [-1])]
    caches = [prefilled(model, text_of(length), 16) for length in lengths]
    alone = [model.forward(Batch.of([rows[s]], [lengths[s]]), [caches[s]], TAPS) for s in (0, 2, 3)]
    for most, counts in ((256, (9, 0, 13, 1)), (5, (2, 0, 7, 0))):
        monkeypatch.setattr(triton_rounds, "MOST_ROWS", most)
        together = model.forward(Batch.of(rows, lengths, counts), caches, TAPS)
        last = [output.logits[len(output.logits) - counts[s] :] for output, s in zip(alone, (0, 2, 3), strict=True)]
        assert torch.equal(together.logits, torch.cat(last))
        for tap in TAPS:
            assert torch.equal(together.taps[tap], torch.cat([output.taps[tap] for output in alone]))


def test_parts_are_those_of_a_forward(odd: TritonDecoder) -> None:
    """What drafters borrow gives the bits of the forward itself."""
    model, text, cache = odd, text_of(7), odd.new_cache(8, 0)
    output = model.forward(Batch.chain(text, num_logits=3), [cache], TAPS)
    assert torch.equal(model.embed(text), output.taps["embed"])
    assert torch.equal(model.head(output.taps["norm"])[4:], output.logits)
    last = model.forward(Batch.chain(text), [cache], (model.config.num_layers - 1,)).taps
    assert torch.equal(model.final_norm(*last.values()), output.taps["norm"])
    assert model.forward(Batch.of([((), ())], [0]), [cache], ("norm",)).taps["norm"].shape == (0, model.hidden_size)


def test_head_in_8_bits(folders: dict[str, Path], device: torch.device) -> None:
    model, plain = (load(folders["w8-odd"], device, torch.float32, head_bits=bits) for bits in (8, 16))
    rounded = Linear(dequantize(quantize(plain._embedding.cpu(), HEAD_SCHEMES[8])))
    x = torch.randn(3, model.hidden_size)
    # 36 products of numbers below 1, summed in another order.
    torch.testing.assert_close(model.head(x.to(device)).cpu(), rounded(x), rtol=0, atol=1e-5)
    assert not torch.equal(model.head(x.to(device)), plain.head(x.to(device)))
    with pytest.raises(UsageError, match="3 bits"):
        load(folders["w8-odd"], device, torch.float32, head_bits=3)


def tensors_of(output: Output) -> list[torch.Tensor]:
    return [output.logits, *output.taps.values(), *([] if output.draws is None else [output.draws])]


class Capturing(Graphs):
    """In place of a CUDA graph, its contract: a replay writes its results over those of the one before."""

    def __init__(self, error: RuntimeError | None = None) -> None:
        super().__init__(torch.device("cpu"))
        self.usable, self.error, self.captured = True, error, 0

    def _capture(self, run: Callable[[], Output]) -> Callable[[], Output]:
        self.captured += 1
        if self.error is not None:
            raise self.error
        static = run()
        for tensor in tensors_of(static):
            tensor.fill_(-7)  # a capture computes nothing

        def replay() -> Output:
            for tensor, result in zip(tensors_of(static), tensors_of(run()), strict=True):
                tensor.copy_(result)
            return static

        return replay


def test_graphs(folders: dict[str, Path], device: torch.device) -> None:
    """One graph for all contexts and, after a cache is gone, for the next of its size."""
    model, text = load(folders["w8-odd"], device, torch.float32), text_of(4)
    eager = decode(model, text, model.new_cache(8, 0))
    model._graphs = graphs = Capturing()
    for _ in range(2):
        cache = model.new_cache(8, 0)
        replayed = decode(model, text, cache)
        assert torch.equal(replayed.logits, eager.logits)
        assert torch.equal(replayed.taps["norm"], eager.taps["norm"])
        assert graphs.captured == 1
        del cache
    assert not model.notes


def test_no_memory_to_capture(folders: dict[str, Path], device: torch.device) -> None:
    """The text is the same, one line says so, and nothing is captured any more; so too where nothing can be captured.
    Other errors are not hidden."""
    model, text = load(folders["w8-odd"], device, torch.float32), text_of(4)
    eager = decode(model, text, model.new_cache(8, 0))
    ended = RuntimeError("the capture was broken off")
    ended.__context__ = torch.OutOfMemoryError("")
    model._graphs = graphs = Capturing(ended)
    assert torch.equal(decode(model, text, model.new_cache(8, 0)).logits, eager.logits)
    assert graphs.captured == len(model.notes) == 1
    assert "no memory" in model.notes[0]
    model._graphs = Capturing(RuntimeError("CUDA error: operation not permitted when stream is capturing"))
    assert torch.equal(decode(model, text, model.new_cache(8, 0)).logits, eager.logits)
    assert model.notes[1:] == (NO_GRAPHS,)
    model._graphs = Capturing(RuntimeError("an illegal address"))
    with pytest.raises(RuntimeError, match="illegal"):
        decode(model, text, model.new_cache(8, 0))


def test_batches_for_another_cache_are_caught(folders: dict[str, Path], device: torch.device) -> None:
    model = load(folders["w8-odd"], device, torch.float32)
    cache = model.new_cache(8, 4)
    for batch in (Batch.chain([1], 3), Batch.chain(range(13)), Batch.chain([160]), Batch.chain([-1])):
        with pytest.raises(AssertionError):
            model.forward(batch, [cache])
    for tap in ("middle", 1, -1):
        with pytest.raises(AssertionError):
            model.forward(Batch.chain([1]), [cache], (tap,))
