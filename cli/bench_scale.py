"""``quantspec bench scale``: the default family in the shape of a large model, to measure with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from quantspec.benchmarks.scaled.config import MEMBERS, ScaleBench
from quantspec.cli.bench_parts import NAMES, json_option
from quantspec.cli.options import assemble, options_from
from quantspec.cli.render import note, table


@click.command(short_help="Write small trained models in a large model's shape.")
@click.option(
    "--only",
    type=NAMES,
    metavar="NAME,...",
    default=(),
    help=f"Of {', '.join(MEMBERS)}. Default: all.",
)
@options_from(ScaleBench, skip=("only",))
@json_option
def scale(as_json: bool, **options: Any) -> None:
    """Embed a family of small trained models and their heads in larger shapes: every folder generates the small model's
    text, and is accepted as often, at the cost of the large one. What is added is random and has no effect.

    The folders are labelled shape-scaled, load like any others, and go on where a run was stopped.
    """
    config = assemble(ScaleBench, options)
    from quantspec.benchmarks.scaled.run import run

    report = run(config, note)
    if as_json:
        click.echo(json.dumps(report))
        return
    rows = [
        (name, str(member["bits"]), f"{member['bytes'] / 1e6:.1f}", f"{member['share']:.3f}", member["of"] or "")
        for name, member in report["members"].items()
    ]
    table(f"{config.shape}, in {Path(config.out)}", ("folder", "bits", "MB a step", "share", "of"), rows)
