"""What transforms make of a checkpoint before anything is rounded: a dense folder in fp32, to be compared.

Loaded by ``tests/conftest.py``; a test says ``from dense_transform import ...``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from quantspec.calibrate.quantize.config import QuantizeConfig
from quantspec.calibrate.quantize.layer import PROJECTIONS
from quantspec.calibrate.quantize.stream import StreamedModel, layer_prefix
from quantspec.calibrate.quantize.transforms.registry import LAYER_TRANSFORMS, model_transform
from quantspec.models import atomic
from quantspec.numerics.scheme import Scheme

SITES = dict[str, float | str]


@torch.no_grad()
def write_transformed(source: Path, out: Path, ids: torch.Tensor, **options: Any) -> list[SITES]:
    """Store ``source`` as the transforms of that configuration leave it, observed on ``ids [S, T]``; what they say of
    each layer's sites."""
    config, model = QuantizeConfig(source, out, **options), StreamedModel(source, "cpu")
    whole, hidden, tensors, said = model_transform(config, model), model.embed(ids), {}, []
    if whole is not None:
        hidden = whole.hidden(hidden)
    for index in range(model.config.num_layers):
        layer, sites = model.layer(index), SITES()
        if whole is not None:
            assert set(whole.layer(layer)) == set(layer.weights)
        for name in config.transforms:
            before = {name: weight.clone() for name, weight in layer.weights.items()}
            folded = LAYER_TRANSFORMS[name](layer, hidden, schemes(config), config.options)
            changed = {name for name, weight in layer.weights.items() if not torch.equal(before[name], weight)}
            assert changed <= folded.changed, "what changed and is not named would not be stored"
            sites |= folded.sites
        hidden = layer.forward(hidden)
        said.append(sites)
        tensors |= {layer_prefix(index) + name: weight for name, weight in layer.weights.items()}
    rest = {name: model.store.get(name).float() for name in model.store if not name.startswith("model.layers.")}
    raw = json.loads((source / "config.json").read_text())
    atomic.make_folder(out)
    if whole is not None:
        rest, raw = whole.rest(rest), whole.config(raw, out)
    atomic.save_tensors(out / "model.safetensors", tensors | rest)
    (out / "config.json").write_text(json.dumps(raw))
    return said


def schemes(config: QuantizeConfig) -> Any:
    scheme = Scheme(config.bits, config.group_size, config.symmetric, "float32")
    return dict.fromkeys(PROJECTIONS, scheme).get
