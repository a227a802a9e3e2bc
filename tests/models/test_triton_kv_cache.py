"""The decoder on Triton's kernels with keys and values in 8 and 4 bits: the reference's numbers, rows that keep their
bits, and a check at load that finds kernels at fault."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from quantspec.errors import Unavailable
from quantspec.models.config import ModelConfig
from quantspec.models.load import load_decoder
from quantspec.models.prove import check_kernels
from quantspec.numerics.kv import KVFormat
from quantspec.types import Batch

from .conftest import make_pair
from .decoding import decode
from .test_triton_decoder import TREE, script, text_of

pytest.importorskip("triton", reason="triton is not installed")

from quantspec.kernels.triton import attention, rope
from quantspec.models import triton_frame
from quantspec.models.load_triton import load_triton_decoder
from quantspec.models.triton_decoder import TritonDecoder

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1}
SMALL |= {"num_hidden_layers": 1, "vocab_size": 160}
# One of each head size: two groups, of which one is not full; a window; less than a group.
KINDS: dict[str, tuple[int, str, dict[str, Any]]] = {
    "llama-64": (4, "llama", {"head_dim": 64}),
    "qwen3-96": (8, "qwen3", {"head_dim": 96}),
    "mistral-128": (4, "mistral", {"head_dim": 128, "sliding_window": 5}),
    "qwen2-18": (8, "qwen2", {"head_dim": 18}),
}


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, KVFormat]:
    bits, architecture, options = KINDS[request.param]
    folder = make_pair(tmp_path_factory.mktemp("kv"), architecture, **SMALL | options).folder
    return folder, KVFormat(bits, options["head_dim"])


@pytest.fixture
def device(triton_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """As in ``test_triton_decoder``."""
    if triton_device.type == "cpu":
        monkeypatch.setattr(attention, "CHUNK", 64)
        monkeypatch.setattr(triton_frame, "TILES", (1, 4, 9, 64))
    with torch.device("cpu"):
        yield triton_device


@pytest.fixture
def model(kind: tuple[Path, KVFormat], device: torch.device) -> TritonDecoder:
    folder, form = kind
    return load_triton_decoder(folder, ModelConfig.load(folder), device, torch.float32, kv_format=form)


def test_near_the_reference(model: TritonDecoder, kind: tuple[Path, KVFormat]) -> None:
    folder, form = kind
    with torch.inference_mode():
        expected = script(load_decoder(folder, model.config, torch.device("cpu"), exact=False, kv_format=form))
    # Of values of size 1 to 4. Sums in another order differ by 1e-6, which may flip single codes. A wrong scale,
    # channel or mask differs by the size of the values.
    for actual, reference in zip(script(model), expected, strict=True):
        torch.testing.assert_close(actual, reference, rtol=0, atol=5e-3 if form.bits == 8 else 0.1)


def test_rows_keep_their_bits(model: TritonDecoder) -> None:
    """A prompt in any chunking, a tree over it, and what follows the tree's commit."""
    text = text_of(11)
    alone = model.new_cache(32, 16)
    truth = decode(model, text, alone).logits
    cache, start = model.new_cache(32, 16), 0
    for n in (3, 1, 7):
        rows = model.forward(Batch.chain(text[start : start + n], start), [cache]).logits
        assert torch.equal(rows, truth[start : start + n])
        cache.commit(range(n))
        start += n
    held = slice(0, 11)
    assert torch.equal(cache.storage.kv[:, :, held], alone.storage.kv[:, :, held])
    tokens, path = text_of(len(TREE), 1), [0, 2, 5, 7]
    tree = model.forward(Batch.of([(tokens, TREE)], [11]), [cache]).logits
    assert torch.equal(tree[path], decode(model, [tokens[node] for node in path], alone).logits)
    cache.commit(path)
    assert torch.equal(cache.storage.kv[:, :, :15], alone.storage.kv[:, :, :15])
    following = model.forward(Batch.chain([7, 8], 15), [cache]).logits
    assert torch.equal(following, model.forward(Batch.chain([7, 8], 15), [alone]).logits)


def test_a_fault_shows_where_it_is_attended(model: TritonDecoder) -> None:
    cache, form = model.new_cache(32, 16), model.kv_format
    assert form is not None
    model.forward(Batch.chain(text_of(9)), [cache])
    cache.commit(range(9))
    faulty = form.encode(torch.full((2, form.head_dim), float("nan"))).to(model.device)
    cache.storage.kv[0, :, 6] = faulty
    assert model.forward(Batch.chain([1, 2], 9), [cache]).logits.isnan().all()
    cache.truncate(6)  # what is cut off shows no more
    assert model.forward(Batch.chain([1, 2], 6), [cache]).logits.isfinite().all()


def test_codes_take_the_place_of_values(model: TritonDecoder, kind: tuple[Path, KVFormat]) -> None:
    cache = model.new_cache(100, 16)
    layers, planes, slots, row = cache.storage.kv.shape
    assert (cache.storage.kv.dtype, row) == (torch.uint8, kind[1].row_bytes)
    assert cache.nbytes == layers * planes * slots * row


def _other_half(held: Tensor) -> Tensor:
    return held >> 4 | held << 4


def wrong_bytes(form: KVFormat, change: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    right = rope.rope

    def write(qkv: Tensor, cos: Tensor, sin: Tensor, rows: Any, kv: Tensor, *rest: Any) -> Tensor:
        q = right(qkv, cos, sin, rows, kv, *rest)
        start = int(rows.cached)
        own = kv[:, start : start + len(rows)]
        kv[:, start : start + len(rows)] = change(own.clone())
        return q

    return write


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_faults_are_found_at_load(
    kind: tuple[Path, KVFormat], device: torch.device, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, form = kind
    config = ModelConfig.load(folder)
    check_kernels(config, device, dtype, form)
    faults: dict[str, Callable[[Tensor], Tensor]] = {
        "codes of other channels": lambda held: torch.cat(
            (held[..., : form.code_bytes].roll(1, -1), held[..., form.code_bytes :]), -1
        ),
        "the other half of every byte": lambda held: torch.cat(
            (_other_half(held[..., : form.code_bytes]), held[..., form.code_bytes :]), -1
        ),
        "scales of other rows": lambda held: torch.cat(
            (held[..., : form.code_bytes], held[..., form.code_bytes :].roll(1, 1)), -1
        ),
    }
    for change in faults.values():
        with monkeypatch.context() as patch:
            patch.setattr(rope, "rope", wrong_bytes(form, change))
            with pytest.raises(Unavailable, match="its kernel for writing keys and values is wrong"):
                check_kernels(config, device, dtype, form)
    right = attention.attention
    with monkeypatch.context() as patch:
        patch.setattr(attention, "attention", lambda q, keys, values, *rest: right(q, keys, values.flip(1), *rest))
        with pytest.raises(Unavailable, match="its kernel for attention is wrong"):
            check_kernels(config, device, dtype, form)
