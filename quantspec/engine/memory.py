"""The memory planner: what a configuration will take, told before anything is loaded, and what to change if that is
more than there is.

Prices come from headers and configs alone (``models.price``). A plan is of one device: the GPU where the target is,
else the host. Where everything does not fit, the drafter is left out first, then the run is refused with the changes
that would make it fit; once it runs, ``Engine.step_down`` goes on from there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from quantspec.engine.config import EngineConfig
from quantspec.errors import QuantSpecError, ResourceError, UsageError
from quantspec.kernels.dispatch import NATIVE
from quantspec.kernels.memory import available_bytes
from quantspec.models.config import read_config
from quantspec.models.price import Price, Priced, price_head, price_model
from quantspec.models.resolve import resolve
from quantspec.models.tensors import TensorStore
from quantspec.numerics.scheme import KVCacheDtype

LEAST_CONTEXT = 512
"""Tokens that are planned for where nobody asks for a number: enough to begin with. A cache that turns out too large
for its prompt is refused on its own."""
_USUAL_NODES = 64
"""Rows past its context that a cascade's intermediate has room for."""
_LIBRARIES = 24 * 2**20
"""What tokenizer, kernels and numpy take at first use, beside what is counted here."""


@dataclass(frozen=True, slots=True)
class Part:
    """One thing that takes memory as long as the run lasts, in bytes."""

    name: str
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a run takes on ``device``, in bytes: ``parts`` together, or while it loads ``loading`` at most. ``free`` is
    what the device has left (None: it does not say). ``context`` tokens, prompt and output together, of each of
    ``sequences`` that run at a time."""

    device: str
    context: int
    sequences: int
    parts: tuple[Part, ...]
    loading: int
    free: int | None

    @property
    def running(self) -> int:
        return sum(part.bytes for part in self.parts)

    @property
    def needed(self) -> int:
        """The most at any time."""
        return max(self.running, self.loading)

    @property
    def fits(self) -> bool:
        return self.free is None or self.needed <= self.free

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "device": self.device,
            "context": self.context,
            "sequences": self.sequences,
            "parts": {part.name: part.bytes for part in self.parts},
            "running": self.running,
            "loading": self.loading,
            "needed": self.needed,
            "free": self.free,
            "fits": self.fits,
        }


@dataclass(frozen=True, slots=True)
class Load:
    """What a configuration loads, priced: the target, and perhaps a draft model and a head. ``free`` is of the
    target's device."""

    config: EngineConfig
    target: Priced
    draft: Priced | None
    head: Price | None
    free: int | None

    @property
    def most_context(self) -> int:
        """The context that the user allows; the model's own where nobody says."""
        own = self.target.config.max_positions if self.target.config else LEAST_CONTEXT
        return min(own, self.config.max_context or own)

    def plan(self, context: int | None = None, sequences: int = 1) -> Plan:
        """For ``context`` tokens in each of so many sequences (None: those of ``max_context``, or a few)."""
        context = min(context or self.config.max_context or LEAST_CONTEXT, self.most_context)
        parts = [Part(f"target {self.config.model} ({self.target.backend})", self.target.price.held)]
        if self.draft:
            parts.append(Part(f"draft model {self.config.draft_model} ({self.draft.backend})", self.draft.price.held))
        if self.head:
            parts.append(Part(f"head {self.config.head}", self.head.held))
        nodes = self.config.max_nodes
        kept = "" if self.config.kv_cache_dtype == "auto" else f" in {self.config.kv_cache_dtype}"
        parts.append(Part(f"keys and values{kept}", sequences * self.target.kv_bytes(context, nodes)))
        if self.draft:
            own = sequences * self.draft.kv_bytes(context, _USUAL_NODES)
            parts.append(Part("keys and values of the draft model", own))
        if self.head:
            parts.append(Part("keys, values and features of the head", sequences * self._head_bytes(context)))
        parts.append(Part("buffers and tables", self._buffers(context, sequences) + _LIBRARIES))
        return Plan(
            device=self.target.device, context=context, sequences=sequences, parts=tuple(parts),
            loading=self._loading() + _LIBRARIES, free=self.free,
        )  # fmt: skip

    def longest(self, sequences: int = 1) -> int:
        """The longest context that fits, at most the model's; 0 if none does."""
        low, high = 0, self.most_context
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.plan(middle, sequences).fits else (low, middle - 1)
        return low

    def _loading(self) -> int:
        most = held = 0
        for price in (self.target.price, self.draft and self.draft.price, self.head):
            if price:
                most, held = max(most, held + price.peak), held + price.held
        return most

    def _buffers(self, context: int, sequences: int) -> int:
        rows = sequences * (self.config.max_nodes + 1)
        target = self.target.rope_bytes(context) + self.target.work_bytes(rows)
        if not self.draft:
            return target
        nodes = self.config.tree_nodes if self.head else 1
        return target + self.draft.rope_bytes(context) + self.draft.work_bytes(sequences * (nodes + 1))

    def _head_bytes(self, context: int) -> int:
        """Keys and values in fp32, and the layers' outputs of a long prompt, which are gathered before they are
        read."""
        assert self.config.head is not None
        raw = read_config(resolve(self.config.head))
        raw = raw.get("transformer_layer_config", raw)
        below = self.draft or self.target
        hidden = below.config.hidden_size if below.config else 0
        shape = [raw.get(key) for key in ("num_hidden_layers", "num_attention_heads", "num_key_value_heads")]
        layers, heads, kv_heads = (value if isinstance(value, int) and value > 0 else 1 for value in shape)
        width = raw.get("head_dim") if isinstance(raw.get("head_dim"), int) else hidden // heads
        copies = 4 if self.config.method in ("eagle", "cascade", "medusa") else 8
        return 4 * context * (copies * hidden + 2 * layers * kv_heads * int(width or 0))


