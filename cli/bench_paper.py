"""``quantspec bench paper``: an EAGLE-2 tree and a cascade on targets of 16, 8 and 4 bits."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from quantspec.benchmarks.paper_config import BITS, PaperBench
from quantspec.cli.bench_parts import NAMES, check_texts, circumstances, json_option, try_folder
from quantspec.cli.invocation import Invocation
from quantspec.cli.options import assemble, options_from
from quantspec.cli.render import note, table
from quantspec.cli.signals import Stop
from quantspec.errors import Interrupted, ModelError

if TYPE_CHECKING:
    from quantspec.benchmarks.paper import Precision

_LISTS = ("precisions", "trees", "cascades")


@click.command(short_help="EAGLE-2's tree against a cascade on bf16, W8 and W4.")
@click.option(
    "--precisions", type=NAMES, metavar="NAME,...", default=",".join(BITS), show_default=True, help="Of the target."
)
@click.option("--trees", type=NAMES, metavar="NxD,...", default=(), help="EAGLE trees to choose from: nodes x levels.")
@click.option(
    "--cascades", type=NAMES, metavar="T/NxD,...", default=(), help="Cascades to choose from: tokens / inner tree."
)
@options_from(PaperBench, skip=_LISTS)
@json_option
@click.pass_obj
def paper(invocation: Invocation, as_json: bool, **options: Any) -> None:
    """Measure SpecMQuant's comparison on shape-scaled models: for a target of each precision, plain decoding, EAGLE-2
    trees and cascades, alternated; the fastest of either kind side by side.

    Exit code 5: a text differs that must not; 3: no tree or no cascade ran."""
    config = assemble(PaperBench, options)
    from quantspec.benchmarks.generate_prompts import check_prompts
    from quantspec.models.atomic import make_folder

    check_prompts(config.prompts)
    make_folder(config.out)
    try_folder(config.out)
    from quantspec.benchmarks.paper import run
    from quantspec.benchmarks.paper_page import COLUMNS, TITLE, caption, cells

    known = circumstances(invocation)
    with Stop("stopping after this text") as stop:
        found = [replace(one, report=replace(one.report, circumstances=known)) for one in run(config, note, stop)]
    _write(found, config)
    if as_json:
        click.echo(json.dumps(_report(found, config)))
    else:
        table(TITLE, COLUMNS, list(map(cells, found)))
        for line in caption(found, config.shape):
            click.echo(line)
    if stop():
        stopped = Interrupted("interrupted; what is finished is kept", hint=f"go on with: {invocation.command}")
        stopped.exit_code = stop.code
        raise stopped
    for one in found:
        check_texts(one.report.rows, f", target of {one.name}")
    failed = [one.name for one in found if one.tree is None or one.cascade is None]
    if failed:
        raise ModelError(f"no tree or no cascade ran on {', '.join(failed)}", hint="the report says why")


def _report(found: Sequence[Precision], config: PaperBench) -> dict[str, Any]:
    return {"label": "shape-scaled", "shape": config.shape, "precisions": [one.as_dict() for one in found]}


def _write(found: Sequence[Precision], config: PaperBench) -> None:
    from quantspec.benchmarks import paper_page
    from quantspec.benchmarks.plot import why_not
    from quantspec.models.atomic import write_bytes, write_json

    write_json(config.out / "paper.json", _report(found, config))
    write_bytes(config.out / "paper.md", paper_page.markdown(found, config.shape).encode())
    write_bytes(config.out / "paper.html", paper_page.html(found, config.shape).encode())
    reason = why_not()
    if reason is None:
        write_bytes(config.out / "paper.png", paper_page.png(found))
    else:
        note(reason)
