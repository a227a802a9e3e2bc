"""Models on the backends of a GPU: what is loaded, what is checked, and what runs instead where something fails. No GPU
is needed: Triton's kernels run under its interpreter, and the CUDA kernels' place is taken by torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from quantspec.errors import ModelError, Unavailable, UsageError
from quantspec.kernels import dispatch
from quantspec.models import prove
from quantspec.models.config import ModelConfig
from quantspec.models.load import load_decoder, load_model
from quantspec.models.weights import HEAD_SCHEMES
from quantspec.numerics.affine import QuantizedWeight, dequantize
from quantspec.numerics.scheme import Scheme
from quantspec.types import Batch

from .conftest import make_pair
from .test_cpu_decoder import packed_copy

pytest.importorskip("triton", reason="triton is not installed")

from quantspec.kernels.cuda import linear as cuda_linear
from quantspec.kernels.cuda import packed as cuda_packed
from quantspec.kernels.triton import attention, dense, swiglu
from quantspec.kernels.triton.linear import TritonLinear
from quantspec.models import load_triton, triton_frame
from quantspec.models.triton_decoder import TritonDecoder

TINY = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1}
TINY |= {"num_hidden_layers": 1, "vocab_size": 160, "head_dim": 16}
TEXT = [3, 1, 4, 1, 5]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def dense_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pair(tmp_path_factory.mktemp("dense"), "qwen3", **TINY).folder


@pytest.fixture(scope="module")
def w4(dense_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed_copy(dense_folder, tmp_path_factory.mktemp("w4") / "w", Scheme(4, 32))


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> dict[str, str | None]:
    """A machine whose GPU is the CPU, and what each of its backends misses. Proofs are short: the interpreter takes
    0.1 s for a row."""
    missing: dict[str, str | None] = {}
    found = [each for each in dispatch.BACKENDS if each.devices != ("cpu",)]
    emulated = [replace(each, devices=("cpu",), missing=lambda name=each.name: missing.get(name)) for each in found]
    monkeypatch.setattr(dispatch, "BACKENDS", tuple(emulated))
    monkeypatch.setattr(prove, "PREFIX", 6)
    monkeypatch.setattr(prove, "ROWS", 3)
    monkeypatch.setattr(prove, "WIDTHS", (2, 3))
    monkeypatch.setattr(triton_frame, "TILES", (1, 2, 3, 6, 64))
    monkeypatch.setattr(attention, "CHUNK", 64)
    return missing


@pytest.fixture(autouse=True)
def device(triton_device: torch.device) -> Iterator[torch.device]:
    with CPU:
        yield triton_device


class FakeLinear:
    """In place of ``CudaLinear``, on what it would have packed."""

    def __init__(self, weight: QuantizedWeight, workspace: object, bias: Tensor | None = None) -> None:
        self._dense, self._bias = dequantize(weight), bias
        self.widths: list[int] = []

    def __call__(self, x: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
        assert x.dtype in (torch.float16, torch.bfloat16)
        assert len(x) <= cuda_linear.MAX_ROWS
        # Row by row: torch's own product has other bits at other widths.
        y = torch.stack([self._dense @ row for row in x.float()]) + (0 if self._bias is None else self._bias)
        return y.to(out_dtype or x.dtype)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> list[QuantizedWeight]:
    """What the CUDA kernels were given."""
    given: list[QuantizedWeight] = []

    def pack(weight: QuantizedWeight) -> QuantizedWeight:
        if weight.scheme.bits == 4 and weight.codes.shape[1] % 32:
            raise UsageError("the CUDA kernels cannot hold it: its inputs are odd")
        given.append(weight)
        return weight

    monkeypatch.setattr(cuda_linear, "Workspace", lambda device: object())
    monkeypatch.setattr(cuda_linear, "CudaLinear", FakeLinear)
    monkeypatch.setattr(cuda_packed, "pack", pack)
    return given


def logits(model: Any) -> Tensor:
    return model.forward(Batch.chain(TEXT), [model.new_cache(8, 4)]).logits


def reference(folder: Path) -> Tensor:
    with torch.inference_mode():
        return logits(load_decoder(folder, ModelConfig.load(folder), CPU, exact=False))


def test_cuda_and_triton_share_a_model(w4: Path, cuda: list[QuantizedWeight]) -> None:
    """What the CUDA kernels cannot hold (``down``, of 48 inputs) goes to Triton's, and a line says so."""
    model = load_model(w4)
    assert isinstance(model, TritonDecoder)
    assert (model.backend, model.row_invariant, model.dtype) == ("cuda", True, torch.bfloat16)
    assert isinstance(model._layers[0].down, TritonLinear)
    assert [weight.codes.shape[0] for weight in cuda] == [64, 32, 96, 160]
    assert cuda[-1].scheme == HEAD_SCHEMES[8]
    assert model.notes == (
        "1 of its layers run on Triton's kernels: the CUDA kernels cannot hold it: its inputs are odd",
    )
    # Of values of size 3: bf16 activations through a layer, and an 8-bit head.
    assert (logits(model) - reference(w4)).abs().max() < 0.2


