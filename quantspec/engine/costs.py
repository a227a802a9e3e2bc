"""What is known of a machine and a model's speed on it: the measured costs and acceptance that a plan is made of.

A ``Profile`` is what ``quantspec tune`` writes and the planner reads. All times are seconds. Torch-free.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import astuple, dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path

from quantspec.engine.records import Record
from quantspec.errors import ModelError
from quantspec.models.atomic import write_bytes
from quantspec.models.json_files import read_object
from quantspec.types import Budget

FORMAT_VERSION = 1
RETUNE = "run quantspec tune again"


@dataclass(frozen=True)
class CostCurve(Record):
    """Seconds of one forward: ``seconds[c][w]`` with ``widths[w]`` rows at ``contexts[c]`` cached tokens.

    Linear between what was measured, made non-decreasing in the rows (a measured dip is noise, and a planner would
    chase it). With ``tiles``, a staircase: a width costs what the end of its tile does, and past the last tile come
    more of that size. Beyond the measured contexts and widths the last slope goes on.
    """

    contexts: tuple[int, ...]
    widths: tuple[int, ...]
    seconds: tuple[tuple[float, ...], ...]
    tiles: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name, least in (("contexts", 0), ("widths", 1), ("tiles", 1)):
            values = getattr(self, name)
            if values is not None and not (values and values[0] >= least and all(a < b for a, b in pairwise(values))):
                raise ValueError(f"{name} must rise from at least {least}")
        if self.widths[0] != 1:
            raise ValueError("widths must begin with 1")
        if len(self.seconds) != len(self.contexts) or any(len(row) != len(self.widths) for row in self.seconds):
            raise ValueError("seconds must have a row per context and a value per width")
        if any(value <= 0 for row in self.seconds for value in row):
            raise ValueError("seconds must be above 0")

    def at(self, rows: int, context: int) -> float:
        """Seconds of a forward of that many rows, at least 1."""
        assert rows >= 1, "a forward has rows"
        return _between(self.widths, self._row(context), self._tiled(rows))

    def table(self, count: int, context: int, batch: int = 1) -> list[float]:
        """Seconds of forwards with 1 to ``count`` rows of each of ``batch`` sequences."""
        row = self._row(context)
        return [_between(self.widths, row, self._tiled(batch * rows)) for rows in range(1, count + 1)]

    def relative(self, rows: int, context: int) -> float:
        """v(n): over the seconds of one row."""
        return self.at(rows, context) / self.at(1, context)

    def edges(self, context: int, tolerance: float = 0.03) -> tuple[int, ...]:
        """The widths worth planning with, up to the largest measured: the last ones before the time has risen by more
        than the tolerance since the edge before."""
        edges, base = [], self.at(1, context)
        for rows in range(1, self.widths[-1]):
            after = self.at(rows + 1, context)
            if after > base * (1 + tolerance):
                edges.append(rows)
                base = after
        return (*edges, self.widths[-1])

    def _tiled(self, rows: int) -> int:
        """The rows whose time so many take."""
        if not self.tiles:
            return rows
        last = self.tiles[-1]
        return self.tiles[bisect_left(self.tiles, rows)] if rows <= last else -(-rows // last) * last

    def _row(self, context: int) -> list[float]:
        """Seconds by width at one context, non-decreasing."""
        by_width = zip(*self.seconds, strict=True)
        row = [_between(self.contexts, list(values), context) for values in by_width]
        return [max(row[: i + 1]) for i in range(len(row))]


def _between(points: tuple[int, ...], values: list[float], at: int) -> float:
    """Linear between the points; before the first its own value, past the last the last slope, if it rises."""
    if len(points) == 1 or at <= points[0]:
        return values[0]
    i = min(bisect_left(points, at), len(points) - 1)
    slope = (values[i] - values[i - 1]) / (points[i] - points[i - 1])
    return values[i] + (max(slope, 0.0) if at > points[i] else slope) * (at - points[i])


@dataclass(frozen=True)
class DraftCost(Record):
    """Seconds of one draft: ``fixed + levels * per_level + nodes * per_node``; and ``prefill_per_token``, once.

    A level is one step of a draft model, one forward of a head that grows a tree, or one more slot of a P-EAGLE head's
    only forward (and of its path network); Medusa heads and prompt lookup have ``fixed`` alone. Of a cascade these are
    what comes on top of its inner rounds.
    """

    prefill_per_token: float = 0.0
    fixed: float = 0.0
    per_level: float = 0.0
    per_node: float = 0.0

    def __post_init__(self) -> None:
        if min(self.prefill_per_token, self.fixed, self.per_level, self.per_node) < 0:
            raise ValueError("a draft cannot cost less than nothing")

    def at(self, levels: int, nodes: int) -> float:
        """Seconds of one draft, what was grown and not kept included; none is free."""
        return self.fixed + levels * self.per_level + nodes * self.per_node if levels or nodes else 0.0

    def times(self, factor: float) -> DraftCost:
        """The same drafts, slower by a factor."""
        return DraftCost(*(factor * seconds for seconds in astuple(self)))


@dataclass(frozen=True)
class Step(Record):
    """What was drafted at one step with the widest setting, as in ``types.Draft``, and which nodes the target accepted.

    ``context`` is the number of committed tokens before the step.
    """

    scores: tuple[float, ...]
    parents: tuple[int, ...]
    accepted: tuple[bool, ...]
    context: int

    def __post_init__(self) -> None:
        if not len(self.scores) == len(self.parents) == len(self.accepted):
            raise ValueError("scores, parents and accepted must be of one length")
        if not all(-1 <= parent < i for i, parent in enumerate(self.parents)):
            raise ValueError("a parent must stand before its child")

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """Depth of each node, from 1."""
        depths: list[int] = []
        for parent in self.parents:
            depths.append(depths[parent] + 1 if parent >= 0 else 1)
        return tuple(depths)

    @cached_property
    def _best_first(self) -> tuple[int, ...]:
        nodes = range(len(self.scores))
        return tuple(sorted(nodes, key=self.scores.__getitem__, reverse=True))  # stable: no child before its parent

    def kept(self, budget: Budget) -> list[int]:
        """The nodes that a draft within this budget has of these, the best first."""
        nodes = [node for node in self._best_first if self.depths[node] <= budget.max_depth]
        return nodes[: budget.worth([self.scores[node] for node in nodes])]

    def tokens(self, budget: Budget) -> int:
        """What the step emits under this budget: the accepted nodes and the target's own token."""
        return 1 + sum(self.accepted[node] for node in self.kept(budget))


