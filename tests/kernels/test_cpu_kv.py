"""The kernels' rows of keys and values hold the oracle's bytes, by vectors and without them."""

from __future__ import annotations

import ctypes
import random
from ctypes import c_int, c_void_p
from typing import Any

import pytest
import torch

from quantspec.kernels.build_cache import run
from quantspec.kernels.cpu import build, library
from quantspec.kernels.dispatch import Activations
from quantspec.models.config import ModelConfig
from quantspec.models.load_cpu import load_cpu_decoder
from quantspec.models.resolve import resolve
from quantspec.numerics.kv import KVFormat
from quantspec.types import Batch

pytestmark = pytest.mark.skipif(library.usable() is not None, reason=str(library.usable()))


@pytest.fixture(scope="module")
def portable(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The library without vector instructions; little optimized, which changes no bit and takes 5 seconds."""
    out = tmp_path_factory.mktemp("portable") / "portable.so"
    source = build.SOURCES / "quantspec_cpu.cpp"
    run([*build.find_compiler(), *build.FLAGS, "-O1", str(source), "-o", str(out)])
    return ctypes.CDLL(str(out))


@pytest.fixture(params=["portable", "native"])
def kernels(request: pytest.FixtureRequest, portable: Any) -> Any:
    return library.load() if request.param == "native" else portable


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("head_dim", [2, 18, 64, 96, 128, 130])
def test_bytes_are_the_oracles(kernels: Any, bits: int, head_dim: int) -> None:
    rows = torch.randn(70, head_dim, generator=torch.Generator().manual_seed(1)) * torch.logspace(-38, 30, 70)[:, None]
    rows[3], rows[7] = 0.0, 1e-45
    rows[5, 1], rows[6, 0], rows[8, -1] = float("nan"), float("inf"), -float("inf")
    rows[9] = torch.arange(head_dim) % 16 - 7.5  # ties
    form = KVFormat(bits, head_dim)
    expected = form.encode(rows)
    stored, decoded = torch.empty_like(expected), torch.empty_like(rows)
    kernels.qs_kv_encode(
        c_void_p(rows.data_ptr()), c_int(70), c_int(bits), c_int(head_dim), c_void_p(stored.data_ptr())
    )
    assert torch.equal(stored, expected)
    kernels.qs_kv_decode(
        c_void_p(stored.data_ptr()), c_int(70), c_int(bits), c_int(head_dim), c_void_p(decoded.data_ptr())
    )
    torch.testing.assert_close(decoded, form.decode(expected), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("activations", ["int8", "fp32"])
def test_a_forward_has_the_same_bits_without_vectors(portable: Any, activations: Activations) -> None:
    folder, tokens = resolve("default/target-w4"), random.Random(0).choices(range(4096), k=40)
    config = ModelConfig.load(folder)
    for bits in (8, 4):
        model = load_cpu_decoder(folder, config, activations, KVFormat(bits, config.head_dim))
        caches, logits = [model.new_cache(40, 0) for _ in range(2)], []
        for cache in caches:
            logits.append(model.forward(Batch.chain(tokens), [cache]).logits)
            model._forward = portable.qs_forward
            model._forward.argtypes = [c_void_p, c_void_p]
        assert torch.equal(*logits)
        assert torch.equal(caches[0].kv, caches[1].kv)
