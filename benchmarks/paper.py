"""SpecMQuant's question on this machine: what an EAGLE-2 tree gains on targets of 16, 8 and 4 bits, and what a cascade.

    quantspec bench paper --out results

Targets are shape-scaled: texts and acceptance of small trained models at the cost of large ones. Drafters (the EAGLE
heads, the 4-bit intermediate) are the same for all; the target's precision alone changes. For each precision all trees
and cascades run beside plain decoding of the same target, alternated, through ``bench generate``; the fastest of either
kind are compared. The paper (arXiv 2505.22179, figures 1 and 5) has 2.3x, 2.0x and 1.3x for the tree on an 8B target on
an A100, and on a 4-bit 70B target 2.8x for the cascade, 1.31 times the tree's.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from quantspec.benchmarks import generate
from quantspec.benchmarks.acceptance import DISTINCT
from quantspec.benchmarks.generate_config import NO_PEERS
from quantspec.benchmarks.generate_figures import speeds
from quantspec.benchmarks.generate_rows import Interval, Report, Row
from quantspec.benchmarks.kernels import check_device
from quantspec.benchmarks.paper_config import BITS, PaperBench
from quantspec.benchmarks.peers.shared import sharing
from quantspec.benchmarks.scaled.config import ScaleBench, folder_name

Note = Callable[[str], None]
PEERS = ("transformers-bf16", "transformers-compiled")
"""Beside the dense target on a GPU: what published speedups often divide by, and what they should."""
DRAFTERS = ("intermediate", "eagle-target", "eagle-intermediate")


@dataclass(frozen=True, kw_only=True)
class Precision:
    """One precision of the target: ``tree`` and ``cascade`` name the fastest of either kind (None: all failed), and
    ``quotient`` is the cascade's speed over the tree's, with its 95% interval; None on a noisy machine."""

    name: str
    report: Report
    tree: str | None
    cascade: str | None
    quotient: tuple[float, Interval] | None

    def row(self, method: str | None) -> Row | None:
        return None if method is None else self.report.row(method)

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "report": self.report.as_dict()}


def run(config: PaperBench, note: Note, stop: Callable[[], bool] = lambda: False) -> list[Precision]:
    """All precisions, or those that were begun when ``stop`` said so. Raises as ``generate.run`` and ``scaled.run``."""
    check_device(config.device)
    folders = scale(config, note)
    found: list[Precision] = []
    for name in config.precisions:
        if stop():
            break
        note(f"target of {name}")
        found.append(_precision(config, name, folders, note, stop))
    return found


def scale(config: PaperBench, note: Note) -> dict[str, Path]:
    """The models' folders by name, targets by their precision; those that are not there are written. Drafters are of
    the 4-bit target, which is therefore always there."""
    from quantspec.benchmarks.scaled.run import run as write

    out, found = config.models or config.out / "models", dict[str, Path]()
    for name, bits in BITS.items():
        if name not in (*config.precisions, "w4"):
            continue
        only = ("target", *DRAFTERS) if name == "w4" else ("target",)
        options = ScaleBench(out, config.shape, config.intermediate_shape, bits=bits, only=only, seed=config.seed)
        for member in write(options, note)["members"]:  # of all calls so far
            stem = member.removesuffix("-w4").removesuffix("-w8")
            if stem != "target":
                found[stem] = out / member
        found[name] = out / folder_name("target", bits)
    return found


def _precision(
    config: PaperBench, name: str, folders: Mapping[str, Path], note: Note, stop: Callable[[], bool]
) -> Precision:
    options = replace(
        config.bench(),
        model=str(folders[name]),
        draft_model=str(folders["intermediate"]),
        head=(str(folders["eagle-target"]), str(folders["eagle-intermediate"])),
        peers=PEERS if name == "bf16" and config.device != "cpu" else NO_PEERS,
        out=config.out / name,
    )
    report = generate.run(options, note, stop, arrange=sharing)
    tree, cascade = _fastest(report, config.tree_methods()), _fastest(report, config.cascade_methods())
    steady = report.noise is not None and report.noise.refusal is None
    quotient = _quotient(config.out / name / generate.LOG, cascade, tree) if tree and cascade and steady else None
    return Precision(name=name, report=report, tree=tree, cascade=cascade, quotient=quotient)


def _fastest(report: Report, methods: Sequence[str]) -> str | None:
    rows = [row for row in map(report.row, methods) if row is not None and row.tokens_per_second]
    return max(rows, key=lambda row: row.tokens_per_second or 0.0).method if rows else None


def _quotient(log: Path, over: str, under: str) -> tuple[float, Interval]:
    """Speed of one method over another's on the same prompts and rounds, from the run's log. Texts that loop, and turns
    in which one of them failed, are left out, as in the rows."""
    seconds: dict[str, list[tuple[float, float]]] = defaultdict(list)
    tokens: dict[str, tuple[int, int]] = {}
    for line in log.read_text(encoding="utf-8").splitlines()[1:]:
        entry = json.loads(line)
        kind, *key = entry["id"].split(":")
        turn = entry["found"]
        if kind != "turn" or turn["distinct"] < DISTINCT:
            continue
        mine, other = turn["answers"].get(over, {"error": "absent"}), turn["answers"].get(under, {"error": "absent"})
        if "error" in mine or "error" in other:
            continue
        seconds[key[1]].append((mine["seconds"], other["seconds"]))
        tokens[key[1]] = (mine["tokens"], other["tokens"])
    return speeds(list(seconds.values()), [tokens[number] for number in seconds])["speedup"]
