"""NF4 by bitsandbytes (QLoRA, arXiv 2305.14314): codes of a normal distribution's quantiles, one scale per 64 weights,
which is itself kept in 8 bits. No calibration text; transformers loads the result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from quantspec.calibrate.quantize.config import MethodOptions
from quantspec.calibrate.quantize.methods.base import ForeignSolution, check_finite
from quantspec.calibrate.quantize.observe import Statistics
from quantspec.errors import Unavailable
from quantspec.kernels.packages import lacking
from quantspec.models.hf_quantized import NEEDED
from quantspec.numerics.measures import relative_mse
from quantspec.numerics.scheme import Scheme

_BLOCK = 64


def require() -> None:
    """Raises ``Unavailable``: bitsandbytes, or what it needs here, is missing or too old."""
    hint, packages = NEEDED["bitsandbytes"]
    for package, oldest in packages:
        if lack := lacking(package, oldest):
            raise Unavailable(f"NF4 is made by bitsandbytes: {lack}", hint=hint)


def quantize_linear(
    name: str, weight: Tensor, scheme: Scheme, statistics: Statistics, options: MethodOptions
) -> ForeignSolution:
    """As bitsandbytes rounds the weight in its stored type; of ``scheme`` only that type counts."""
    from bitsandbytes import functional

    check_finite(name, weight)
    stored = weight.to(getattr(torch, scheme.dtype))
    packed, state = functional.quantize_4bit(stored, blocksize=_BLOCK, compress_statistics=True, quant_type="nf4")
    parts = {"weight": packed} | {f"weight.{key}": part for key, part in state.as_dict(packed=True).items()}
    dense = functional.dequantize_4bit(packed, state).float()
    tensors = {suffix: part.cpu().contiguous() for suffix, part in parts.items()}
    return ForeignSolution(dense, tensors, 4, "nf4", relative_mse(dense, weight))


def quantization_config(ignored: Sequence[str]) -> dict[str, Any]:
    """What transformers reads: ``ignored`` modules stay as they are."""
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": list(ignored),
    }
