"""``gpu.md``: the targets beside what was found and what had been predicted, then the figures themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Report = Mapping[str, Any]
Row = Mapping[str, Any]
MB = 1e6


@dataclass(frozen=True)
class Target:
    """``found(report)`` is None where it was not measured; ``met`` says whether it is enough; ``predicted`` was written
    before any measurement."""

    what: str
    goal: str
    predicted: str
    found: Callable[[Report], float | None]
    met: Callable[[float], bool]
    form: str = "{:.2f}"

    def line(self, report: Report) -> str:
        value = self.found(report)
        if value is None:
            return f"| {self.what} | {self.goal} | {self.predicted} | | not measured |"
        verdict = "met" if self.met(value) else "**not met**"
        return f"| {self.what} | {self.goal} | {self.predicted} | {self.form.format(value)} | {verdict} |"


def result(report: Report, part: str) -> Report:
    """What a part has found; empty if it has not run."""
    return report["parts"].get(part, {}).get("result", {})


def products(
    report: Report, backend: str, widths: Iterable[int], least_bytes: float, dtype: str = "bfloat16"
) -> list[Row]:
    """Rows of 4-bit products of so many bytes at least. ``bench kernels`` gives the least of all times as ``ms``, and
    the median beside it: these figures are of medians."""
    return [
        row
        for row in result(report, "kernels").get("rows", ())
        if (row["backend"], row["mode"], row["dtype"]) == (backend, "w4a16", dtype)
        and row["n"] in widths
        and row["weight_bytes"] >= least_bytes
    ]


def read_fraction(report: Report, row: Row) -> float:
    return row["weight_bytes"] / row["ms_median"] / 1e6 / result(report, "kernels")["read_bandwidth_gbps"]


def tflops(row: Row) -> float:
    return 2e-9 * row["n"] * row["K"] * row["N"] / row["ms_median"]


def least_fraction(backend: str, least_bytes: float) -> Callable[[Report], float | None]:
    def found(report: Report) -> float | None:
        rows = products(report, backend, (1, 2, 4, 8, 16), least_bytes)
        return min((read_fraction(report, row) for row in rows), default=None)

    return found


def most_v(n: int) -> Callable[[Report], float | None]:
    def found(report: Report) -> float | None:
        one = {row["matrix"]: row["ms_median"] for row in products(report, "cuda", (1,), 60 * MB)}
        wide = products(report, "cuda", (n,), 60 * MB)
        return max((row["ms_median"] / one[row["matrix"]] for row in wide), default=None)

    return found


def least_tflops(report: Report) -> float | None:
    return min((tflops(row) for row in products(report, "cuda", (64,), 200 * MB)), default=None)


def triton_ratio(report: Report) -> float | None:
    ours = {(row["matrix"], row["n"]): row["ms_median"] for row in products(report, "cuda", (1, 2, 4, 8, 16), 60 * MB)}
    theirs = products(report, "triton", (1, 2, 4, 8, 16), 60 * MB)
    ratios = [row["ms_median"] / ours[key] for row in theirs if (key := (row["matrix"], row["n"])) in ours]
    return max(ratios, default=None)


def speed(part: str) -> Callable[[Report], float | None]:
    return lambda report: result(report, part).get("tokens_per_second")


def worst_error(dtype: str) -> Callable[[Report], float | None]:
    def found(report: Report) -> float | None:
        checked = (result(report, "products").get(kernels, {}) for kernels in ("cuda", "triton"))
        both = *checked, result(report, "triton").get("errors", {})
        errors = [value for each in both for kind, value in each.items() if kind.split()[-1] == dtype]
        return max((value for value in errors if isinstance(value, float)), default=None)

    return found


def failures(*parts: str) -> Callable[[Report], float | None]:
    """How many of the parts have failed; None unless one has run."""

    def found(report: Report) -> float | None:
        states = [report["parts"].get(part, {}).get("status") for part in parts]
        ran = [state for state in states if state in ("done", "failed")]
        return float(ran.count("failed")) if len(ran) == len(parts) else None

    return found


def gain(part: str, *kinds: str) -> Callable[[Report], float | None]:
    """Of the kinds' fastest settings in a part of ``bench paper``, the best speedup over plain decoding in 4 bits."""

    def found(report: Report) -> float | None:
        precision = result(report, part).get("w4", {})
        names = [precision.get(kind) for kind in kinds]
        rows = precision.get("report", {}).get("rows", ())
        return max((row["speedup"] for row in rows if row["method"] in names and row["speedup"]), default=None)

    return found


