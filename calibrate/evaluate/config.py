"""Options and the report of `quantspec eval`: plain dataclasses, no torch at import."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from quantspec.engine.config import Dtype, EngineConfig
from quantspec.errors import UsageError
from quantspec.kernels.dispatch import Activations
from quantspec.numerics.scheme import KVCacheDtype


@dataclass(frozen=True)
class EvalConfig:
    """Measure ``model`` on text, alone or against its parent, on the kernels that would generate with it."""

    model: str
    against: str | None = None
    """The model that MODEL was made from (a folder, hub id, or member of the default family): adds KL divergence and
    top-1 agreement. It runs on its own fastest kernels, or layer by layer from disk where it does not fit in memory."""
    data: Path | None = None
    """Text to measure on: .jsonl, or .txt split at <|doc|> lines. Default: a bundled held-out set."""
    num_samples: int | None = None
    """Rows of text to measure. Default: all of it."""
    seq_len: int = 512
    """Tokens in a row of text."""
    tasks: tuple[str, ...] = ()
    """A task of lm-evaluation-harness (may be repeated, or a list with commas)."""
    num_fewshot: int | None = None
    """Examples before each question of a task. Default: the task's own number."""
    limit: int | None = None
    """Questions per task. Default: all."""
    include_path: Path | None = None
    """Folder with tasks of your own (YAML, as lm-evaluation-harness reads them)."""
    mode: str | None = None
    device: str = "cpu"
    backend: str | None = None
    activations: Activations | None = None
    dtype: Dtype = "auto"
    head_bits: int | None = None
    kv_cache_dtype: KVCacheDtype = "auto"
    threads: int | None = None

    def __post_init__(self) -> None:
        for name, low in (("num_samples", 1), ("seq_len", 2), ("limit", 1), ("num_fewshot", 0)):
            value = getattr(self, name)
            if value is not None and value < low:
                raise UsageError(f"{name} must be at least {low}, not {value}")
        if self.against is not None and self.tasks and self.data is None:
            raise UsageError("tasks score one model, and --against needs text", hint="name the text with --data")
        for name in ("num_fewshot", "limit", "include_path"):
            if getattr(self, name) is not None and not self.tasks:
                raise UsageError(f"{name} is of tasks, and none is named", hint="name tasks with --tasks")
        self.engine()

    def engine(self) -> EngineConfig:
        """How `generate` would run the model without a drafter. Raises ``UsageError`` for an unknown name."""
        shared = {one.name for one in fields(self)} & {one.name for one in fields(EngineConfig)}
        return EngineConfig(method="none", **{name: getattr(self, name) for name in shared})


@dataclass(frozen=True)
class PositionBin:
    """Tokens that are predicted from ``start`` to ``end - 1`` tokens of context: the loss in nats, and, of a model with
    a parent, the mean KL divergence in nats and the share of equal most likely tokens."""

    start: int
    end: int
    loss: float
    kl: float | None = None
    top1_agreement: float | None = None


@dataclass(frozen=True)
class ParentReport:
    """How far a model is from the one that it was made from, on the same tokens. ``kl`` is the mean of KL(parent ||
    model) in nats; ``_95`` are 95% intervals, of a bootstrap over rows of text (None: fewer than two rows)."""

    model: str
    backend: str
    perplexity: float
    ratio: float
    kl: float
    top1_agreement: float
    ratio_95: list[float] | None = None
    kl_95: list[float] | None = None
    top1_agreement_95: list[float] | None = None


@dataclass(frozen=True)
class EvalReport:
    """What was measured, and on which kernels. ``perplexity`` and all below it are None without text, ``parent``
    without a parent. ``tasks`` is lm-evaluation-harness's ``results``: metrics by task."""

    model: str
    backend: str
    kv_cache_dtype: KVCacheDtype
    weight_bytes: int
    settings: dict[str, Any] = field(default_factory=dict)
    perplexity: float | None = None
    perplexity_95: list[float] | None = None
    rows: int = 0
    tokens: int = 0
    data: str | None = None
    parent: ParentReport | None = None
    by_position: list[PositionBin] = field(default_factory=list)
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
