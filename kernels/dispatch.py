"""Which backend runs a model here: abilities as data, refusals with their reasons. No torch at import."""

from __future__ import annotations

from dataclasses import dataclass, replace

from quantspec.errors import UsageError


@dataclass(frozen=True, slots=True)
class Request:
    """What a model asks of its kernels. ``bits`` 16: weights that are not quantized; ``group_size`` -1: one scale per
    output channel."""

    device: str = "cpu"
    dtype: str = "float32"
    bits: int = 16
    group_size: int = -1
    row_invariant: bool = False


@dataclass(frozen=True, slots=True)
class Backend:
    """What a backend can do. ``group_sizes`` None: any; ``max_rows`` None: any number of rows in one forward.

    ``row_invariant``: a row has the same bits at any width, tree, chunking and batch.
    """

    name: str
    summary: str
    devices: tuple[str, ...]
    dtypes: tuple[str, ...]
    bits: tuple[int, ...]
    group_sizes: tuple[int, ...] | None
    max_rows: int | None
    row_invariant: bool

    def refusal(self, request: Request) -> str | None:
        """Why this backend cannot serve the request; None if it can."""
        if request.device not in self.devices:
            return f"does not run on {request.device}"
        if request.dtype not in self.dtypes:
            return f"does not compute in {request.dtype}"
        if request.bits not in self.bits:
            return f"has no {request.bits}-bit weights"
        if request.bits != 16 and self.group_sizes is not None and request.group_size not in self.group_sizes:
            return f"has no groups of {request.group_size}"
        if request.row_invariant and not self.row_invariant:
            return "its rows change with the width of a forward"
        return None


_REFERENCE = Backend(
    name="reference-fast",
    summary="plain torch, fused attention",
    devices=("cpu", "cuda"),
    dtypes=("float32",),
    bits=(2, 3, 4, 5, 6, 7, 8, 16),
    group_sizes=None,
    max_rows=None,
    row_invariant=False,
)
_EXACT = replace(_REFERENCE, name="reference-exact", summary="plain torch, rows equal at any width", row_invariant=True)
BACKENDS = (_REFERENCE, _EXACT)
"""Fastest first."""


def choose(request: Request) -> Backend:
    """The fastest backend that serves the request. Raises ``UsageError`` with every backend's reason if none does."""
    refusals = {backend.name: backend.refusal(request) for backend in BACKENDS}
    for backend in BACKENDS:
        if refusals[backend.name] is None:
            return backend
    reasons = "; ".join(f"{name} {reason}" for name, reason in refusals.items())
    raise UsageError(f"no kernel for {request.bits}-bit weights in {request.dtype} on {request.device}", hint=reasons)


def table() -> dict[str, str]:
    """One line per backend on what it can do here, for ``quantspec doctor``."""
    return {backend.name: f"{backend.summary}; {_abilities(backend)}" for backend in BACKENDS}


def _abilities(backend: Backend) -> str:
    usable = [device for device in backend.devices if device == "cpu" or _has_cuda()]
    bits = f"{min(backend.bits)} to 8 and 16 bits" if set(range(2, 9)) < set(backend.bits) else f"{backend.bits} bits"
    groups = "any group size" if backend.group_sizes is None else f"groups of {backend.group_sizes}"
    return f"{' and '.join(usable) or 'no usable device'}, {' and '.join(backend.dtypes)}, weights of {bits}, {groups}"


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()