def _at_least(least: float) -> Callable[[float], bool]:
    return lambda value: value >= least


def _at_most(most: float) -> Callable[[float], bool]:
    return lambda value: value <= most


TARGETS = (
    Target("W4, n = 1..16, matrices of 60 MB and more, of read bandwidth", "65%", "70%",
           least_fraction("cuda", 60 * MB), _at_least(0.65), "{:.0%}"),
    Target("W4, n = 1..16, matrices of 200 MB and more", "80%", "78%",
           least_fraction("cuda", 200 * MB), _at_least(0.8), "{:.0%}"),
    Target("v(16), 60 MB and more", "1.05", "1.02", most_v(16), _at_most(1.05)),
    Target("v(32), 60 MB and more", "1.35", "1.3", most_v(32), _at_most(1.35)),
    Target("n = 64, 200 MB and more, TFLOP/s", "400", "460", least_tflops, _at_least(400), "{:.0f}"),
    Target("Triton over CUDA, n = 1..16, 60 MB and more", "1.6", "1.3", triton_ratio, _at_most(1.6)),
    Target("8B decode, tokens/s", "450 (aim 700)", "380", speed("decode-8b"), _at_least(450), "{:.0f}"),
    Target("70B decode, tokens/s", "70", "73", speed("decode-70b"), _at_least(70), "{:.0f}"),
    Target("8B, W4: best method over plain", "2.5", "2.2", gain("paper-8b", "tree", "cascade"), _at_least(2.5)),
    Target("70B, W4: cascade over plain", "2.8", "3.2", gain("paper-70b", "cascade"), _at_least(2.8)),
    Target("relative error, fp16", "2e-3", "3e-4", worst_error("float16"), _at_most(2e-3), "{:.1e}"),
    Target("relative error, bf16", "8e-3", "2e-3", worst_error("bfloat16"), _at_most(8e-3), "{:.1e}"),
    Target("rows at n = 1..64, products and decoders: failed parts", "0", "0", failures("products", "prove"),
           _at_most(0), "{:.0f}"),
    Target("texts of all methods, those of plain decoding: failed parts", "0", "0", failures("generate"),
           _at_most(0), "{:.0f}"),
    Target("compute-sanitizer: failed parts", "0", "0", failures("sanitizer"), _at_most(0), "{:.0f}"),
)  # fmt: skip


def page(report: Report) -> str:
    """The whole page, of whatever has been found so far."""
    sections = (_head, _targets, _parts, _kernels, _launch, _decode, _paper)
    return "\n".join(line for section in sections for line in section(report)) + "\n"


def _head(report: Report) -> Iterator[str]:
    found = result(report, "environment")
    yield f"# {found.get('device_name', 'A GPU')}"
    yield ""
    if found:
        packages = ", ".join(f"{name} {number}" for name, number in found.get("packages", {}).items() if number)
        yield f"{report.get('date', '')}, commit {found.get('commit')}. Python {found.get('python')}, {packages}, CUDA "
        yield f"{found.get('cuda')}, driver {found.get('driver')}."
        yield ""
    yield f"`{report.get('command', '')}`, in {report['minutes']:g} minutes."
    if "read_bandwidth_gbps" in found:
        readers = ", ".join(f"{each['reader']} {each['gbps']:.0f}" for each in found["read_bandwidths"])
        yield ""
        yield f"Read bandwidth {found['read_bandwidth_gbps']:.0f} GB/s ({readers}), copy "
        rate = found["raw_peak_gmacs"] / 500
        yield f"{found['copy_bandwidth_gbps']:.0f} GB/s; torch's bf16 product {rate:.0f} TFLOP/s."
    yield ""


def _targets(report: Report) -> Iterator[str]:
    yield "## Targets"
    yield ""
    yield "Of medians over rounds; the worst of all matrices and widths that a line names, in bf16."
    yield ""
    yield from _head_row("what", "goal", "predicted", "found", "")
    yield from (target.line(report) for target in TARGETS)
    yield ""