def price(config: EngineConfig, folder: Path) -> Load:
    """Price what ``config``, its method resolved, loads; the target is in ``folder``. Raises ``ModelError`` and
    ``UsageError`` as loading does for what headers and configs tell."""
    exact = config.mode == "exact" or (config.mode is None and config.backend is None and config.device == "cpu")
    target = price_model(
        folder, device=config.device, exact=exact, backend=config.backend, activations=config.activations,
        dtype=_dtype(config), head_bits=config.head_bits, kv_cache_dtype=config.kv_cache_dtype,
    )  # fmt: skip
    draft = _price_draft(config) if config.draft_model else None
    head = None
    if config.head:
        path = resolve(config.head)
        # Beside a head in training lies what the training goes on from.
        files = [file for file in sorted(path.glob("*.safetensors")) if file.name != "state.safetensors"]
        below = draft or target
        head = price_head(path, TensorStore(path, files), below.device, native=below.backend in NATIVE)
    return Load(config, target, draft, head, free_bytes(target.device))


def _price_draft(config: EngineConfig) -> Priced:
    assert config.draft_model
    folder = resolve(config.draft_model)
    try:
        return price_model(
            folder, device=config.device, exact=False, backend=config.backend, activations=config.activations,
            dtype=_dtype(config),
        )  # fmt: skip
    except UsageError:  # as when it is loaded: on kernels of its own
        return price_model(folder, device=config.device, exact=False)


def _dtype(config: EngineConfig) -> str | None:
    return None if config.dtype == "auto" else config.dtype


def free_bytes(device: str) -> int | None:
    """What a run may take on the device; None where the system does not say."""
    if torch.device(device).type != "cuda":
        return available_bytes()
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def fit(config: EngineConfig, folder: Path, notice: Callable[[str], None]) -> EngineConfig:
    """``config`` as memory allows: itself, or without its drafter, which ``notice`` is told. Raises ``ResourceError``,
    with what to change, if not even the target fits."""
    try:
        load = price(config, folder)
    except QuantSpecError:  # whoever loads it says what is wrong
        return config
    plan = load.plan()
    if plan.fits:
        return config
    alone = _without_drafter(load)
    if alone is not load and alone.plan().fits:
        notice(f"{shortage(plan)}: going on without the drafter of method {config.method}")
        return alone.config
    ways = "; ".join(changes(alone, alone.plan())) or "take a smaller model"
    raise ResourceError(f"{config.model} does not fit: {shortage(alone.plan())}", hint=ways)


def shortage(plan: Plan) -> str:
    """What a plan takes and what is there, in words."""
    assert plan.free is not None
    when = " to load" if plan.loading > plan.running else f" for a context of {plan.context:,} tokens"
    many = f" in each of {plan.sequences} sequences" if plan.sequences > 1 and not when.startswith(" to") else ""
    return f"it takes {size(plan.needed)} of memory{when}{many}, and {size(plan.free)} are free"


def size(count: int) -> str:
    """Bytes as GB (10^9), or MB below one."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def changes(load: Load, plan: Plan) -> Iterator[str]:
    """What makes the plan fit, each on its own, least loss first; if nothing does alone, what comes nearest."""
    found = False
    for words, changed in _alternatives(load, plan):
        if changed.fits:
            found = True
            yield f"{words} ({size(changed.needed)})"
    if not found and load.target.config and load.target.config.quantization is None:
        yield "quantize it first: quantspec quantize"


def _alternatives(load: Load, plan: Plan) -> Iterator[tuple[str, Plan]]:
    if plan.sequences > 1:
        for fewer in (plan.sequences // 2, 1):
            yield f"run {fewer} at a time (max_batch={fewer})", load.plan(plan.context, fewer)
            if fewer == 1:
                break
    bits: tuple[KVCacheDtype, ...] = ("int8", "int4") if load.config.kv_cache_dtype == "auto" else ()
    for dtype in bits:
        config = load.target.config
        if config and (dtype == "int8" or config.kv_calibrated):
            kept = replace(load.config, kv_cache_dtype=dtype)
            changed = replace(load, config=kept, target=replace(load.target, kv_cache_dtype=dtype))
            yield f"--kv-cache-dtype {dtype}", changed.plan(plan.context, plan.sequences)
    longest = load.longest(plan.sequences) // 64 * 64
    if 0 < longest < plan.context:
        yield f"--max-context {longest}", load.plan(longest, plan.sequences)
    if (alone := _without_drafter(load)) is not load:
        yield "--method lookup, which has no weights", alone.plan(plan.context, plan.sequences)


def _without_drafter(load: Load) -> Load:
    if load.draft is None and load.head is None:
        return load
    config = replace(load.config, method="none", draft_model=None, head=None, num_speculative_tokens=None)
    return replace(load, config=config, draft=None, head=None)
