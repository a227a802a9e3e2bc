"""The rounding methods by name."""

from __future__ import annotations

from quantspec.calibrate.quantize.methods import gptq, rtn
from quantspec.calibrate.quantize.methods.base import Method

METHODS: dict[str, Method] = {
    "rtn": Method(rtn.quantize_linear),
    "mse": Method(rtn.quantize_linear_mse),
    "gptq": Method(gptq.quantize_linear, frozenset({"hessian"})),
}
