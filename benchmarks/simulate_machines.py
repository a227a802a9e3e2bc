"""Machines that are not here, as cost curves: published figures of their kernels, carried over to whole models.

A forward of n rows at context c takes

    layers * (layer_us + 4 * call_us + layer bytes / read * v(n)) + head bytes / read * v(n) + KV bytes(c) / read

where a format's ``read`` is the rate at which its matrix products read weights at one row, ``call_us`` what each
product costs besides, v(n) how that time grows with the rows, and ``layer_us`` the rest of a decoder layer under a
captured graph. Four products a layer, as q/k/v and gate/up are fused. The LM head and keys and values have 16 bits, and
``round_us`` is the host's work in a round, at any level.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from quantspec.benchmarks.shapes import ModelShape
from quantspec.engine.costs import CostCurve
from quantspec.engine.records import Record
from quantspec.errors import UsageError
from quantspec.models.json_files import read_object

MACHINES = Path(__file__).parent / "machines"
ACCEPTANCES = Path(__file__).parent / "acceptances"
BYTES = {"bf16": 2.0, "w4a16": 0.5 + 2 / 128}
"""Of a weight; 4-bit ones have a 16-bit scale for 128."""
_FAR = 32768
"""Costs are linear in the context, so two contexts say all."""


@dataclass(frozen=True)
class Source(Record):
    """Where figures come from. ``kind``: stated (by the source), computed (from what it states), derived (no source:
    how, in ``figures``)."""

    figures: str
    kind: str
    where: str


@dataclass(frozen=True)
class Format(Record):
    """Matrix products on weights of one format: see the module. ``relative[i]`` is v of ``widths[i]`` rows; ``tile``
    rows cost as much as one of them, 1 where rows are not padded."""

    call_us: float
    read_gbps: float
    widths: tuple[int, ...]
    relative: tuple[float, ...]
    tile: int

    def __post_init__(self) -> None:
        if len(self.widths) != len(self.relative) or self.widths[0] != 1 or self.relative[0] != 1:
            raise ValueError("widths and relative go together and begin with 1")

    def seconds(self, nbytes: float, calls: int) -> list[float]:
        """Of that many products of so many bytes in all, by width."""
        return [calls * self.call_us * 1e-6 + nbytes / (self.read_gbps * 1e9) * v for v in self.relative]


@dataclass(frozen=True)
class Anchor(Record):
    """A published figure of whole models, which the simulator is held against: ``quantity`` of ``strategy`` on a model
    of this ``shape`` and ``format``."""

    shape: str
    format: str
    quantity: str
    stated: float
    where: str


@dataclass(frozen=True)
class Machine(Record):
    """A GPU: see the module."""

    name: str
    title: str
    memory_gb: float
    layer_us: float
    round_us: float
    formats: Mapping[str, Format]
    sources: tuple[Source, ...]
    anchors: tuple[Anchor, ...]

    def model(self, shape: ModelShape, format: str) -> CostCurve:
        """Forwards of a whole model. Raises ``UsageError`` for a format that is not known of this machine."""
        return self._curve(shape, shape.layers, format, 0)

    def head(self, shape: ModelShape) -> CostCurve:
        """Forwards of an EAGLE head for a model: one layer, the product that joins feature and
        embedding, and the model's LM head, all in 16 bits."""
        return self._curve(shape, 1, "bf16", 2 * shape.hidden * shape.hidden)

    def _curve(self, shape: ModelShape, layers: int, format: str, more_weights: int) -> CostCurve:
        if format not in self.formats:
            raise UsageError(f"nothing is known of {format} on {self.name}", hint=f"known: {', '.join(self.formats)}")
        weights, dense = self.formats[format], self.formats["bf16"]
        widths = sorted({*weights.widths, *dense.widths})
        nbytes = layers * shape.layer_weights * BYTES[format] + more_weights * 2.0
        body = CostCurve((0,), weights.widths, (tuple(weights.seconds(nbytes, 4 * layers + bool(more_weights))),))
        head = CostCurve((0,), dense.widths, (tuple(dense.seconds(shape.vocab * shape.hidden * 2.0, 1)),))
        near = [layers * self.layer_us * 1e-6 + body.at(n, 0) + head.at(n, 0) for n in widths]
        cached = 2 * layers * shape.kv_heads * shape.head_dim * 2.0
        far = [seconds + _FAR * cached / (dense.read_gbps * 1e9) for seconds in near]
        tiles = (weights.tile,) if weights.tile > 1 else None
        return CostCurve((0, _FAR), tuple(widths), (tuple(near), tuple(far)), tiles)


@dataclass(frozen=True)
class Pair(Record):
    """What drafts for what, and how often it is right: ``heads[m]`` has, for each depth, the acceptance of the
    likeliest, second likeliest, ... token of model m's own head; ``agreement["a/b"]``, by position, how often model a
    accepts model b's tokens."""

    name: str
    title: str
    heads: Mapping[str, tuple[tuple[float, ...], ...]]
    agreement: Mapping[str, tuple[float, ...]]
    sources: tuple[Source, ...]


def machines() -> list[str]:
    """The names of the packaged machines."""
    return sorted(path.stem for path in MACHINES.glob("*.json"))


def load_machine(name: str) -> Machine:
    """Raises ``UsageError``: there is none of that name."""
    if name not in machines():
        raise UsageError(f"no machine {name!r} is known", hint=f"known: {', '.join(machines())}, or a tune profile")
    return Machine.from_dict(read_object(MACHINES / f"{name}.json"))


def load_pair(name: str) -> Pair:
    """Raises ``UsageError``: there is none of that name."""
    known = sorted(path.stem for path in ACCEPTANCES.glob("*.json"))
    if name not in known:
        raise UsageError(f"no acceptance {name!r} is known", hint=f"known: {', '.join(known)}, or a tune profile")
    return Pair.from_dict(read_object(ACCEPTANCES / f"{name}.json"))
