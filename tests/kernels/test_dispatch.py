"""Backends are chosen by what they declare and what the machine has, and refusals say why."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from quantspec.errors import UsageError
from quantspec.kernels import dispatch
from quantspec.kernels.cuda import library as cuda_library
from quantspec.kernels.dispatch import BACKENDS, Backend, Request, choose, passed_over, table

BY_NAME = {backend.name: backend for backend in BACKENDS}
NO_COMPILER = "no C++ compiler was found"
W4 = Request(bits=4, group_size=128)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> dict[str, str | None]:
    """What each backend misses here; every one is there until a test says otherwise."""
    missing: dict[str, str | None] = {}

    def with_missing(backend: Backend) -> Backend:
        return replace(backend, missing=lambda: missing.get(backend.name))

    monkeypatch.setattr(dispatch, "BACKENDS", tuple(with_missing(backend) for backend in BACKENDS))
    return missing


def without_native(machine: dict[str, str | None]) -> None:
    machine |= {"cpu-int8": NO_COMPILER, "cpu-fp32": NO_COMPILER}


@pytest.mark.parametrize(
    "request_,native,eager",
    [
        (W4, "cpu-int8", "torch-int4"),
        (replace(W4, row_invariant=True), "cpu-int8", "reference-exact"),
        (replace(W4, activations="fp32"), "cpu-fp32", "reference-fast"),
        (Request(bits=8, group_size=-1), "cpu-int8", "reference-fast"),
        (Request(bits=4, group_size=-1), "cpu-int8", "reference-fast"),
        (Request(bits=3, group_size=96, rows=64), "cpu-int8", "reference-fast"),
        (Request(row_invariant=True), "cpu-fp32", "reference-exact"),
        (Request(), "cpu-fp32", "reference-fast"),
    ],
)
def test_the_fastest_that_serves(machine: dict[str, str | None], request_: Request, native: str, eager: str) -> None:
    assert choose(request_).name == native
    without_native(machine)
    chosen = choose(request_)
    assert chosen.name == eager
    assert passed_over(request_, chosen) == NO_COMPILER


def test_nothing_is_passed_over_where_nothing_is_missing(machine: dict[str, str | None]) -> None:
    assert passed_over(W4, choose(W4)) is None
    assert passed_over(Request(), choose(Request())) is None


def test_groups_that_fast_kernels_lack_are_named(machine: dict[str, str | None]) -> None:
    uneven = Request(bits=4, group_size=40)
    assert passed_over(uneven, choose(uneven)) == "cpu-int8 has no groups of 40"
    exact = replace(uneven, activations="fp32", row_invariant=True)
    assert passed_over(exact, choose(exact)) == "cpu-fp32 has no groups of 40"


@pytest.mark.parametrize(
    "name,request_,reason",
    [
        ("cpu-int8", replace(W4, device="cuda"), "does not run on cuda"),
        ("cpu-int8", replace(W4, dtype="float16"), "does not compute in float16"),
        ("cpu-int8", replace(W4, bits=9), "has no 9-bit weights"),
        ("cpu-int8", Request(), "needs quantized weights"),
        ("cpu-int8", replace(W4, group_size=40), "has no groups of 40"),
        ("cpu-int8", replace(W4, activations="fp32"), "computes with int8 activations"),
        ("cpu-fp32", replace(W4, activations="int8"), "computes with fp32 activations"),
        ("torch-int4", replace(W4, bits=8), "has no 8-bit weights"),
        ("torch-int4", replace(W4, group_size=96), "has no groups of 96"),
        ("torch-int4", replace(W4, group_size=-1), "has no scales per channel"),
        ("torch-int4", replace(W4, row_invariant=True), "its rows change with the width of a forward"),
        ("reference-fast", replace(W4, row_invariant=True), "its rows change with the width of a forward"),
        ("reference-exact", replace(W4, activations="int8"), "computes with fp32 activations"),
        ("cpu-int8", replace(W4, head_bits=16), "has no LM head in 16 bits"),
        ("cpu-fp32", replace(W4, head_bits=8), "has no LM head in 8 bits"),
        ("cuda", W4, "does not run on cpu"),
        ("cuda", replace(W4, device="cuda", dtype="float32"), "does not compute in float32"),
        ("cuda", Request(device="cuda"), "needs quantized weights"),
        ("triton", replace(W4, device="cuda", group_size=40), "has no groups of 40"),
        ("triton", replace(W4, device="cuda", head_bits=2), "has no LM head in 2 bits"),
    ],
)
def test_refusals_of_one_backend(name: str, request_: Request, reason: str) -> None:
    assert BY_NAME[name].unable(request_) == reason
    with pytest.raises(UsageError) as caught:
        choose(request_, name)
    assert str(caught.value) == f"backend {name} cannot run this model here: {reason}"
    assert caught.value.hint


def test_a_limit_of_rows() -> None:
    narrow = replace(BY_NAME["torch-int4"], max_rows=16)
    assert narrow.unable(replace(W4, rows=16)) is None
    assert narrow.unable(replace(W4, rows=17)) == "takes 16 rows at a time, not 17"
    assert "at most 16 rows" in narrow.abilities()


def test_a_machine_that_misses_what_a_backend_needs(machine: dict[str, str | None]) -> None:
    without_native(machine)
    with pytest.raises(UsageError, match="cpu-int8 cannot run this model here: no C\\+\\+ compiler") as caught:
        choose(W4, "cpu-int8")
    assert "torch-int4" in (caught.value.hint or "")
    assert "cpu-fp32" not in (caught.value.hint or "")  # it misses the compiler too
    assert choose(W4, "reference-exact").name == "reference-exact"


def test_a_name_that_nobody_has() -> None:
    with pytest.raises(UsageError, match="unknown backend 'marlin'") as caught:
        choose(W4, "marlin")
    assert all(name in (caught.value.hint or "") for name in BY_NAME)


@pytest.mark.parametrize(
    "request_,reason",
    [
        (Request(device="meta"), "does not run on meta"),
        (Request(dtype="float16"), "does not compute in float16"),
        (Request(bits=9, group_size=32), "has no 9-bit weights"),
    ],
)
def test_nothing_serves_and_every_backend_says_why(request_: Request, reason: str) -> None:
    with pytest.raises(UsageError, match="no kernel for") as caught:
        choose(request_)
    reasons = dict(each.split(" ", 1) for each in (caught.value.hint or "").split("; "))
    assert list(reasons) == list(BY_NAME)
    for on_gpu in ("cuda", "triton", "gptqmodel-marlin"):
        assert reasons.pop(on_gpu) == f"does not run on {request_.device}"
    assert set(reasons.values()) == {reason}


def test_no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    dispatch._no_cuda.cache_clear()
    try:
        with pytest.raises(UsageError) as caught:
            choose(replace(W4, device="cuda"))
    finally:
        dispatch._no_cuda.cache_clear()
    assert "reference-fast there is no CUDA device that torch can use" in (caught.value.hint or "")
    assert "cpu-int8 does not run on cuda" in (caught.value.hint or "")


ON_GPU = replace(W4, device="cuda")


@pytest.fixture
def gpu(machine: dict[str, str | None], monkeypatch: pytest.MonkeyPatch) -> dict[str, str | None]:
    monkeypatch.setattr(dispatch, "_no_cuda", lambda: None)
    return machine


@pytest.mark.parametrize(
    "request_,backend",
    [
        (ON_GPU, "cuda"),
        (replace(ON_GPU, row_invariant=True, head_bits=4), "cuda"),
        (replace(ON_GPU, dtype="float32"), "triton"),
        (replace(ON_GPU, bits=16), "triton"),
        (replace(ON_GPU, bits=16, row_invariant=True), "triton"),
        (replace(ON_GPU, group_size=40), "reference-fast"),
        (replace(ON_GPU, group_size=40, row_invariant=True), "reference-exact"),
    ],
)
def test_the_order_on_a_gpu(gpu: dict[str, str | None], request_: Request, backend: str) -> None:
    assert choose(request_).name == backend


def test_a_gpu_without_a_compiler_takes_the_next_and_says_why(gpu: dict[str, str | None]) -> None:
    gpu["cuda"] = "no CUDA compiler found (nvcc, NVRTC)"
    chosen = choose(ON_GPU)
    assert chosen.name == "triton"
    assert passed_over(ON_GPU, chosen) == gpu["cuda"]
    assert passed_over(replace(ON_GPU, dtype="float32"), chosen) is None  # the CUDA kernels would not serve anyway


def test_a_cache_of_few_bits_costs_no_backend(gpu: dict[str, str | None], monkeypatch: pytest.MonkeyPatch) -> None:
    small = replace(ON_GPU, kv_cache_dtype="int8")
    assert choose(small).name == "cuda"
    assert choose(small, "triton").name == "triton"
    assert choose(replace(W4, kv_cache_dtype="int4"), "cpu-int8").name == "cpu-int8"
    lacking = tuple(
        replace(each, kv_cache_dtypes=("auto",)) if each.name == "cuda" else each for each in dispatch.BACKENDS
    )
    monkeypatch.setattr(dispatch, "BACKENDS", lacking)
    chosen = choose(small)
    assert chosen.name == "triton"
    assert passed_over(small, chosen) == "cuda has no int8 cache of keys and values"


def test_backends_that_failed_are_not_taken_again(gpu: dict[str, str | None]) -> None:
    failed = {"cuda": "its product is wrong"}
    assert choose(ON_GPU, failed=failed).name == "triton"
    everything = dict.fromkeys(BY_NAME, "it broke")
    with pytest.raises(UsageError, match="no kernel for 4-bit weights on cuda") as caught:
        choose(ON_GPU, failed=everything)
    assert "cuda it broke" in (caught.value.hint or "")


@pytest.mark.parametrize("reason", ["no CUDA compiler found (nvcc, NVRTC)", None])
def test_what_the_cuda_kernels_need(monkeypatch: pytest.MonkeyPatch, reason: str | None) -> None:
    """Triton for the rest of the model, then a compiler and a driver that reads its code."""
    monkeypatch.setattr(cuda_library, "usable", lambda: reason)
    monkeypatch.setattr(dispatch, "_triton", lambda: "the triton package is not installed")
    assert BY_NAME["cuda"].missing() == "the triton package is not installed"
    monkeypatch.setattr(dispatch, "_triton", lambda: None)
    assert BY_NAME["cuda"].missing() == reason


@pytest.mark.parametrize(
    "installed,cuda,capability,reason",
    [
        (False, True, (9, 0), "the triton package is not installed"),
        (True, False, (9, 0), "there is no CUDA device that torch can use"),
        (True, True, (7, 5), "its kernels need compute capability 8.0, and Some GPU has 7.5"),
        (True, True, (8, 0), None),
    ],
)
def test_what_triton_needs(
    monkeypatch: pytest.MonkeyPatch, installed: bool, cuda: bool, capability: tuple[int, int], reason: str | None
) -> None:
    monkeypatch.setattr(dispatch, "find_spec", lambda _: object() if installed else None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    caches = (dispatch._triton, dispatch._no_cuda)
    for each in caches:
        each.cache_clear()
    try:
        assert BY_NAME["triton"].missing() == reason
    finally:
        for each in caches:
            each.cache_clear()


@pytest.mark.parametrize("capability,usable", [("AVX2", True), ("DEFAULT", False), ("AVX512", True), ("AMX", True)])
def test_torch_int4_where_it_is_good(monkeypatch: pytest.MonkeyPatch, capability: str, usable: bool) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    dispatch._torch_int4.cache_clear()
    try:
        reason = BY_NAME["torch-int4"].why_not(W4)
    finally:
        dispatch._torch_int4.cache_clear()
    assert (reason is None) == usable
    assert usable or f"({capability}) it is slower" in (reason or "")


def test_table_says_usable_or_why_not(machine: dict[str, str | None]) -> None:
    without_native(machine)
    lines = table()
    assert list(lines) == [backend.name for backend in BACKENDS]
    assert lines["cpu-int8"].startswith(f"not usable: {NO_COMPILER} (")
    assert "weights of 2 to 8 bits, groups of multiples of 32 or a whole channel" in lines["cpu-int8"]
    assert lines["torch-int4"].startswith("usable (")
    assert "weights of 4 bits, groups of 32, 64, 128 or 256, any number of rows, rows change" in lines["torch-int4"]
    assert "weights of 2 to 8 and 16 bits, any group size" in lines["reference-exact"]
    assert "rows equal at any width" in lines["reference-exact"]


def test_no_torch_at_import() -> None:
    code = "import sys, quantspec.kernels.dispatch, quantspec.models.config; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