@dataclass(frozen=True)
class Trace(Record):
    """Steps of one drafter on real text. What any narrower setting would have accepted follows from them."""

    steps: tuple[Step, ...]

    def length(self, budget: Budget) -> float:
        """Acceptance length under this budget: tokens per step, the target's own counted."""
        return sum(step.tokens(budget) for step in self.steps) / len(self.steps) if self.steps else 1.0

    def acceptance_by_position(self) -> tuple[float, ...]:
        """For each depth from 1: of the steps that had a node there below an accepted one, how many accepted one."""
        tried, hit = list[int](), list[int]()
        for step in self.steps:
            depths = step.depths
            right = max((depth for depth, yes in zip(depths, step.accepted, strict=True) if yes), default=0)
            below = any(
                depth == right + 1 and (parent < 0 or step.accepted[parent])
                for depth, parent in zip(depths, step.parents, strict=True)
            )
            grow = right + below - len(tried)
            tried += [0] * grow
            hit += [0] * grow
            for depth in range(right + below):
                tried[depth] += 1
                hit[depth] += depth < right
        return tuple(hits / trials for hits, trials in zip(hit, tried, strict=True))


@dataclass(frozen=True)
class Inner(Record):
    """The inside of a cascade: the intermediate's forward, its own drafter, and what it accepted of that one."""

    target: CostCurve
    draft: DraftCost
    trace: Trace | None


