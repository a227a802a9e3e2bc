"""``quantspec bench``: what this machine's kernels reach, alone and in a whole model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from quantspec.benchmarks.config import BACKENDS as KERNEL_BACKENDS
from quantspec.benchmarks.config import CUDA_BACKENDS, DecodeBench, DraftersBench, FuzzBench, KernelBench
from quantspec.benchmarks.shapes import ModelShape, parse_shape
from quantspec.cli.bench_generate import generate
from quantspec.cli.bench_paper import paper
from quantspec.cli.bench_parts import NAMES, Listed, check_places, circumstances, json_option, try_folder
from quantspec.cli.bench_scale import scale
from quantspec.cli.bench_simulate import simulate
from quantspec.cli.invocation import Invocation
from quantspec.cli.options import assemble, options_from
from quantspec.cli.render import note, table
from quantspec.cli.signals import Stop
from quantspec.errors import Interrupted, ModelError, VerificationError


class Shape(click.ParamType[Any, Any]):
    """A model's shape."""

    name = "shape"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> ModelShape:
        return value if isinstance(value, ModelShape) else parse_shape(value)


def _kxn(text: str) -> tuple[int, int]:
    k, n = text.lower().split("x")
    return int(k), int(n)


SHAPES = Listed("KxN[,KxN]", _kxn)
WIDTHS = Listed("n[,n]", int)
_DEFAULT_SHAPES = ",".join(f"{k}x{n}" for k, n in KernelBench.shapes)
_DEFAULT_WIDTHS = ",".join(map(str, KernelBench.widths))

widths_option = click.option(
    "--widths",
    type=WIDTHS,
    metavar="n,...",
    default=_DEFAULT_WIDTHS,
    show_default=True,
    help="Rows of one call; 1 is always added.",
)


@click.group
def bench() -> None:
    """Measure the kernels, or a whole model, on this machine."""


bench.add_command(generate)
bench.add_command(paper)
bench.add_command(scale)
bench.add_command(simulate)


@bench.command(short_help="The cost curve v(n) of one matrix product.")
@click.option(
    "--shapes",
    type=SHAPES,
    metavar="KxN,...",
    default=_DEFAULT_SHAPES,
    show_default=True,
    help="Weights, as inputs x outputs.",
)
@widths_option
@click.option(
    "--backends",
    type=NAMES,
    metavar="NAME,...",
    default=(),
    help=f"Of {', '.join(KERNEL_BACKENDS)}, on CUDA of {', '.join(CUDA_BACKENDS)}. Default: all that run here.",
)
@options_from(KernelBench, skip=("shapes", "widths", "backends"))
@json_option
@click.option("--plot", type=click.Path(path_type=Path), metavar="FILE.png", help="Draw the curves (needs matplotlib).")
@click.option("--html", type=click.Path(path_type=Path), metavar="FILE.html", help="Write the curves as a page.")
@click.pass_obj
def kernels(invocation: Invocation, as_json: bool, plot: Path | None, html: Path | None, **options: Any) -> None:
    """Time one matrix product for every number of rows and every backend, alternated in one run, beside the bandwidth
    and the rate of multiply-adds that were measured in the same run."""
    config = assemble(KernelBench, options)
    check_places(plot, html)
    from quantspec.benchmarks.kernels import run

    report = {**run(config, note), **circumstances(invocation)}
    _write_pictures(report, plot, html)
    if as_json:
        click.echo(json.dumps(report))
        return
    for shape in dict.fromkeys((row["K"], row["N"]) for row in report["rows"]):
        _print_shape(shape, [row for row in report["rows"] if (row["K"], row["N"]) == shape])
    for line in _closing(report):
        click.echo(line)


@bench.command(short_help="A whole model: tokens/s, parts of a step, v(n).")
@click.option(
    "--shape",
    type=Shape(),
    help="Random weights: 1b, 8b, 70b, and KEY=NUMBER, as in 1b,layers=4. Default without a model: 1b.",
)
@widths_option
@options_from(DecodeBench, skip=("shape", "widths"))
@json_option
@click.pass_obj
def decode(invocation: Invocation, as_json: bool, **options: Any) -> None:
    """Decode with a whole model on packed weights: tokens/s, the milliseconds of a step by part, the bytes that it
    reads against the measured bandwidth, and what forwards of more rows cost."""
    config = assemble(DecodeBench, options)
    from quantspec.benchmarks.decode import run

    report = {**run(config, note), **circumstances(invocation)}
    if as_json:
        click.echo(json.dumps(report))
    else:
        _print_model(report)


