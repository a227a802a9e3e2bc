"""What ``quantspec bench generate`` finds, as records: one row per task and method, and the report they stand in.

No torch here, and nothing that measures: pages and tables read reports without loading a model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Self

from quantspec.errors import ModelError

FORMAT_VERSION = 1
PLAIN = "none"
"""Plain decoding here, what all others are held against."""
ALL = "all"
"""The task of rows over all prompts."""
PARTS = ("draft", "verify", "overhead")
"""What the time of a step goes to: the drafter, the target's forward, and the rest."""
UNFINISHED, LOOPS = "no text was finished", "all texts loop"
"""Errors of rows without figures whose method has not failed."""
Interval = tuple[float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Figures of one method on one task; None where a figure was not measured or may not be given.

    ``kind`` is ``"ours"`` or ``"peer"``. Texts that loop are left out of all figures but the comparison. ``speedup`` is
    the quotient of tokens/s with plain decoding here on the same prompts, and None on a machine that was too noisy.
    ``decode_speedup`` is that of the tokens after the first, from the first token on: without the prompt's forward, and
    with what a drafter takes to read the prompt.
    ``acceptance_length`` are tokens per target forward, the target's own counted and the prompt's forward not.
    ``equal_to_plain``: every text is that of plain decoding; ``equal_share``: the share of texts that are.
    ``step_ms`` are the milliseconds of a step by part (``PARTS``), without the prompt's forward and the drafter's own
    reading of the prompt. ``acceptance_by_position[k]`` is the share of target forwards that accepted more than k
    drafted tokens. ``peak_memory_bytes`` is the most that the method's own process held (on a GPU: of its memory).
    ``intervals`` are 95% bootstraps over prompts and rounds, for figures that have one. ``error`` says in one line why
    there are no figures.
    """

    task: str
    method: str
    kind: str = "ours"
    tokens_per_second: float | None = None
    speedup: float | None = None
    decode_speedup: float | None = None
    acceptance_length: float | None = None
    equal_to_plain: bool | None = None
    equal_share: float | None = None
    exactness: str | None = None
    time_to_first_token: float | None = None
    target_forwards: int | None = None
    step_ms: Mapping[str, float] | None = None
    acceptance_by_position: tuple[float, ...] = ()
    peak_memory_bytes: int | None = None
    prompts: int = 0
    texts: int = 0
    new_tokens: int = 0
    intervals: Mapping[str, Interval] = field(default_factory=dict)
    error: str | None = None

    @property
    def failed(self) -> bool:
        """The method could not give its text; a run that was stopped, or texts that loop, are no such failure."""
        return self.error not in (None, UNFINISHED, LOOPS)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        known = {key: data[key] for key in (each.name for each in fields(cls)) if key in data}
        known["acceptance_by_position"] = tuple(known.get("acceptance_by_position", ()))
        known["intervals"] = {key: (low, high) for key, (low, high) in known.get("intervals", {}).items()}
        return cls(**known)


@dataclass(frozen=True, slots=True, kw_only=True)
class Noise:
    """How steady the machine was: the same plain decoding, timed before every round.

    ``spread`` is the distance of the 90th from the 10th percentile of ``seconds`` over their median; past ``limit`` no
    speedup is given, and ``refusal`` says so in one line.
    """

    seconds: tuple[float, ...]
    spread: float
    limit: float
    refusal: str | None

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        return cls(seconds=tuple(data["seconds"]), spread=data["spread"], limit=data["limit"], refusal=data["refusal"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Everything ``bench generate`` prints with ``--json``.

    ``contenders`` names every method with what it is (options, versions, flags, or why it is not there). ``curve`` are
    the seconds of one target forward by its rows, None where they were not measured. ``settings`` are the run's own
    (model, max_new_tokens, rounds, threads, device ...), ``circumstances`` the machine's (processor, date, command).
    """

    settings: Mapping[str, Any]
    contenders: Mapping[str, Mapping[str, Any]]
    rows: tuple[Row, ...]
    noise: Noise | None
    curve: Mapping[int, float] | None = None
    degenerate_prompts: tuple[int, ...] = ()
    left_out: tuple[str, ...] = ()
    prompts: int = 0
    complete: bool = True
    circumstances: Mapping[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    @property
    def tasks(self) -> tuple[str, ...]:
        """In the order of their first rows; ``ALL`` among them."""
        return tuple(dict.fromkeys(row.task for row in self.rows))

    @property
    def methods(self) -> tuple[str, ...]:
        """In the order of their first rows."""
        return tuple(dict.fromkeys(row.method for row in self.rows))

    def row(self, method: str, task: str = ALL) -> Row | None:
        """The row of a method on a task."""
        return next((row for row in self.rows if (row.method, row.task) == (method, task)), None)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        known = {each.name: data[each.name] for each in fields(cls) if each.name in data}
        curve, noise = data.get("curve"), data.get("noise")
        known["rows"] = tuple(Row.from_dict(row) for row in data["rows"])
        known["noise"] = None if noise is None else Noise.from_dict(noise)
        known["curve"] = None if curve is None else {int(rows): seconds for rows, seconds in curve.items()}
        known["degenerate_prompts"] = tuple(data.get("degenerate_prompts", ()))
        known["left_out"] = tuple(data.get("left_out", ()))
        return cls(**known)

    @classmethod
    def load(cls, path: Path) -> Self:
        """A report from its file. Raises ``ModelError`` for one that cannot be read or is none."""
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if data["format_version"] != FORMAT_VERSION:
                raise ModelError(f"{path} has format {data['format_version']}, not {FORMAT_VERSION}")
            return cls.from_dict(data)
        except OSError as error:
            raise ModelError(f"cannot read {path}: {error.strerror}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{path} is not a report of bench generate") from error
