"""Which backend runs a model here: abilities as data, refusals with their reasons. No torch at import."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from typing import Literal

from quantspec.errors import UsageError
from quantspec.numerics.scheme import KVCacheDtype

Activations = Literal["int8", "fp32"]


@dataclass(frozen=True, slots=True)
class Request:
    """What a model asks of its kernels. ``bits`` 16: no weight is quantized; ``group_size`` -1: one scale per output
    channel; ``rows``: of one forward, at most; ``head_bits``: of an LM head that is stored unquantized. ``dtype``,
    ``activations`` and ``head_bits`` None: as the backend does. ``kv_cache_dtype``: of keys and values; ``more``: bits
    and group sizes of layers that have others."""

    device: str = "cpu"
    dtype: str | None = None
    bits: int = 16
    group_size: int = -1
    rows: int = 1
    row_invariant: bool = False
    activations: Activations | None = None
    head_bits: int | None = None
    kv_cache_dtype: KVCacheDtype = "auto"
    more: tuple[tuple[int, int], ...] = ()


def _anywhere() -> str | None:
    return None


@dataclass(frozen=True, slots=True)
class Backend:
    """What a backend can do.

    ``dtypes`` are those it computes in, ``activations`` what they are rounded to before they meet weights (dense layers
    of a quantized model never round them), ``head_bits`` what an LM head stored unquantized becomes in a quantized
    model (16: it stays); of each, the first is what runs unless asked otherwise. ``group_sizes`` None: any;
    ``channel``: one scale per output channel too; ``max_rows`` None: any number of rows in one forward.
    ``row_invariant``: a row has the same bits at any width, tree, chunking and batch. ``missing()`` says why *this
    machine* cannot run it, None if it can; its first call may take seconds.
    """

    name: str
    summary: str
    devices: tuple[str, ...]
    dtypes: tuple[str, ...]
    activations: Activations | Literal["bf16"]
    bits: tuple[int, ...]
    group_sizes: tuple[int, ...] | range | None
    channel: bool
    max_rows: int | None
    row_invariant: bool
    head_bits: tuple[int, ...] = (16,)
    kv_cache_dtypes: tuple[KVCacheDtype, ...] = ("auto", "int8", "int4")
    missing: Callable[[], str | None] = _anywhere

    def why_not(self, request: Request) -> str | None:
        """Why this backend cannot serve the request here; None if it can."""
        return self.unable(request) or (_no_cuda() if request.device == "cuda" else None) or self.missing()

    def unable(self, request: Request) -> str | None:
        """Why it could not serve the request on any machine; None if it could."""
        if request.device not in self.devices:
            return f"does not run on {request.device}"
        if request.dtype not in (None, *self.dtypes):
            return f"does not compute in {request.dtype}"
        for bits, size in ((request.bits, request.group_size), *request.more):
            if bits not in self.bits:
                return "needs quantized weights" if bits == 16 else f"has no {bits}-bit weights"
            if bits != 16 and not self._has_group(size):
                return "has no scales per channel" if size == -1 else f"has no groups of {size}"
        if request.activations not in (None, self.activations):
            return f"computes with {self.activations} activations"
        if request.head_bits not in (None, *self.head_bits):
            return f"has no LM head in {request.head_bits} bits"
        if request.kv_cache_dtype not in self.kv_cache_dtypes:
            return f"has no {request.kv_cache_dtype} cache of keys and values"
        if self.max_rows is not None and request.rows > self.max_rows:
            return f"takes {self.max_rows} rows at a time, not {request.rows}"
        if request.row_invariant and not self.row_invariant:
            return "its rows change with the width of a forward"
        return None

    def abilities(self) -> str:
        """For people: one line."""
        least, most = min(self.bits), max(self.bits)
        bits = f"{least} to 8 and 16" if most == 16 else f"{least} to {most}" if most > least else str(most)
        rows = "any number of rows" if self.max_rows is None else f"at most {self.max_rows} rows"
        invariant = "rows equal at any width" if self.row_invariant else "rows change with the width"
        parts = (
            " and ".join(self.devices),
            "/".join(self.dtypes),
            f"weights of {bits} bits",
            self._groups(),
            rows,
            invariant,
        )
        return ", ".join(parts)

    def _has_group(self, size: int) -> bool:
        return self.channel if size == -1 else self.group_sizes is None or size in self.group_sizes

    def _groups(self) -> str:
        if self.group_sizes is None:
            return "any group size"
        sizes = (
            f"multiples of {self.group_sizes.step}" if isinstance(self.group_sizes, range) else _or(self.group_sizes)
        )
        return f"groups of {sizes}" + (" or a whole channel" if self.channel else "")


def _native() -> str | None:
    from quantspec.kernels.cpu import library

    return library.usable()


@cache
def _no_cuda() -> str | None:
    import torch

    return None if torch.cuda.is_available() else "there is no CUDA device that torch can use"


@cache
def _torch_int4() -> str | None:
    import torch

    found = torch.backends.cpu.get_cpu_capability()
    if any(level in found for level in ("AVX2", "AVX512", "AMX")):
        return None
    return f"torch has int4 kernels for AVX2, AVX-512 and AMX; here ({found}) it is slower than dense fp32"


def _cuda() -> str | None:
    """The kernels around the packed layers are Triton's."""
    if (missing := _triton()) is not None:
        return missing
    from quantspec.kernels.cuda import library

    return library.usable()


def _marlin() -> str | None:
    from quantspec.kernels import gptqmodel

    return gptqmodel.missing() or _triton()


@cache
def _triton() -> str | None:
    if find_spec("triton") is None:
        return "the triton package is not installed"
    if (missing := _no_cuda()) is not None:
        return missing
    import torch

    major, minor = torch.cuda.get_device_capability()
    old = f"its kernels need compute capability 8.0, and {torch.cuda.get_device_name()} has {major}.{minor}"
    return None if major >= 8 else old