@bench.command(short_help="Damaged model files in every format, by the thousand.")
@options_from(FuzzBench)
@json_option
def fuzz(as_json: bool, **options: Any) -> None:
    """Damage tiny models of every format that is read, byte by byte and key by key, and load them: each must be refused
    in one line, or load as what it says. Exit code 5: one was not."""
    config = assemble(FuzzBench, options)
    from quantspec.benchmarks.fuzz_formats import run

    report = run(config, note)
    if as_json:
        click.echo(json.dumps(report))
    else:
        outcomes = ("refused", "equal", "other", "broken")
        rows = [(name, *(str(counts.get(key, 0)) for key in outcomes)) for name, counts in report["formats"].items()]
        table(f"{report['mutants']} mutants, seed {report['seed']}", ("format", *outcomes), rows)
        click.echo("equal: loads as the same model; other: as what the changed file says, which an independent reader")
        click.echo("confirms; broken: crashed, hung, took memory without bound, or was misread.")
    if report["broken"]:
        hint = f"quantspec bench fuzz --seed {config.seed} --first {report['broken'][0]['number']} --mutants 1"
        raise VerificationError(f"{len(report['broken'])} damaged files were not handled as they should", hint=hint)


@bench.command(short_help="Every drafter: acceptance length, time, tokens/s, equality.")
@click.option(
    "--drafters", type=NAMES, metavar="NAME,...", default=(), help="Which to measure. Default: all that are found."
)
@options_from(DraftersBench, skip=("drafters",))
@json_option
@click.pass_obj
def drafters(invocation: Invocation, as_json: bool, **options: Any) -> None:
    """Generate the same held-out prompts with every drafter in turns: tokens per target forward, milliseconds of a
    draft, tokens/s, and whether the text is that of plain decoding. Exit code 5: it was not; 3: a drafter failed."""
    config = assemble(DraftersBench, options)
    if config.out is not None:
        from quantspec.models.atomic import make_folder

        make_folder(config.out)
        try_folder(config.out)
    from quantspec.benchmarks.drafters import run
    from quantspec.benchmarks.drafters_page import COLUMNS, caption, cells

    with Stop("stopping after this text") as stop:
        report = {**run(config, note, stop), **circumstances(invocation)}
    if config.out is not None:
        _write_drafters(report, config.out)
    if as_json:
        click.echo(json.dumps(report))
    else:
        table(f"Drafters of {config.model}", COLUMNS, map(cells, report["rows"]))
        click.echo(caption(report))
    if stop():
        hint = None if config.out is None else f"go on with: {invocation.command}"
        stopped = Interrupted(f"interrupted after {report['prompts']} prompts", hint=hint)
        stopped.exit_code = stop.code
        raise stopped
    wrong = [row["drafter"] for row in report["rows"] if row["equal_to_plain"] is False and row["exactness"] == "exact"]
    if wrong:
        raise VerificationError(f"the text of {', '.join(wrong)} differs from plain decoding's")
    failed = [row["drafter"] for row in report["rows"] if row.get("error")]
    if failed:
        raise ModelError(f"{', '.join(failed)} failed", hint="the table says why")


def _write_drafters(report: Mapping[str, Any], out: Path) -> None:
    from quantspec.benchmarks import drafters_page
    from quantspec.benchmarks.plot import why_not
    from quantspec.models.atomic import write_bytes, write_json

    write_json(out / "drafters.json", report)
    write_bytes(out / "drafters.html", drafters_page.html(report).encode())
    reason = why_not()
    if reason is None:
        write_bytes(out / "drafters.png", drafters_page.png(report))
    else:
        note(reason)


def _write_pictures(report: Mapping[str, Any], plot: Path | None, html: Path | None) -> None:
    from quantspec.benchmarks import page
    from quantspec.benchmarks.plot import png
    from quantspec.models.atomic import write_bytes

    if plot is not None:
        write_bytes(plot, png(report))
    if html is not None:
        write_bytes(html, page.html(report).encode())


_OURS = ("cpu-int8", "cuda")
"""The backends whose way to the bound is shown too."""