def _parts(report: Report) -> Iterator[str]:
    yield "## Parts"
    yield ""
    yield from _head_row("part", "", "s", "why")
    for name, found in report["parts"].items():
        why = str(found.get("why", "")).replace("|", "/").replace("\n", " ")
        yield f"| {name} | {found['status']} | {found['seconds']:.0f} | {why} |"
    yield ""


def _kernels(report: Report) -> Iterator[str]:
    found = result(report, "kernels")
    if not found.get("rows"):
        return
    yield "## One product"
    yield ""
    yield "Microseconds are medians; a graph goes round 240 MB of copies or more."
    yield ""
    yield from _head_row("matrix", "type", "kernels", "n", "us", "GB/s", "of read", "v(n)", "TFLOP/s")
    one = {_of(row): row["ms_median"] for row in found["rows"] if row["n"] == 1}
    for row in found["rows"]:
        yield (
            f"| {row['matrix']} | {row['dtype']} | {row['backend']} | {row['n']} | {row['ms_median'] * 1e3:.1f} | "
            f"{row['weight_bytes'] / row['ms_median'] / 1e6:.0f} | {read_fraction(report, row):.0%} | "
            f"{row['ms_median'] / one[_of(row)]:.2f} | {tflops(row):.0f} |"
        )
    yield ""
    for name, reason in found.get("left_out", {}).items():
        yield f"Left out: {name}, {reason}."
    yield ""


def _launch(report: Report) -> Iterator[str]:
    if differ := result(report, "probe").get("differ"):
        shares = ", ".join(f"{kind} {share:.1%}" for kind, share in differ.items())
        yield f"Sums whose bits differ between wgmma and mma.sync: {shares}."
        yield ""
    if found := result(report, "launch"):
        yield "## Programmatic dependent launch"
        yield ""
        yield from _head_row("what", "us, off", "us, on", "of read, off", "of read, on")
        for what, sides in found.items():
            read = [f"{sides[side]['of_read']:.0%}" if "of_read" in sides[side] else "" for side in ("off", "on")]
            yield f"| {what} | {sides['off']['us']:.1f} | {sides['on']['us']:.1f} | {read[0]} | {read[1]} |"
        yield ""


def _of(row: Row) -> tuple[str, str, str]:
    return row["matrix"], row["dtype"], row["backend"]


def _decode(report: Report) -> Iterator[str]:
    decodes = {part: found for part in report["parts"] if (found := result(report, part)).get("tokens_per_second")
               and part.startswith("decode")}  # fmt: skip
    if not decodes:
        return
    yield "## Whole models"
    yield ""
    yield "Random weights, batch 1. Parts are graphs over all layers; other: what the host adds."
    yield ""
    yield from _head_row(
        "part",
        "kernels",
        "tokens/s",
        "ms a step",
        "ms of its graph",
        "graph, of read",
        "ms by part",
        "v(8)",
        "v(16)",
        "v(64)",
    )
    for part, found in decodes.items():
        split = ", ".join(f"{name} {ms:.3f}" for name, ms in found["parts_ms"].items())
        v = {row["n"]: f"{row['v']:.2f}" for row in found["rows"]}
        yield (
            f"| {part} | {found['backend']} | {found['tokens_per_second']:.0f} | {found['ms_per_step']:.3f} | "
            f"{found['graph_ms']:.3f} | {found['graph_bandwidth_fraction']:.0%} | {split} | "
            f"{v.get(8, '')} | {v.get(16, '')} | {v.get(64, '')} |"
        )
    yield ""
    yield from _generate(report)


def _generate(report: Report) -> Iterator[str]:
    for backend, found in result(report, "generate").items():
        if "tokens_per_second" in found:
            speeds = ", ".join(f"{method} {speed:.0f}" for method, speed in found["tokens_per_second"].items())
            yield f"The default family on {backend}, {found['exactness']}: {speeds} tokens/s."


def _paper(report: Report) -> Iterator[str]:
    for part in ("paper-8b", "paper-70b"):
        if found := result(report, part):
            yield ""
            yield f"## EAGLE-2's tree and a cascade, shape-scaled: {part}"
            yield ""
            yield from _head_row(*found["columns"])
            yield from (f"| {' | '.join(cells)} |" for cells in found["table"].values())


def _head_row(*columns: str) -> Sequence[str]:
    return f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"
