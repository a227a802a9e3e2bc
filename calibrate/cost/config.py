"""Options of ``quantspec tune``: plain dataclasses, no torch at import."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from quantspec.engine.config import Dtype, EngineConfig
from quantspec.errors import UsageError
from quantspec.kernels.dispatch import Activations
from quantspec.numerics.scheme import KVCacheDtype


@dataclass(frozen=True, kw_only=True)
class TuneConfig:
    """What to measure for a model's profile, and for how long."""

    model: str = "default"
    draft_model: str | None = None
    """A small model with the target's tokenizer: a drafter by itself, and the intermediate of a cascade."""
    head: tuple[str, ...] = ()
    """Folder of a head, for the target or for the draft model (may be repeated)."""
    prompts: Path | None = None
    """Prompts to measure on, such as yours: .jsonl or .txt. Default: a small bundled set."""
    contexts: tuple[int, ...] = (128, 1024, 4096)
    """Tokens of context at which forwards are timed; those beyond the model's own limit are brought down to it."""
    max_new_tokens: int = 48
    """Tokens to generate per prompt."""
    seconds: float = 240.0
    """About how long to measure, at most; a small model takes less."""
    max_noise: float = 0.1
    """Most that times of one forward may differ from one half of the measurements to the other; a machine that is
    noisier is not measured."""
    seed: int = 0
    """Of the order in which settings take turns."""
    device: str = "cpu"
    mode: str | None = None
    backend: str | None = None
    activations: Activations | None = None
    dtype: Dtype = "auto"
    head_bits: int | None = None
    kv_cache_dtype: KVCacheDtype = "auto"
    max_context: int | None = None
    threads: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("max_new_tokens", 8), ("seconds", 1)):
            if not getattr(self, name) >= least:  # as of a number that is none
                raise UsageError(f"{name} must be at least {least}, not {getattr(self, name)}")
        if not self.max_noise > 0:
            raise UsageError(f"max_noise must be above 0, not {self.max_noise}")
        if not self.contexts or min(self.contexts) < 1:
            raise UsageError("contexts must be one or more numbers of at least 1")
        self.engine()

    def engine(self) -> EngineConfig:
        """How plain decoding would run the model. Raises ``UsageError`` for an unknown name."""
        shared = {one.name for one in fields(self)} & {one.name for one in fields(EngineConfig)}
        given = {name: getattr(self, name) for name in shared - {"draft_model", "head"}}
        return EngineConfig(method="none", **given)
