"""The transforms by name."""

from __future__ import annotations

from quantspec.calibrate.quantize.config import QuantizeConfig
from quantspec.calibrate.quantize.stream import StreamedModel
from quantspec.calibrate.quantize.transforms.awq import scale_by_activations
from quantspec.calibrate.quantize.transforms.base import LayerTransform, ModelTransform
from quantspec.calibrate.quantize.transforms.key_factors import fold_key_factors
from quantspec.calibrate.quantize.transforms.rotate import HadamardRotation
from quantspec.calibrate.quantize.transforms.smooth import smooth_activations

LAYER_TRANSFORMS: dict[str, LayerTransform] = {
    "awq": scale_by_activations,
    "smooth": smooth_activations,
    "key_factors": fold_key_factors,
}


def model_transform(config: QuantizeConfig, model: StreamedModel) -> ModelTransform | None:
    """What ``config`` asks to be done to all of ``model`` before its layers are quantized."""
    return HadamardRotation(model, config.seed) if config.rotate else None
