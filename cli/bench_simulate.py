"""``quantspec bench simulate``: the speed of any strategy on machines that are not here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from quantspec.benchmarks.simulate_config import STRATEGIES, SimulateBench
from quantspec.cli.bench_parts import NAMES, Listed, check_places, json_option
from quantspec.cli.options import assemble, options_from
from quantspec.cli.render import table
from quantspec.errors import UsageError, VerificationError

if TYPE_CHECKING:
    from quantspec.benchmarks.simulate import Report


@click.command(short_help="Predict any strategy's speed on any machine.")
@click.option(
    "--batch", type=Listed("B[,B]", int), metavar="B,...", default="1", show_default=True, help="Sequences at a time."
)
@click.option(
    "--strategies",
    type=NAMES,
    metavar="NAME[:KEY=N],...",
    default=(),
    help=f"Of {', '.join(STRATEGIES)}, or of a profile's methods, with options that are fixed behind colons: "
    "eagle:num_speculative_tokens=60. Default: all, each at its best.",
)
@options_from(SimulateBench, skip=("batch", "strategies"))
@click.option(
    "--check",
    type=click.Path(path_type=Path),
    metavar="PROFILE",
    multiple=True,
    help="Instead: simulate what quantspec tune measured (may be repeated). Exit code 5: 10% off in the median.",
)
@json_option
@click.option("--plot", type=click.Path(path_type=Path), metavar="FILE.png", help="Draw it (needs matplotlib).")
@click.option("--html", type=click.Path(path_type=Path), metavar="FILE.html", help="Write it as a page.")
def simulate(check: tuple[Path, ...], as_json: bool, plot: Path | None, html: Path | None, **options: Any) -> None:
    """Predict tokens/s from a machine's costs and a drafter's acceptance: plain decoding, trees, draft models, and
    cascades of two and three levels, at any batch.

    Machines a100, h100, h200, rtx3090 and rtx4090 and the pair llama-3 are in the package, with the sources of their
    figures; a profile by quantspec tune is both for your own machine and models. Nothing is run or measured.
    """
    config = assemble(SimulateBench, options)
    if check:
        if plot or html:
            raise UsageError("--check draws nothing", hint="leave out --plot and --html")
        _check(tuple(map(str, check)), as_json)
        return
    from quantspec.benchmarks import simulate_page
    from quantspec.benchmarks.simulate import run

    check_places(plot, html)
    report = run(config)
    _write(report, plot, html)
    if as_json:
        click.echo(json.dumps(report.as_dict()))
        return
    for name, rows in simulate_page.by_machine(report).items():
        table(name, simulate_page.COLUMNS, map(simulate_page.cells, rows))
    click.echo(simulate_page.caption(report))
    for line in report.notes:
        click.echo(f"Could not run: {line}.")


def _write(report: Report, plot: Path | None, html: Path | None) -> None:
    from quantspec.benchmarks import simulate_page
    from quantspec.models.atomic import write_bytes

    if plot is not None:
        write_bytes(plot, simulate_page.png(report))
    if html is not None:
        write_bytes(html, simulate_page.html(report).encode())


def _check(profiles: tuple[str, ...], as_json: bool) -> None:
    from quantspec.benchmarks import simulate_page
    from quantspec.benchmarks.simulate_check import run

    found = run(profiles)
    if as_json:
        click.echo(json.dumps(found.as_dict()))
    else:
        table("Simulated against measured", simulate_page.CHECK_COLUMNS, map(simulate_page.check_cells, found.rows))
        click.echo(simulate_page.verdict(found))
    if found.median_error > found.limit:
        raise VerificationError(
            f"simulated and measured speeds differ by {found.median_error:.0%} in the median",
            hint="a busy machine? measure again with quantspec tune",
        )
