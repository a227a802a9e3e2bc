"""Options, events and the report of quantization: plain dataclasses, no torch at import."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from quantspec.errors import UsageError
from quantspec.numerics.scheme import KVCacheDtype

MethodName = Literal["gptq", "rtn", "mse"]


@dataclass(frozen=True)
class Recipe:
    """A method as users name it: transforms of each layer (``transforms/``), then a rounding method (``methods/``)."""

    rounding: str
    transforms: tuple[str, ...] = ()


RECIPES: dict[str, Recipe] = {"gptq": Recipe("gptq"), "rtn": Recipe("rtn"), "mse": Recipe("mse")}


@dataclass(frozen=True)
class MethodOptions:
    """What methods and transforms can be told; each reads its own fields."""

    damping: float = 0.01
    """GPTQ: share of the mean Hessian diagonal that is added to it; ten and a hundred times as much where it fails."""

    def __post_init__(self) -> None:
        if not 0 < self.damping <= 1:
            raise UsageError(f"damping must be above 0 and at most 1, not {self.damping}")


@dataclass(frozen=True)
class QuantizeConfig:
    """Quantize the checkpoint folder ``model`` into the new folder ``out``."""

    model: Path
    out: Path
    method: MethodName = "gptq"
    options: MethodOptions = MethodOptions()
    bits: int = 4
    group_size: int = 128
    """Input features that share a scale; -1: one scale per output channel."""
    symmetric: bool = True
    kv_cache_dtype: KVCacheDtype = "auto"
    """Calibrate factors of key channels for a cache of so few bits, and fold them into the weights; auto: do not."""
    calibration: Path | None = None
    """Text (``.jsonl``, or ``.txt`` split at ``<|doc|>`` lines) to measure inputs on. None: the bundled set."""
    held_out: Path | None = None
    """Text for the closing report. None: the bundled set, disjoint from the calibration text."""
    num_samples: int = 128
    """Calibration rows of ``seq_len`` tokens (fewer where the text is shorter; "mse" reads 8 at most)."""
    eval_samples: int = 96
    """Held-out rows of ``seq_len`` tokens; 0 leaves the closing comparison out."""
    seq_len: int = 512
    seed: int = 0
    ignore: tuple[str, ...] = ()
    """Shell-style patterns of linear layers to keep as they are, like ``model.layers.0.*``. Embedding and head always
    are."""
    resume: bool = True
    """Go on from the finished layers of an interrupted run with the same model, calibration and settings."""
    device: str = "cpu"

    @property
    def recipe(self) -> Recipe:
        return RECIPES[self.method]

    def __post_init__(self) -> None:
        if self.method not in RECIPES:
            known = ", ".join(sorted(RECIPES))
            raise UsageError(f"unknown quantization method {self.method!r}", hint=f"use one of {known}")
        for name, low in (("num_samples", 1), ("eval_samples", 0), ("seq_len", 2)):
            if getattr(self, name) < low:
                raise UsageError(f"{name} must be at least {low}, not {getattr(self, name)}")


@dataclass(frozen=True)
class LayerResult:
    """How one linear layer was quantized.

    ``error`` is the relative output MSE on the calibration inputs; with "rtn", which looks at no
    inputs, the relative weight MSE. ``damping`` is the share of the mean Hessian diagonal that was added to it.
    ``fallback_reason`` says why round-to-nearest took the place of GPTQ.
    """

    name: str
    method: str
    error: float
    damping: float | None = None
    seconds: float = 0.0
    fallback_reason: str | None = None


Stage = Literal["layer", "resume", "evaluate", "note"]


@dataclass(frozen=True)
class Event:
    """Progress: ``stage`` is "layer" (one linear layer done: ``result``), "resume", "evaluate" or "note"
    (``message``)."""

    stage: Stage
    done: int
    total: int
    result: LayerResult | None = None
    message: str = ""


@dataclass(frozen=True)
class KVCacheReport:
    """What the result loses with keys and values in ``dtype`` against itself with unquantized ones, and their bytes for
    a token. Figures of held-out text as in ``QuantizeReport``."""

    dtype: KVCacheDtype
    bytes_per_token: int
    perplexity_before: float
    perplexity_after: float
    kl: float
    top1_agreement: float


@dataclass(frozen=True)
class QuantizeReport:
    """What came out. Perplexities, ``kl`` (mean nats, dense || quantized) and ``top1_agreement`` are of held-out text,
    None when not measured; so is ``kv_cache``. ``peak_bytes`` is the process's peak resident memory, ``tensor_bytes``
    the largest sum of weights, Hessian and activations held at once, the solver's temporaries aside."""

    out: str
    bytes_before: int
    bytes_after: int
    perplexity_before: float | None = None
    perplexity_after: float | None = None
    kl: float | None = None
    top1_agreement: float | None = None
    eval_tokens: int = 0
    peak_bytes: int = 0
    tensor_bytes: int = 0
    kv_cache: KVCacheReport | None = None
    layers: list[LayerResult] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
