"""What goes wrong while a run is at work: one line, the right exit code, nothing lost, inputs as they were."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from quantspec.benchmarks.quantize_kills import weights_and_files
from quantspec.calibrate.quantize import estimate
from quantspec.calibrate.quantize.config import Event, QuantizeConfig
from quantspec.calibrate.quantize.run import run
from quantspec.errors import ModelError, ResourceError, UsageError
from quantspec.models import atomic
from quantspec.models.config import read_config
from quantspec.models.tensors import TensorStore

Configure = Callable[..., QuantizeConfig]


def state(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}


def change(model: Path, **tensors: torch.Tensor | None) -> None:
    weights = {name: TensorStore(model).get(name) for name in TensorStore(model)}
    for name, tensor in tensors.items():
        weights.pop(name, None)
        if tensor is not None:
            weights[name] = tensor
    atomic.save_tensors(model / "model.safetensors", weights)


def test_the_disk_is_full_at_any_file(
    configure: Configure, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first write fails, in the next run the second, and so on until a run has no write left to fail: each goes on
    from what the one before kept."""
    inputs, sync = state(model), os.fsync
    whole, cut = (replace(configure(name), num_samples=4, eval_samples=2) for name in ("whole", "cut"))
    run(whole)
    failures = 0
    while not cut.out.exists():
        failures += 1
        left = [failures]

        def full(descriptor: int, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] == 0:  # with delayed allocation a full disk shows here, and in write otherwise: one handler
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            sync(descriptor)

        monkeypatch.setattr(os, "fsync", full)
        refused = None
        try:
            run(cut)
        except ResourceError as error:
            refused = error
        if refused is not None:  # the last run has nothing left to fail
            assert "no space left" in str(refused)
            assert refused.exit_code == 4
            assert not list(tmp_path.glob("cut*/.*.tmp"))
    monkeypatch.undo()
    assert failures > 20  # two a file: its own, and its folder's
    run(cut)  # the last failure may have come after the rename
    assert weights_and_files(cut.out) == weights_and_files(whole.out)
    assert state(model) == inputs


def test_too_little_room_is_said_before_any_work(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimate.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))  # type: ignore[attr-defined]
    with pytest.raises(ResourceError, match="more on the disk of") as caught:
        run(configure())
    assert caught.value.exit_code == 4
    assert not (tmp_path / "out.partial").exists()


def test_a_singular_hessian_is_solved(configure: Configure, model: Path) -> None:
    """One word over and over: every Hessian has rank one, and channels that never fire."""
    calibration = model.parent / "same.txt"
    calibration.write_text("w5 " * 3000)
    report = run(configure(calibration=calibration))
    assert all(layer.error < 1e-2 for layer in report.layers)
    assert {layer.method for layer in report.layers} <= {"gptq", "rtn"}


def test_nan_activations_name_the_layer_and_keep_what_is_finished(
    configure: Configure, model: Path, tmp_path: Path
) -> None:
    """Weights that are finite but overflow: layer 0 is finished by then, and stays."""
    huge = torch.full((64,), 3e38, dtype=torch.bfloat16)
    change(model, **{"model.layers.1.post_attention_layernorm.weight": huge})
    inputs = state(model)
    with pytest.raises(ModelError, match=r"layer 1 .* NaN or Inf") as caught:
        run(configure())
    assert caught.value.exit_code == 3
    assert len(list((tmp_path / "out.partial").glob("*.safetensors"))) == 1
    assert state(model) == inputs


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.layers.2.input_layernorm.weight", "no tensor model.layers.2.input_layernorm"),
        ("model.norm.weight", "no tensor model.norm"),
        ("model.embed_tokens.weight", "no tensor model.embed_tokens"),
    ],
)
def test_missing_names_are_found_before_any_work(
    configure: Configure, model: Path, tmp_path: Path, name: str, message: str
) -> None:
    change(model, **{name: None})
    with pytest.raises(ModelError, match=message):
        run(configure())
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("name", ["model.layers.3.mlp.up_proj.weight", "model.layers.1.self_attn.q_norm.weight"])
def test_names_beyond_the_architecture_are_refused(configure: Configure, model: Path, name: str) -> None:
    change(model, **{name: torch.ones(4)})
    with pytest.raises(ModelError, match=name):
        run(configure())


def test_calibration_text_that_is_too_short(configure: Configure, model: Path, text: Path) -> None:
    text.write_text("w3 w4 w5")
    with pytest.raises(ModelError, match="has 4 tokens, and one row takes 64") as caught:
        run(configure())
    assert "--seq-len" in str(caught.value.hint)
    text.write_text("w3 w4 w5 " * 60)
    events: list[Event] = []
    run(configure(), events.append)
    assert "the calibration text fills 2 of 24 rows" in [event.message for event in events]


def test_a_dry_run_writes_nothing_and_counts_right(configure: Configure, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    found = estimate.estimate(configure(ignore=("model.layers.0.*",)))
    assert sorted(tmp_path.rglob("*")) == before
    assert found.methods == {"gptq": 14, "kept as they are": 7}
    assert found.schemes == {"4 bits, symmetric, groups of 32": 14}
    assert found.tokens == 24 * 64
    assert 0 < found.seconds < 600
    report = run(configure(ignore=("model.layers.0.*",)))
    assert found.bytes_before == report.bytes_before
    # shapes of packed tensors, 16 bytes each, are not counted
    assert found.bytes_after == pytest.approx(report.bytes_after, abs=14 * 16)


def test_a_dry_run_of_mixed_widths_counts_by_the_budget(configure: Configure) -> None:
    config = configure(method="rtn", bits_per_weight=5.0, widths=(8, 4))
    found = estimate.estimate(config)
    assert found.schemes == {"4, 8 bits, 5 with scales on average": 21}
    # the layers are few, and one more of them in 8 bits would be over the budget
    assert run(config).bytes_after <= found.bytes_after + 21 * 16
    assert found.bytes_after < estimate.estimate(configure(bits=8)).bytes_after
    with pytest.raises(UsageError, match="3 bits per weight cannot be reached"):
        estimate.estimate(replace(config, bits_per_weight=3.0))


def test_rows_longer_than_the_model_has_positions_are_told(configure: Configure, model: Path) -> None:
    limit, notes = read_config(model)["max_position_embeddings"], []
    config = replace(configure(method="rtn"), eval_samples=1, seq_len=limit + 1)
    run(config, lambda event: notes.append(event.message))
    assert f"rows of text are {limit} tokens long, all that the model has positions for" in notes
