"""What the engine can be asked to do. Torch-free: the command line takes its options' defaults from here.

vLLM's ``speculative_config`` keys are understood verbatim (``with_speculative``), so that a working configuration can
be carried over without translation.
"""

from __future__ import annotations

import difflib
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Self, get_args

from quantspec.drafters.config import CascadeOptions, EagleOptions, LookupOptions
from quantspec.engine.vllm_keys import without_engine_keys
from quantspec.errors import UsageError
from quantspec.kernels.dispatch import BACKENDS, Activations
from quantspec.numerics.scheme import KVCacheDtype

METHODS = ("none", "lookup", "draft", "eagle", "eagle3", "peagle", "medusa", "cascade", "auto")
"""What proposes: nothing, prompt lookup, a small model, an EAGLE head (``eagle`` takes any, ``eagle3`` an EAGLE-3 head
alone, ``peagle`` a P-EAGLE head alone), Medusa heads, or a head filtered by a small model; ``auto``: what ``profile``
says is fastest, as wide as pays at each step."""

HEAD_METHODS = ("eagle", "eagle3", "peagle", "medusa")
"""Methods whose head drafts for the target itself, in trees."""

MODES = ("exact", "fast")
"""``exact``: a row has the same bits at any width, so text equals plain decoding. ``fast``: up to rounding only."""

KERNELS = tuple(backend.name for backend in BACKENDS)
"""Backends that can be asked for by name; ``quantspec doctor`` tells which of them this machine has."""

ACTIVATIONS = get_args(Activations)
"""What activations are rounded to before they meet quantized weights."""

KV_CACHE_DTYPES = get_args(KVCacheDtype)
"""What keys and values are kept in, in vLLM's words."""

Dtype = Literal["auto", "bfloat16", "float16", "float32"]
"""What activations are kept in; ``auto``: as the backend does."""

DTYPES, HEAD_BITS = get_args(Dtype), (4, 8, 16)

RULES = ("exact", "ratio")
"""``exact``: keyed noise, so the text does not depend on the drafter. ``ratio``: min(1, p/q), equal in distribution."""

MAX_THREADS = 1024

VLLM_METHODS = {
    "ngram": "lookup", "draft_model": "draft", "eagle": "eagle", "eagle3": "eagle3", "medusa": "medusa",
}  # fmt: skip

DEFAULT_SPECULATIVE_TOKENS = {
    "none": 0, "lookup": 8, "draft": 5, "eagle": 15, "eagle3": 15, "peagle": 15, "medusa": 15, "cascade": 10,
}  # fmt: skip