def _print_shape(shape: tuple[int, int], rows: Sequence[Mapping[str, Any]]) -> None:
    names = list(dict.fromkeys(row["backend"] for row in rows))
    columns = ["n"]
    for name in names:
        columns += [f"{name} ms", "v", *(("of bound", "GB/s") if name in _OURS else ())]
    cells = []
    for n in sorted({row["n"] for row in rows}):
        line = [str(n)]
        for name in names:
            row = next(row for row in rows if (row["backend"], row["n"]) == (name, n))
            line += [_ms(row["ms"]), f"{row['v']:.2f}"]
            if name in _OURS:
                line += [f"{row['over_bound']:.2f}x", f"{row['gbps']:.1f}"]
        cells.append(line)
    table(f"{shape[0]} inputs x {shape[1]} outputs", columns, cells)


def _ms(value: float) -> str:
    return f"{value:.3f}" if value < 10 else f"{value:.1f}"


def _closing(report: Mapping[str, Any]) -> Iterator[str]:
    yield _machine_line(report)
    for name, reason in report["left_out"].items():
        yield f"Left out: {reason if name in reason else f'{name}, {reason}'}."
    alone = {(row["K"], row["N"], row["backend"]): row for row in report["rows"] if row["n"] == 1}
    for (k, n, name), row in alone.items():
        rival = "torch-fp32" if name == "cpu-int8" else "torch-bf16"
        dense = alone.get((k, n, rival))
        if name in _OURS and dense:
            yield (
                f"{k}x{n}, one row: {name} at {row['bandwidth_fraction']:.0%} of the read bandwidth, "
                f"{dense['ms'] / row['ms']:.1f} times as fast as dense {rival.removeprefix('torch-')}."
            )
    yield (
        f"ms: least of {report['rounds']} rounds. v(n) = t(n) / t(1). of bound: t(n) over the longer of reading the "
        "weights and of doing the multiply-adds."
    )


def _machine_line(report: Mapping[str, Any]) -> str:
    fastest, tile, raw = report["read_bandwidths"][0], report["tile_gmacs"], report["raw_peak_gmacs"]
    reads = f"reads {report['read_bandwidth_gbps']:.1f} GB/s"
    if "device_name" in report:
        return f"{report['device_name']}: {reads} ({fastest['reader']}), torch's bf16 product {raw / 500:.0f} TFLOP/s."
    peak = f" ({tile / raw:.0%} of the bare instruction's)" if raw else ""  # portable code has no such instruction
    return (
        f"{report['processor']}, {report['threads']} threads: {reads} "
        f"({fastest['threads']} threads, {fastest['page_bytes'] // 1024} kB pages, {fastest['prefetch']} bytes ahead), "
        f"inner loop {tile:.0f} GMAC/s{peak}."
    )


def _print_model(report: Mapping[str, Any]) -> None:
    total = sum(report["parts_ms"].values())
    table(
        "One step",
        ("part", "ms", "share", "MB read", "GB/s"),
        [
            (part, _ms(ms), f"{ms / total:.0%}", *_reading(report["part_bytes"].get(part, 0), ms))
            for part, ms in report["parts_ms"].items()
        ],
    )
    table(
        "Forwards of n rows",
        ("n", "ms", "v", "of bound", *(f"{part} ms" for part in report["parts_ms"])),
        [
            (
                str(row["n"]),
                _ms(row["ms"]),
                f"{row['v']:.2f}",
                f"{row['over_bound']:.2f}x",
                *(_ms(ms) for ms in row["parts_ms"].values()),
            )
            for row in report["rows"]
        ],
    )
    tokens, backend, context = report["tokens_per_second"], report["backend"], report["context"]
    megabytes, step = report["bytes_per_step"] / 1e6, _ms(report["ms_per_step"])
    click.echo(
        f"{tokens:.1f} tokens/s on {backend} with {context} tokens in the cache: {step} ms a step at best, "
        f"{megabytes:,.1f} MB read at {report['gbps']:.1f} GB/s, {report['bandwidth_fraction']:.0%} of the measured "
        f"{report['read_bandwidth_gbps']:.1f}."
    )
    if "device_name" in report:
        click.echo(
            f"{report['device_name']}, a graph alone {_ms(report['graph_ms'])} ms, "
            f"{report['graph_bandwidth_fraction']:.0%} of that bandwidth. Parts are graphs over all layers, each "
            "alone; a norm counts to what it feeds; other: the rest of a step, the host's work above all."
        )
        return
    place = f"{report['processor']}, {report['threads']} threads"
    click.echo(f"{place}. A norm counts to what it feeds; other: outside the kernels.")


def _reading(nbytes: int, ms: float) -> tuple[str, str]:
    return (f"{nbytes / 1e6:,.1f}", f"{nbytes / ms / 1e6:.1f}") if nbytes else ("", "")
