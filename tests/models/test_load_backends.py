"""Which kernels a checkpoint gets, and what each makes of the same weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from quantspec.errors import UsageError
from quantspec.kernels import dispatch
from quantspec.kernels.cpu import library
from quantspec.kernels.torch_int4 import TorchInt4Linear
from quantspec.models.decoder import Decoder
from quantspec.models.load import load_model
from quantspec.numerics.scheme import Scheme
from quantspec.types import Batch

from .conftest import Pair, packed_and_dense

GetPair = Callable[[str], Pair]
TEXT = list(range(40))
NO_COMPILER = "no C++ compiler found"


def logits(folder: Path, **kernels: Any) -> torch.Tensor:
    model = load_model(folder, **kernels)
    return model.forward(Batch.chain(TEXT), [model.new_cache(64, 4)]).logits


@pytest.fixture(scope="module")
def w4(pair: GetPair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed_and_dense(pair("qwen3").folder, tmp_path_factory.mktemp("w4"), Scheme(4, 32))["packed"]


def set_torch_int4(monkeypatch: pytest.MonkeyPatch, missing: str | None) -> None:
    """Whatever this processor is: torch's operator counts as good, or is missing for a reason."""
    backends = (
        replace(each, missing=lambda: missing) if each.name == "torch-int4" else each for each in dispatch.BACKENDS
    )
    monkeypatch.setattr(dispatch, "BACKENDS", tuple(backends))


@pytest.fixture
def torch_int4(monkeypatch: pytest.MonkeyPatch) -> None:
    set_torch_int4(monkeypatch, None)


@pytest.mark.parametrize(
    "kernels,backend",
    [
        ({}, "cpu-int8"),
        ({"mode": "fast"}, "cpu-int8"),
        ({"activations": "fp32"}, "cpu-fp32"),
        ({"backend": "cpu-fp32", "mode": "exact"}, "cpu-fp32"),
        ({"backend": "reference-exact"}, "reference-exact"),
        ({"backend": "reference-fast"}, "reference-fast"),
    ],
)
def test_quantized_checkpoint(w4: Path, kernels: dict[str, Any], backend: str) -> None:
    model = load_model(w4, **kernels)
    assert (model.backend, model.notes) == (backend, ())
    assert model.row_invariant == (backend != "reference-fast")


def test_dense_checkpoint(pair: GetPair) -> None:
    folder = pair("llama").folder
    assert load_model(folder).backend == load_model(folder, mode="fast").backend == "cpu-fp32"
    for refused, reason in (("cpu-int8", "needs quantized weights"), ("torch-int4", "needs quantized weights")):
        with pytest.raises(UsageError, match=f"{refused} cannot run this model here: {reason}"):
            load_model(folder, backend=refused)
    with pytest.raises(UsageError, match="no kernel for dense weights") as caught:
        load_model(folder, activations="int8")
    assert "cpu-fp32 computes with fp32 activations" in (caught.value.hint or "")


def test_exact_mode_is_refused_where_it_cannot_be_kept(w4: Path) -> None:
    with pytest.raises(UsageError, match=r"reference-fast cannot run .*: its rows change with the width") as caught:
        load_model(w4, backend="reference-fast", mode="exact")
    assert "reference-exact" in (caught.value.hint or "")


def test_native_logits_are_the_references(w4: Path) -> None:
    expected = logits(w4, backend="reference-exact")
    # The same weights and fp32 sums in another order: about 1e-6 of these logits of size 10.
    assert float((logits(w4, backend="cpu-fp32") - expected).abs().max()) < 1e-4
    # Activations and head rounded to 8 bits: a step is 1/254 of a group's largest value, some percent after 3 layers of
    # random weights; a wrong scale or layer gives a relative error near 1.
    rounded = logits(w4, backend="cpu-int8")
    assert 0 < float((rounded - expected).norm() / expected.norm()) < 0.05


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.usefixtures("torch_int4")
def test_torch_int4_in_the_eager_decoder(pair: GetPair, tmp_path: Path, symmetric: bool) -> None:
    """With biases, fused layers, and one MLP that is dense."""
    folder = packed_and_dense(pair("qwen2").folder, tmp_path, Scheme(4, 32, symmetric))["packed"]
    model = load_model(folder, backend="torch-int4")
    assert isinstance(model, Decoder)
    assert (model.backend, model.row_invariant) == ("torch-int4", False)
    assert [isinstance(layer.down, TorchInt4Linear) for layer in model.layers] == [True, False, True]
    assert all(isinstance(layer.qkv, TorchInt4Linear) for layer in model.layers)
    # The same weights; inputs, scales and outputs rounded to bf16 in three layers of random weights: 0.5 to 0.8%. A
    # wrong scale or layer gives a relative error near 1.
    expected = logits(folder, backend="reference-fast")
    assert 0 < float((logits(folder, backend="torch-int4") - expected).norm() / expected.norm()) < 0.02


@pytest.mark.parametrize("int4", [None, "torch's operator is slow here"])
def test_without_a_compiler_the_reference_runs_and_says_why(
    w4: Path, pair: GetPair, monkeypatch: pytest.MonkeyPatch, int4: str | None
) -> None:
    monkeypatch.setattr(library, "usable", lambda: NO_COMPILER)
    set_torch_int4(monkeypatch, int4)
    for folder in (w4, pair("llama").folder):
        model = load_model(folder)
        assert (model.backend, model.row_invariant) == ("reference-exact", True)
        assert model.notes == (f"slower kernels run: {NO_COMPILER}",)
        fast = "torch-int4" if folder == w4 and int4 is None else "reference-fast"
        assert load_model(folder, mode="fast").backend == fast
        assert load_model(folder, backend="reference-exact").notes == ()
    with pytest.raises(UsageError, match="cpu-int8 cannot run this model here: no C"):
        load_model(w4, backend="cpu-int8")


def test_a_note_of_the_library_reaches_the_user(w4: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "notice", lambda: "cannot write the cache")
    assert load_model(w4).notes == ("cannot write the cache",)
    assert load_model(w4, backend="reference-fast").notes == ()


def test_foreign_architectures_have_no_choice(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    for kernels in ({"backend": "cpu-fp32"}, {"activations": "fp32"}):
        with pytest.raises(UsageError, match="no backends to choose from"):
            load_model(tmp_path, **kernels)