_EXACT = Backend(
    name="reference-exact",
    summary="plain torch, weights expanded to fp32",
    devices=("cpu", "cuda"),
    dtypes=("float32",),
    activations="fp32",
    bits=(*range(2, 9), 16),
    group_sizes=None,
    channel=True,
    max_rows=None,
    row_invariant=True,
)
_FAST = replace(
    _EXACT,
    name="reference-fast",
    summary="plain torch and its fused attention, weights expanded to fp32",
    row_invariant=False,
)
_CPU_FP32 = replace(
    _EXACT,
    name="cpu-fp32",
    summary="native: packed weights, fp32 activations",
    devices=("cpu",),
    group_sizes=range(32, 2**31, 32),
    missing=_native,
)
_CPU_INT8 = replace(
    _CPU_FP32,
    name="cpu-int8",
    summary="native: packed weights, int8 activations",
    activations="int8",
    bits=tuple(range(2, 9)),
    head_bits=(8,),
)
_TORCH_INT4 = replace(
    _FAST,
    name="torch-int4",
    summary="torch's int4 operator, bf16 activations",
    devices=("cpu",),
    bits=(4,),
    group_sizes=(32, 64, 128, 256),
    channel=False,
    activations="bf16",
    missing=_torch_int4,
)
_TRITON = replace(
    _EXACT,
    name="triton",
    summary="packed weights and all else in Triton's kernels, whole forwards as CUDA graphs; proves itself at load",
    devices=("cuda",),
    dtypes=("bfloat16", "float16", "float32"),
    group_sizes=range(32, 2**31, 32),
    head_bits=(8, 4, 16),
    missing=_triton,
)
_CUDA = replace(
    _TRITON,
    name="cuda",
    summary="packed weights in CUDA kernels, all else as under triton",
    dtypes=("bfloat16", "float16"),
    bits=tuple(range(2, 9)),
    missing=_cuda,
)
_MARLIN = replace(
    _CUDA,
    name="gptqmodel-marlin",
    summary="packed weights in gptqmodel's Marlin kernels, all else as under triton",
    bits=(4, 8),
    group_sizes=(32, 64, 128),
    row_invariant=False,
    missing=_marlin,
)
BACKENDS = (_CPU_INT8, _CPU_FP32, _TORCH_INT4, _CUDA, _TRITON, _FAST, _EXACT, _MARLIN)
"""Fastest first, on each device; gptqmodel's last, to be asked for by name."""

NATIVE = (_CPU_INT8.name, _CPU_FP32.name)
"""Those that run a whole forward in one call, on threads of their own."""

PROVEN = (_MARLIN.name, _CUDA.name, _TRITON.name)
"""Those that show at load, on the device at hand, that they compute right and whether their rows keep their bits."""


def choose(request: Request, name: str | None = None, failed: Mapping[str, str] | None = None) -> Backend:
    """The backend of that name, or the fastest that serves the request and has not ``failed`` (name to reason).

    Raises ``UsageError``, with every reason, if it does not serve it, if none does, or if there is none of that name.
    """
    if name is not None:
        return _named(request, name)
    reasons = dict(failed or {})
    for backend in BACKENDS:
        if backend.name not in reasons:
            reason = backend.why_not(request)
            if reason is None:
                return backend
            reasons[backend.name] = reason
    kind = "dense" if request.bits == 16 else f"{request.bits}-bit"
    dtype = f" in {request.dtype}" if request.dtype else ""
    dtype += f" with {request.activations} activations" if request.activations else ""
    raise UsageError(
        f"no kernel for {kind} weights{dtype} on {request.device}",
        hint="; ".join(f"{each.name} {reasons[each.name]}" for each in BACKENDS),
    )


def serves(request: Request) -> bool:
    """Whether any backend does, here."""
    return any(backend.why_not(request) is None for backend in BACKENDS)


def _named(request: Request, name: str) -> Backend:
    named = next((backend for backend in BACKENDS if backend.name == name), None)
    if named is None:
        raise UsageError(f"unknown backend {name!r}", hint=f"one of {', '.join(each.name for each in BACKENDS)}")
    reason = named.why_not(request)
    if reason is not None:
        raise refused(request, named, reason)
    return named


def refused(request: Request, named: Backend, reason: str) -> UsageError:
    """The error that says why a backend that was asked for by name is not taken."""
    able = [each.name for each in BACKENDS if each is not named and each.why_not(request) is None]
    hint = f"leave the choice to quantspec, or take {_or(able)}" if able else "quantspec doctor tells what works"
    return UsageError(f"backend {named.name} cannot run this model here: {reason}", hint=hint)


def passed_over(request: Request, chosen: Backend) -> str | None:
    """Why a faster backend does not serve: what this machine lacks, the size of the groups or the cache of keys and
    values; None if none of these."""
    usual = replace(request, group_size=128, kv_cache_dtype="auto")
    for backend in BACKENDS[: BACKENDS.index(chosen)]:
        if backend.unable(usual) is None:
            unable = backend.unable(request)
            return f"{backend.name} {unable}" if unable else backend.missing()
    return None


def table() -> dict[str, str]:
    """One line per backend on whether it runs here, or why not, and what it can do, for ``quantspec doctor``."""
    return {backend.name: f"{_state(backend)} ({backend.summary}; {backend.abilities()})" for backend in BACKENDS}


def _state(backend: Backend) -> str:
    reason = backend.missing()
    return "usable" if reason is None else f"not usable: {reason}"


def _or(names: tuple[int, ...] | list[str]) -> str:
    *rest, last = map(str, names)
    return f"{', '.join(rest)} or {last}" if rest else last
