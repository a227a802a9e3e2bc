"""The kernels' rows of keys and values hold the oracle's bytes, by vectors and without them."""

from __future__ import annotations

import ctypes
from ctypes import c_int, c_void_p
from typing import Any

import pytest
import torch

from quantspec.kernels.build_cache import run
from quantspec.kernels.cpu import build, library
from quantspec.numerics.kv import KVFormat

pytestmark = pytest.mark.skipif(library.usable() is not None, reason=str(library.usable()))


@pytest.fixture(scope="module", params=["portable", "native"])
def kernels(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The library as it is loaded here, and a small one compiled without vector instructions."""
    if request.param == "native":
        return library.load()
    folder = tmp_path_factory.mktemp("portable")
    source = folder / "kv.cpp"
    source.write_text('#include "linear.h"\n#include "kv_cache.h"\n')
    out = folder / "kv.so"
    run([*build.find_compiler(), *build.FLAGS, "-O1", f"-I{build.SOURCES}", str(source), "-o", str(out)])
    return ctypes.CDLL(str(out))


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
