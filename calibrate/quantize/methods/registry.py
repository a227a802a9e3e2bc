"""The rounding methods by name."""

from __future__ import annotations

from quantspec.calibrate.quantize.methods import gptq, learned, nf4, rtn
from quantspec.calibrate.quantize.methods.base import Method

METHODS: dict[str, Method] = {
    "rtn": Method(rtn.quantize_linear),
    # Scales settle on far fewer tokens than codes do, and a forward on 16 times as many would take most of the time.
    "mse": Method(rtn.quantize_linear_mse, frozenset({"hessian"}), max_samples=8),
    "gptq": Method(gptq.quantize_linear, frozenset({"hessian"})),
    "learned": Method(learned.quantize_linear, frozenset({"hessian"})),
    "nf4": Method(nf4.quantize_linear),
}