@dataclass(frozen=True)
class Setting(Record):
    """A way to decode, in fields of ``EngineConfig``: ``method``, its ``parts`` (``draft_model``, ``head``) and
    ``options`` (``num_speculative_tokens``, ``min_draft``, ``tree_nodes``, ``tree_depth``, ``tree_top_k``)."""

    method: str
    parts: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if unknown := self.parts.keys() - {"draft_model", "head"}:
            raise ValueError(f"there is no part {min(unknown)!r}")


PLAIN = Setting("none")


@dataclass(frozen=True)
class Candidate(Record):
    """A drafter as it was measured: ``options`` are the widest, with which ``trace`` was taken, ``weights`` the
    ``models.fingerprint`` of each part. ``failure`` says why there is no measurement."""

    method: str
    parts: Mapping[str, str]
    options: Mapping[str, int]
    draft: DraftCost
    trace: Trace | None = None
    inner: Inner | None = None
    failure: str | None = None
    weights: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.trace and self.options.get("num_speculative_tokens", 0) < 1:
            raise ValueError("options must have num_speculative_tokens, at least 1")


@dataclass(frozen=True)
class Measured(Record):
    """Speed of a setting: as planned, and as measured with its confidence interval."""

    setting: Setting
    predicted_tokens_per_second: float
    tokens_per_second: float
    low: float
    high: float


@dataclass(frozen=True)
class Profile(Record):
    """All that was measured of a model and its drafters on a machine, and the setting chosen by it.

    ``model`` is the target's ``models.fingerprint``, ``kernels`` the version of what ran it, ``overhead`` the seconds
    of a step outside forwards and drafts.
    """

    format_version: int
    machine: Mapping[str, str | int]
    model: str
    kernels: str
    created: str
    target: CostCurve
    overhead: float
    candidates: tuple[Candidate, ...]
    measured: tuple[Measured, ...]
    chosen: Setting

    def __post_init__(self) -> None:
        if self.format_version != FORMAT_VERSION:
            raise ValueError(f"its format is version {self.format_version}, this quantspec reads {FORMAT_VERSION}")
        if self.overhead < 0:
            raise ValueError("overhead must not be below 0")

    @classmethod
    def load(cls, path: Path | str) -> Profile:
        """Raises ``ModelError``: the file is missing, damaged, or of another format."""
        try:
            return cls.from_dict(read_object(Path(path), RETUNE))
        except ModelError as error:
            if error.hint:
                raise
            raise ModelError(f"{path} is no profile: {error}", hint=RETUNE) from error

    def save(self, path: Path | str) -> None:
        """Whole or not at all. Raises ``ResourceError``."""
        write_bytes(Path(path), json.dumps(self.as_dict()).encode())

    def refusal(self, machine: Mapping[str, str | int], model: str, kernels: str) -> str | None:
        """Why it does not hold here; None if it does."""
        if model != self.model:
            return "it was measured with another model"
        if dict(machine) != dict(self.machine):
            names = sorted(set(machine) | set(self.machine))
            name = next(name for name in names if machine.get(name) != self.machine.get(name))
            return f"it was measured on another machine ({name}: {self.machine.get(name)}, here {machine.get(name)})"
        if kernels != self.kernels:
            return f"it was measured with other kernels ({self.kernels}, here {kernels})"
        return None

    def candidate(self, setting: Setting) -> Candidate | None:
        """The measured drafter of a setting."""
        same = (each for each in self.candidates if (each.method, each.parts) == (setting.method, setting.parts))
        return next(same, None)


def file_name(model: str, machine: Mapping[str, str | int]) -> str:
    """Of the profile of a model (by fingerprint) on a machine, in the folder that keeps profiles."""
    digest = hashlib.sha256(json.dumps(dict(machine), sort_keys=True).encode()).hexdigest()
    return f"{model[:16]}-{digest[:16]}.json"