_CASCADE, _EAGLE, _LOOKUP = CascadeOptions(), EagleOptions(), LookupOptions()


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """One target and what speculates for it.

    ``model``, ``draft_model`` (the drafter of ``draft``, the intermediate of ``cascade``) and ``head`` (EAGLE, Medusa)
    are names that ``models.resolve`` understands. ``method`` None takes the best one that the named parts allow, or
    that ``profile``, a file that ``quantspec tune`` wrote, says is fastest.
    ``num_speculative_tokens`` bounds the draft tokens in one target forward (None: the method's default), ``min_draft``
    is the length at which a cascade asks its target. ``tree_*`` shape a head's tree: depth in levels, children per
    node, and (for a cascade, where the tree meets the intermediate) nodes. ``max_context`` bounds prompt and output
    below the model's own limit. ``max_batch`` sequences run at a time; more wait. ``threads`` None: every core.
    ``mode`` None: exact on a CPU, fast elsewhere. ``backend`` and ``activations`` None: the fastest that can run the
    model; a draft model that cannot follow takes its own fastest, and a line says so. ``dtype`` is what activations are
    kept in (``"auto"``: bfloat16 on a GPU's own kernels, float32 elsewhere), ``head_bits`` what the target's LM head is
    rounded to if it is stored unquantized (None: as the backend does, which is 8 for a quantized target on a GPU's own
    kernels and under ``cpu-int8``). ``kv_cache_dtype`` is what the
    target's keys and values are kept in (``"auto"``: unquantized), whatever proposes.
    """

    model: str = "default"
    method: str | None = None
    draft_model: str | None = None
    head: str | None = None
    profile: str | None = None
    num_speculative_tokens: int | None = None
    min_draft: int = _CASCADE.min_draft
    tree_nodes: int = 8
    tree_depth: int = _EAGLE.depth
    tree_top_k: int = _EAGLE.top_k
    prompt_lookup_max: int = _LOOKUP.prompt_lookup_max
    prompt_lookup_min: int = _LOOKUP.prompt_lookup_min
    rule: Literal["exact", "ratio"] = "exact"
    mode: str | None = None
    device: str = "cpu"
    backend: str | None = None
    activations: Activations | None = None
    dtype: Dtype = "auto"
    head_bits: int | None = None
    kv_cache_dtype: KVCacheDtype = "auto"
    max_context: int | None = None
    max_batch: int = 8
    prefill_chunk: int = 512
    threads: int | None = None

    def __post_init__(self) -> None:
        for name, choices in (
            ("method", METHODS),
            ("mode", MODES),
            ("backend", KERNELS),
            ("activations", ACTIVATIONS),
            ("dtype", DTYPES),
            ("head_bits", HEAD_BITS),
            ("kv_cache_dtype", KV_CACHE_DTYPES),
            ("rule", RULES),
        ):
            value = getattr(self, name)
            if value not in choices and not (value is None and name not in ("dtype", "kv_cache_dtype", "rule")):
                words = tuple(map(str, choices))
                hint = did_you_mean(str(value), words) or f"one of {', '.join(words)}"
                raise UsageError(f"unknown {name} {value!r}", hint=hint)
        for name in ("model", "draft_model", "head", "profile"):
            value = getattr(self, name)
            if not isinstance(value, (str, os.PathLike)) and not (value is None and name != "model"):
                raise UsageError(f"{name} must be a folder or a name, not {value!r}")
        for name, least in (
            ("num_speculative_tokens", 0),
            ("min_draft", 1),
            ("tree_nodes", 1),
            ("tree_depth", 1),
            ("tree_top_k", 1),
            ("prompt_lookup_min", 1),
            ("prompt_lookup_max", self.prompt_lookup_min),
            ("max_context", 2),
            ("max_batch", 1),
            ("prefill_chunk", 1),
            ("threads", 1),
        ):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int) and not isinstance(value, bool) and value >= least):
                raise UsageError(f"{name} must be a whole number of at least {least}, not {value!r}")
        if self.threads is not None and self.threads > MAX_THREADS:  # torch crashes when a thread cannot be made
            raise UsageError(
                f"threads must be at most {MAX_THREADS}, not {self.threads}", hint="as many as cores is best"
            )
        if self.rule == "ratio" and self.method in HEAD_METHODS:
            raise UsageError(
                "the ratio rule verifies chains that were drawn, and a head's drafts are not",
                hint="use the default rule",
            )

    @property
    def max_nodes(self) -> int:
        """Draft tokens in one target forward, at most; for a resolved ``method``."""
        assert self.method is not None, "resolved by build"
        if self.method == "none":
            return 0
        asked = self.num_speculative_tokens
        return DEFAULT_SPECULATIVE_TOKENS[self.method] if asked is None else asked

    @classmethod
    def from_mapping(cls, options: Mapping[str, Any], tell: Callable[[str], None] = warnings.warn) -> Self:
        """From ``load``'s options; ``speculative_config`` is a mapping in vLLM's spelling. An unknown key is a
        ``UsageError`` that names the nearest known one; ``tell`` gets a line for each that has no effect here."""
        own = {key: value for key, value in options.items() if key != "speculative_config"}
        refuse_unknown(own, (*_names(cls), "speculative_config"), "option")
        config = cls(**own)
        speculative = options.get("speculative_config")
        return config if speculative is None else config.with_speculative(speculative, tell)

    def with_speculative(
        self, speculative: Mapping[str, Any], tell: Callable[[str], None] = warnings.warn
    ) -> Self:  # fmt: skip
        """This config with vLLM's ``speculative_config`` keys laid over it; see ``from_mapping``."""
        if not isinstance(speculative, Mapping):
            raise UsageError(f"speculative_config must be a mapping of keys to values, not {speculative!r}")
        own = without_engine_keys(speculative, tell)
        names = ("model", "parallel_drafting", *(name for name in _names(type(self)) if name in _SPECULATIVE))
        refuse_unknown(own, names, "speculative_config key")
        own = {key: value for key, value in own.items() if value is not None}
        model = own.pop("model", None)
        method = own.pop("method", None) or _guess_method(model)
        if method not in VLLM_METHODS and method not in METHODS:
            raise UsageError(
                f"speculative_config method {method!r} is not supported",
                hint=f"supported: {', '.join((*VLLM_METHODS, *METHODS))}",
            )
        own["method"] = VLLM_METHODS.get(method, method)
        if _parallel(own.pop("parallel_drafting", None), method):
            own["method"] = "peagle"
        if model is not None and own["method"] in ("draft", "cascade"):
            own["draft_model"] = model
        elif model is not None and own["method"] in HEAD_METHODS:
            own["head"] = model
        return replace(self, **own)


_SPECULATIVE = frozenset(
    (
        "method",
        "draft_model",
        "head",
        "num_speculative_tokens",
        "min_draft",
        "tree_nodes",
        "tree_depth",
        "tree_top_k",
        "prompt_lookup_max",
        "prompt_lookup_min",
        "rule",
    )
)


def refuse_unknown(options: Iterable[str], known: Iterable[str], kind: str) -> None:
    """Raise a ``UsageError`` for the first key of ``options`` that is not ``known``, with the nearest known name."""
    known = tuple(known)
    for key in options:
        if key not in known:
            hint = did_you_mean(str(key), known) or f"known: {', '.join(known)}"
            raise UsageError(f"unknown {kind} {key!r}", hint=hint)


def did_you_mean(word: str, known: Iterable[str]) -> str | None:
    """A hint that names the nearest known word, if one is near."""
    near = difflib.get_close_matches(word, tuple(known), n=1)
    return f"did you mean {near[0]!r}?" if near else None


def _guess_method(model: str | None) -> str:
    # vLLM reads a missing method off the model: a name means a draft model, and "ngram" itself means lookup.
    if model is None:
        raise UsageError("speculative_config needs a method or a model")
    return "ngram" if model in ("ngram", "[ngram]") else "draft_model"


def _parallel(asked: Any, method: str) -> bool:
    """Whether vLLM's ``parallel_drafting`` makes the method P-EAGLE."""
    if not isinstance(asked, bool | None):
        raise UsageError(f"parallel_drafting must be true or false, not {asked!r}")
    if asked and method not in ("eagle", "eagle3", "peagle"):
        raise UsageError(
            f"parallel_drafting does not go with method {method}", hint="it makes a P-EAGLE head of method eagle3"
        )
    return bool(asked)


def _names(config: type) -> tuple[str, ...]:
    return tuple(field.name for field in fields(config))
