"""Options of ``quantspec bench generate``. No torch here: the command line reads them for its help."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from quantspec.benchmarks.config import check_counts, check_texts
from quantspec.engine.config import EngineConfig, did_you_mean
from quantspec.errors import UsageError

DTYPES = {"bf16": "bfloat16", "fp32": "float32"}
"""Of transformers' weights, by their names in ``PEERS``."""
COMPILED = "transformers-compiled"
PEERS = (
    *(f"transformers-{dtype}{way}" for dtype in DTYPES for way in ("", "-assisted", "-lookup")),
    COMPILED,
    "llama.cpp",
)
"""Other engines that can take part. ``COMPILED`` (bf16, a static cache, CUDA graphs) is for a GPU."""
CPU_PEERS = ("transformers-bf16", "transformers-bf16-assisted", "transformers-bf16-lookup", "llama.cpp")
CUDA_PEERS = (*CPU_PEERS[:-1], COMPILED, "llama.cpp")
"""Those that take part unless others are named."""
NO_PEERS = ("none",)


@dataclass(frozen=True)
class GenerateBench:
    """What ``quantspec bench generate`` measures."""

    model: str = "default"
    """The target: a folder, hub id or member of the default family."""
    draft_model: str | None = None
    """A smaller model: of method draft, of cascades, and the assistant of other engines."""
    head: tuple[str, ...] = ()
    """A head of the target or of the draft model (may be repeated); its own config says of which kind it is."""
    methods: tuple[str, ...] = ()
    """Which to measure, each with settings if wished; empty: all whose parts are there."""
    profile: str | None = None
    """What method auto decides by. Default: what quantspec tune has measured of this model on this machine."""
    peers: tuple[str, ...] = ()
    """Other engines, of ``PEERS``, or none. Empty: those of this machine that are usual."""
    llama_server: Path | None = None
    """llama.cpp's server. Default: llama-server on the PATH."""
    prompts: Path | None = None
    """JSON lines with turns (Spec-Bench), question, prompt or text. Default: 100 questions of GSM8K that no training of
    the default family has seen."""
    tasks: tuple[str, ...] = ()
    """Only prompts of these tasks; empty: all."""
    limit: int = 10
    """Prompts of each task, from the first on."""
    peer_limit: int | None = None
    """Prompts of each task that other engines get, which may be slow. Default: all."""
    max_new_tokens: int = 96
    """Tokens to generate for each."""
    rounds: int = 3
    """How often every text is generated."""
    time_limit: float = 600.0
    """Seconds after which a process that has not finished a text is ended."""
    out: Path | None = None
    """Folder for the report, and the log by which a run that was stopped goes on."""
    device: str = "cpu"
    """cpu, cuda, cuda:1, ..."""
    threads: int | None = None
    """CPU threads of every process. Default: all cores."""
    seed: int = 0
    """Of the order within a round."""

    def __post_init__(self) -> None:
        check_texts(self.limit, self.max_new_tokens)
        if self.peer_limit is not None and self.peer_limit < 1:
            raise UsageError(f"--peer-limit must be at least 1, not {self.peer_limit}", hint="or --peers none")
        if not 1 <= self.time_limit <= 86_400:
            raise UsageError(f"--time-limit must be from 1 to 86400 seconds, not {self.time_limit:g}")
        unknown = [name for name in self.peers if name not in PEERS and self.peers != NO_PEERS]
        if unknown:
            raise UsageError(f"unknown peer {unknown[0]!r}", hint=f"of {', '.join(PEERS)}, or none")
        for names in (self.methods, self.peers, self.tasks):
            twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
            if twice is not None:
                raise UsageError(f"{twice} is named twice", hint="name each column once")
        check_counts(self.threads, self.rounds)

    @property
    def peer_names(self) -> tuple[str, ...]:
        """The other engines that are to take part."""
        if self.peers == NO_PEERS:
            return ()
        return self.peers or (CPU_PEERS if self.device == "cpu" else CUDA_PEERS)


def engine_setting(spec: str, text: str) -> tuple[str, Any]:
    """One of ``EngineConfig``'s fields and its value, of ``text`` ``KEY=VALUE`` in ``spec``. Raises ``UsageError``."""
    key, equals, value = text.partition("=")
    known = [one.name for one in fields(EngineConfig) if one.name not in ("model", "method", "device", "threads")]
    if not equals or key not in known:
        hint = did_you_mean(key, known) or "like eagle:tree_depth=4:num_speculative_tokens=12"
        raise UsageError(f"{spec}: {text!r} is no setting with a value", hint=hint)
    return key, int(value) if value.isdecimal() else value
