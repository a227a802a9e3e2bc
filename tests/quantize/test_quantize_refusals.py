"""Bad models, options and folders: one line each, the right exit code, and nothing half-written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quantspec.calibrate import data
from quantspec.calibrate.quantize.config import QuantizeConfig
from quantspec.calibrate.quantize.run import run
from quantspec.errors import ModelError, QuantSpecError, ResourceError, UsageError
from quantspec.models import atomic
from quantspec.models.tensors import TensorStore

Configure = Callable[..., QuantizeConfig]


def damage_tensor(model: Path, name: str, value: float) -> None:
    weights = {key: TensorStore(model).get(key) for key in TensorStore(model)}
    weights[name].view(-1)[5] = value
    atomic.save_tensors(model / "model.safetensors", weights)


def edit_config(model: Path, **changes: Any) -> None:
    raw = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(raw | changes))


def drop_tensor(model: Path, name: str) -> None:
    weights = {key: TensorStore(model).get(key) for key in TensorStore(model) if key != name}
    atomic.save_tensors(model / "model.safetensors", weights)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def to_pickle(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")


Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda model: truncate(model / "model.safetensors"), r"model\.safetensors"),
        (to_pickle, "pickle"),
        (lambda model: edit_config(model, auto_map={"AutoModel": "evil.py"}), "auto_map"),
        (lambda model: edit_config(model, model_type="gpt2"), "gpt2"),
        (lambda model: edit_config(model, hidden_size=128), "config.json says"),
        (lambda model: (model / "config.json").unlink(), r"no config\.json"),
        (lambda model: (model / "tokenizer.json").unlink(), r"no tokenizer\.json"),
        (lambda model: (model / "tokenizer.json").write_text("{"), "not a tokenizer"),
        (lambda model: damage_tensor(model, Q_PROJ, float("nan")), "q_proj.weight holds NaN"),
        (lambda model: damage_tensor(model, "model.layers.0.input_layernorm.weight", float("inf")), "NaN or Inf"),
        (lambda model: drop_tensor(model, "model.layers.2.mlp.up_proj.weight"), "up_proj"),
        (lambda model: drop_tensor(model, "model.layers.2.input_layernorm.weight"), "input_layernorm"),
    ],
)
def test_bad_models_are_refused(configure: Configure, model: Path, damage: Callable[[Path], Any], message: str) -> None:
    damage(model)
    with pytest.raises(ModelError, match=message) as caught:
        run(configure())
    assert caught.value.exit_code == 3
    assert "\n" not in str(caught.value)
    assert not configure().out.exists()


def test_a_changed_file_of_a_model_with_a_manifest_is_refused(configure: Configure, model: Path) -> None:
    atomic.write_manifest(model)
    (model / "tokenizer_config.json").write_text('{"changed": 1}')
    with pytest.raises(ModelError, match="tokenizer_config"):
        run(configure())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"model": Path("/nowhere")}, ModelError, "no model folder"),
        ({"calibration": Path("/nowhere.jsonl")}, ModelError, "cannot read text"),
        ({"group_size": 48}, UsageError, "not a multiple of the group size 48"),
        ({"ignore": ("nothing*",)}, UsageError, "no linear layer matches"),
        ({"ignore": ("*.q_proj",)}, UsageError, "fuse"),
        ({"ignore": ("*",)}, UsageError, "leaves nothing"),
        ({"out": "file/out"}, ResourceError, "cannot write"),
        ({"out": "/proc/out"}, ResourceError, "cannot write"),
        ({"out": "file"}, UsageError, "exists already"),
        ({"out": "model"}, UsageError, "exists already"),
    ],
)
def test_bad_options_are_refused(
    configure: Configure, tmp_path: Path, options: dict[str, Any], error: type[QuantSpecError], message: str
) -> None:
    (tmp_path / "file").write_text("in the way")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(error, match=message) as caught:
        run(configure(**options))
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_foreign_work_folder_is_left_alone(configure: Configure, tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "mine.txt").write_text("precious")
    with pytest.raises(UsageError, match="in the way"):
        run(configure())
    assert (tmp_path / "out.partial" / "mine.txt").read_text() == "precious"


def test_a_quantized_model_is_not_quantized_again(configure: Configure) -> None:
    run(configure())
    with pytest.raises(ModelError, match="quantized already"):
        run(configure("again", model=configure().out))


@pytest.mark.parametrize("wrong", [{"method": "none"}, {"num_samples": 0}, {"seq_len": 1}])
def test_impossible_settings(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        QuantizeConfig(Path("a"), Path("b"), **wrong)


def test_bundled_texts_are_disjoint() -> None:
    calibration, held_out = data.load_texts(data.CALIBRATION), data.load_texts(data.HELD_OUT)
    assert not set(calibration) & set(held_out)
    assert sum(map(len, held_out)) > 150_000  # at least 30k tokens at 5 characters each