def test_without_a_compiler_triton_runs_and_says_so(w4: Path, machine: dict[str, str | None]) -> None:
    machine["cuda"] = "no CUDA compiler found (nvcc, NVRTC)"
    model = load_model(w4, dtype="float16", head_bits=16)
    assert isinstance(model, TritonDecoder)
    assert (model.backend, model.row_invariant, model.dtype) == ("triton", True, torch.float16)
    assert isinstance(model._head, dense.TritonDense)
    assert model.notes == ("slower kernels run: no CUDA compiler found (nvcc, NVRTC)",)
    assert (logits(model) - reference(w4)).abs().max() < 0.02  # as above, in fp16


def test_a_cache_of_few_bits(w4: Path, machine: dict[str, str | None]) -> None:
    """Checked as it is loaded, kernels and rows."""
    machine["cuda"] = "no CUDA compiler found (nvcc, NVRTC)"
    model = load_model(w4, kv_cache_dtype="int8")
    assert isinstance(model, TritonDecoder)
    assert (model.backend, model.row_invariant) == ("triton", True)
    assert [note for note in model.notes if "keys are rounded to int8 as they are" in note]
    assert model.new_cache(4, 0).storage.kv.dtype == torch.uint8
    # Of values of size 3: as above, and keys and values off by up to 1/255 of their largest.
    assert (logits(model) - reference(w4)).abs().max() < 0.25


def test_what_is_asked_for(w4: Path, dense_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_triton, "prove", lambda _: None)  # shown above
    model = load_model(w4, dtype="float32", head_bits=4)  # not under "cuda"
    assert isinstance(model, TritonDecoder)
    assert (model.backend, model.dtype, model.notes) == ("triton", torch.float32, ())
    assert isinstance(model._head, TritonLinear)
    assert model._head._bits == 4
    unquantized = load_model(dense_folder, dtype="float16")
    assert isinstance(unquantized, TritonDecoder)
    assert isinstance(unquantized._head, dense.TritonDense)
    with pytest.raises(UsageError, match="backend cuda cannot run this model here: does not compute in float32"):
        load_model(w4, dtype="float32", backend="cuda")


