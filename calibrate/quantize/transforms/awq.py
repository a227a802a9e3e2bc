"""AWQ (Lin et al., arXiv 2306.00978): input channels with large activations get a finer share of their weights' grid.

A layer's input channels are multiplied by ``s = mean |x|^a`` in its weights and divided by it in what comes before. The
exponent is searched for the least output error of the block that the layer is in, with its weights rounded.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from quantspec.calibrate.quantize.config import MethodOptions
from quantspec.calibrate.quantize.layer import DecoderLayer
from quantspec.calibrate.quantize.methods.scales import search_scale
from quantspec.calibrate.quantize.transforms.base import Folded
from quantspec.calibrate.quantize.transforms.sites import SITES, Site, magnitude, site_inputs
from quantspec.numerics.affine import QuantizedWeight, dequantize, quantize_codes
from quantspec.numerics.scheme import Scheme

_GRID = 20
_LEAST = 1e-4  # of the largest mean: a silent channel would be given an endless factor


def scale_by_activations(
    layer: DecoderLayer, hidden: Tensor, schemes: Callable[[str], Scheme | None], options: MethodOptions
) -> Folded:
    """See ``LayerTransform``."""
    folded = Folded()
    for site, inputs in zip(SITES, site_inputs(layer, hidden), strict=True):
        scheme, refusal = schemes(site.readers[0]), site.refusal(layer)
        if scheme is None:
            continue
        if refusal is None:
            exponent, factors = search_exponent(layer, site, scheme, inputs)
            folded.add(site.readers, site.fold(layer, factors), exponent)
        else:
            folded.add(site.readers, (), refusal)
    return folded


def search_exponent(layer: DecoderLayer, site: Site, scheme: Scheme, inputs: Tensor) -> tuple[float, Tensor]:
    """The exponent that leaves the block's outputs the least error, and its factors ``[K]``, for the readers' ``inputs
    [S, T, K]``. ``layer`` is as it was when this returns."""
    mean, power = magnitude(inputs, site).mean, inputs.flatten(0, 1).square().mean(0)
    originals = {name: layer.weights[name] for name in (f"{reader}.weight" for reader in site.readers)}
    wanted, least, best = _block(layer, site, inputs), torch.inf, (0.0, torch.ones_like(mean))
    for exponent in (step / _GRID for step in range(_GRID)):
        factors = activation_factors(mean, exponent)
        for name, weight in originals.items():
            layer.weights[name] = _rounded(weight * factors, power / factors.square(), scheme) / factors
        error = float((_block(layer, site, inputs) - wanted).square().mean())
        if error < least:
            least, best = error, (exponent, factors)
    layer.weights |= originals
    return best


def activation_factors(mean: Tensor, exponent: float) -> Tensor:
    """``mean^exponent [K]``, centred: the largest factor is the inverse of the smallest."""
    peak = float(mean.max())
    factors = mean.clamp_min(_LEAST * peak if peak else 1.0).pow(exponent)
    return factors / (factors.max() * factors.min()).sqrt()


def _rounded(weight: Tensor, importance: Tensor, scheme: Scheme) -> Tensor:
    scale, zero_point = search_scale(weight, importance, scheme)
    return dequantize(QuantizedWeight(quantize_codes(weight, scale, zero_point, scheme), scale, zero_point, scheme))


def _block(layer: DecoderLayer, site: Site, inputs: Tensor) -> Tensor:
    """The attention's or the MLP's outputs from the inputs of the site's readers."""
    attention, norm = site.readers[0].startswith("self_attn"), site.source.endswith("norm")
    if attention:
        return layer.linear("self_attn.o_proj", layer.attend(inputs) if norm else inputs)
    return layer.linear("mlp.down_proj", layer.gated(inputs) if norm else inputs)
