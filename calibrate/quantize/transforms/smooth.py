"""SmoothQuant (Xiao et al., arXiv 2211.10438): outliers of activations move into weights, which have scales of their
own.

A layer's input channels are divided by ``s = max |x|^a / max |w|^(1 - a)`` in what comes before and multiplied by it in
its weights, so that activations lose less when they are rounded too. It acts at all of AWQ's sites, the inputs of
``down_proj`` among them, where the largest outliers are.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from quantspec.calibrate.quantize.config import MethodOptions
from quantspec.calibrate.quantize.layer import DecoderLayer
from quantspec.calibrate.quantize.transforms.base import Folded
from quantspec.calibrate.quantize.transforms.sites import SITES, magnitude, site_inputs
from quantspec.numerics.scheme import Scheme

_LEAST = 1e-5  # of the largest value that a channel's magnitude may have in the factors


def smooth_activations(
    layer: DecoderLayer, hidden: Tensor, schemes: Callable[[str], Scheme | None], options: MethodOptions
) -> Folded:
    """See ``LayerTransform``."""
    folded = Folded()
    for site, inputs in zip(SITES, site_inputs(layer, hidden), strict=True):
        refusal = site.refusal(layer)
        if schemes(site.readers[0]) is None:
            continue
        if refusal is None:
            weights = torch.cat([layer.weights[f"{reader}.weight"] for reader in site.readers])
            factors = smoothing_factors(magnitude(inputs, site).largest, weights.abs().amax(0), options.smooth)
            folded.add(site.readers, site.fold(layer, factors), options.smooth)
        else:
            folded.add(site.readers, (), refusal)
    return folded


def smoothing_factors(activations: Tensor, weights: Tensor, strength: float) -> Tensor:
    """Factors ``[K]`` with a geometric mean of 1 for the largest magnitudes ``[K]`` of a layer's input channels and of
    its weights' columns."""
    a, w = (x.clamp_min(_LEAST * float(x.max()) or 1.0).log() for x in (activations, weights))
    logs = strength * a - (1 - strength) * w
    return (logs - logs.mean()).exp()