FAILURES = {
    "a driver older than the compiler": (Unavailable("cannot load the CUDA kernels: no image"), "cannot load the CUDA"),
    "memory": (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB"), "out of memory"),
    "a foreign error": (RuntimeError("ptxas died\nof old age"), "RuntimeError: ptxas died"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_one_backend_lower(w4: Path, failure: str, monkeypatch: pytest.MonkeyPatch) -> None:
    error, words = FAILURES[failure]
    tried = fail_on(monkeypatch, {"cuda": error})
    model = load_model(w4)
    assert tried == ["cuda", "triton"]
    assert model.backend == "triton"
    assert len(model.notes) == 1
    assert model.notes[0].startswith(f"slower kernels run: cuda: {words}")
    assert "\n" not in model.notes[0]


def test_a_named_backend_that_fails_is_an_error(w4: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_on(monkeypatch, {"cuda": Unavailable("no image")})
    with pytest.raises(UsageError, match="backend cuda cannot run this model here: no image"):
        load_model(w4, backend="cuda")


def test_two_backends_lower_the_text_is_the_reference(w4: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_on(monkeypatch, {"cuda": Unavailable("no image"), "triton": RuntimeError("no C compiler")})
    model = load_model(w4)
    assert model.backend == "reference-exact"
    assert model.notes == (
        "slower kernels run: cuda: no image",
        "slower kernels run: triton: RuntimeError: no C compiler",
    )
    assert torch.allclose(logits(model), reference(w4), atol=1e-5)


def test_no_memory_for_the_smallest(w4: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference, which expands weights, would take eight times as much: nothing to fall back to."""
    full = torch.OutOfMemoryError("CUDA out of memory")
    tried = fail_on(monkeypatch, {"cuda": full, "triton": full})
    with pytest.raises(torch.OutOfMemoryError):
        load_model(w4)
    assert tried == ["cuda", "triton"]


def test_damaged_models_are_not_blamed_on_backends(w4: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = fail_on(monkeypatch, {"cuda": ModelError("a tensor is missing")})
    with pytest.raises(ModelError, match="a tensor is missing"):
        load_model(w4)
    assert tried == ["cuda"]


def fail_on(monkeypatch: pytest.MonkeyPatch, errors: dict[str, Exception]) -> list[str]:
    """Have backends fail as they load; returns the list of those that were tried."""
    tried: list[str] = []

    def load(folder: Path, config: ModelConfig, device: torch.device, *rest: Any) -> Any:
        *_, name, _ = rest
        tried.append(name)
        if name in errors:
            raise errors[name]
        model = load_decoder(folder, config, device, exact=False)  # in place of Triton's, which takes long here
        model.backend = name
        return model

    monkeypatch.setattr(load_triton, "load_proven", load)
    return tried


def test_wrong_numbers_are_found_at_load(w4: Path, machine: dict[str, str | None], monkeypatch: Any) -> None:
    """A wrong kernel, in its place in the model, costs the backend."""
    machine["cuda"] = "no CUDA compiler found (nvcc, NVRTC)"
    right = swiglu.swiglu
    with monkeypatch.context() as patch:
        patch.setattr(swiglu, "swiglu", lambda gate_up: right(gate_up) * 1.1)
        model = load_model(w4)
    assert model.backend == "reference-exact"
    assert model.notes == ("slower kernels run: triton: its kernel for SwiGLU is wrong on this device",)


class WrongLinear(FakeLinear):
    def __call__(self, x: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
        y = super().__call__(x, out_dtype)
        return y.roll(1, -1) if len(x) > 1 else y


def test_wrong_products_are_found_at_load(
    w4: Path, cuda: Sequence[QuantizedWeight], machine: dict[str, str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine["triton"] = "the triton package is not installed"
    monkeypatch.setattr(cuda_linear, "CudaLinear", WrongLinear)
    model = load_model(w4)
    assert model.backend == "reference-exact"
    assert "cuda: its product with a weight [64, 32] is wrong on this device" in model.notes[0]


class UnstableLinear(FakeLinear):
    """Right to a last bit or so, which comes and goes with the number of rows."""

    def __call__(self, x: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
        y = super().__call__(x, out_dtype)
        return y * (1 + 2**-7) if 1 < len(x) <= 8 else y


def test_rows_that_differ_keep_the_backend(
    w4: Path, cuda: Sequence[QuantizedWeight], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_linear, "CudaLinear", UnstableLinear)
    model = load_model(w4)
    assert (model.backend, model.row_invariant) == ("cuda", False)
    assert f"cuda: {prove.ROWS_DIFFER}" in model.notes
