"""Where transforms enter the pipeline: what they change is stored, later stages and resumed runs see it."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

import pytest
import torch
from torch import Tensor

from quantspec.calibrate.quantize import run as run_module
from quantspec.calibrate.quantize.config import RECIPES, Event, MethodOptions, QuantizeConfig, Recipe
from quantspec.calibrate.quantize.layer import DecoderLayer
from quantspec.calibrate.quantize.run import run
from quantspec.calibrate.quantize.transforms.base import Folded
from quantspec.calibrate.quantize.transforms.registry import LAYER_TRANSFORMS
from quantspec.errors import Interrupted
from quantspec.models.tensors import TensorStore
from quantspec.numerics.scheme import Scheme

Configure = Callable[..., QuantizeConfig]
NORM = "post_attention_layernorm.weight"
READERS = ("mlp.gate_proj.weight", "mlp.up_proj.weight")


def halve(
    layer: DecoderLayer, hidden: Tensor, schemes: Callable[[str], Scheme | None], options: MethodOptions
) -> Folded:
    """Halve a norm and double what reads it, both exact in any type."""
    assert schemes("mlp.up_proj") == Scheme(4, 32)
    assert torch.isfinite(hidden).all()
    layer.weights[NORM] = layer.weights[NORM] / 2
    for name in READERS:
        layer.weights[name] = layer.weights[name] * 2
    return Folded({NORM, *READERS})


class Permutation:
    """The channels of the residual stream in another order."""

    def __init__(self, size: int) -> None:
        self.order = torch.randperm(size, generator=torch.Generator().manual_seed(1))

    def layer(self, layer: DecoderLayer) -> Collection[str]:
        for name, weight in layer.weights.items():
            writes = name.startswith(("self_attn.o_proj", "mlp.down_proj"))
            layer.weights[name] = weight[self.order] if writes else weight[..., self.order].contiguous()
        return layer.weights.keys()

    def hidden(self, hidden: Tensor) -> Tensor:
        return hidden[..., self.order].contiguous()

    def rest(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor[..., self.order].contiguous() for name, tensor in tensors.items()}

    def config(self, raw: dict[str, object], folder: Path) -> dict[str, object]:
        return raw | {"note": "permuted"}


def test_what_a_layer_transform_changes_is_stored(
    configure: Configure, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(LAYER_TRANSFORMS, "halve", halve)
    plain, halved = configure("plain", method="rtn"), configure("halved")
    run(plain)
    monkeypatch.setitem(RECIPES, "gptq", Recipe("rtn", ("halve",)))
    run(halved)
    before, after, source = TensorStore(plain.out), TensorStore(halved.out), TensorStore(model)
    for i in range(3):
        stem = f"model.layers.{i}."
        assert torch.equal(after.get(stem + NORM), source.get(stem + NORM) / 2)
        for name in READERS:  # twice the weight: the same codes, twice the scale
            assert torch.equal(after.get(f"{stem}{name}_packed"), before.get(f"{stem}{name}_packed"))
            assert torch.equal(after.get(f"{stem}{name}_scale"), before.get(f"{stem}{name}_scale") * 2)
        assert torch.equal(
            after.get(f"{stem}mlp.down_proj.weight_packed"), before.get(f"{stem}mlp.down_proj.weight_packed")
        )


def test_changed_weights_that_stay_dense_are_stored_too(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "model_transform", lambda config, model: Permutation(64))
    config = configure(ignore=("*.1.mlp.down_proj",))
    report = run(config)
    assert report.perplexity_before is not None
    assert report.perplexity_after == pytest.approx(report.perplexity_before, rel=0.1)
    assert '"note": "permuted"' in (config.out / "config.json").read_text()


def test_a_model_transform_and_a_resumed_run(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "model_transform", lambda config, model: Permutation(64))

    def stop(event: Event) -> None:
        if event.done == 8:
            raise KeyboardInterrupt

    whole, cut = configure("whole"), configure("cut")
    run(whole)
    with pytest.raises(Interrupted):
        run(cut, stop)
    run(cut)
    for file in sorted(whole.out.glob("*.safetensors")):
        assert file.read_bytes() == (cut.out / file.name).read_bytes()
