"""``quantspec bench generate``: every method, other engines and plain decoding side by side."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from quantspec.benchmarks.generate_config import PEERS, GenerateBench
from quantspec.cli.bench_parts import NAMES, check_texts, circumstances, json_option, try_folder
from quantspec.cli.invocation import Invocation
from quantspec.cli.options import assemble, options_from
from quantspec.cli.places import with_profile
from quantspec.cli.render import note, table
from quantspec.cli.signals import Stop
from quantspec.engine.config import EngineConfig
from quantspec.errors import Interrupted, ModelError

if TYPE_CHECKING:
    from quantspec.benchmarks.generate_rows import Report


@click.command(short_help="Methods and other engines side by side: tokens/s, equality.")
@click.option(
    "--methods",
    type=NAMES,
    metavar="NAME[:KEY=VALUE],...",
    default=(),
    help="Which to measure, settings behind colons: eagle:tree_depth=4:num_speculative_tokens=12. Default: all found.",
)
@click.option(
    "--peers",
    type=NAMES,
    metavar="NAME,...",
    default=(),
    help=f"Other engines, of {', '.join(PEERS)}; or none. Default: those that are usual on the device.",
)
@click.option("--tasks", type=NAMES, metavar="NAME,...", default=(), help="Prompts of these alone. Default: all.")
@options_from(GenerateBench, skip=("methods", "peers", "tasks"))
@json_option
@click.pass_obj
def generate(invocation: Invocation, as_json: bool, **options: Any) -> None:
    """Generate the same prompts with every method, with other engines, and plainly, alternated in one run: tokens/s,
    acceptance length, time by part, peak memory, and whether the text is that of plain decoding.

    Speedups are over plain decoding here; none is given where the machine was too noisy. An engine that is not
    installed, or fails, has rows that say so. Exit code 5: a text differs that must not; 3: a method failed.
    """
    config = assemble(GenerateBench, options)
    from quantspec.benchmarks.generate_prompts import check_prompts

    check_prompts(config.prompts)
    if config.profile is None:
        tuned = EngineConfig(model=config.model, method="auto", device=config.device, threads=config.threads)
        config = replace(config, profile=with_profile(tuned).profile)
    if config.out is not None:
        from quantspec.models.atomic import make_folder

        make_folder(config.out)
        try_folder(config.out)
    from quantspec.benchmarks.generate import run
    from quantspec.benchmarks.generate_table import COLUMNS, cells, closing, title

    with Stop("stopping after this text") as stop:
        report = replace(run(config, note, stop), circumstances=circumstances(invocation))
    if config.out is not None:
        _write(report, config.out)
    if as_json:
        click.echo(json.dumps(report.as_dict()))
    else:
        for task in report.tasks:
            table(title(report, task), COLUMNS, [cells(row) for row in report.rows if row.task == task])
        for line in closing(report):
            click.echo(line)
    if stop():
        hint = None if config.out is None else f"go on with: {invocation.command}"
        stopped = Interrupted("interrupted; what is finished is kept", hint=hint)
        stopped.exit_code = stop.code
        raise stopped
    _judge(report)


def _write(report: Report, out: Path) -> None:
    from quantspec.benchmarks import generate_page, generate_plot, generate_table
    from quantspec.benchmarks.plot import why_not
    from quantspec.models.atomic import write_bytes, write_json

    write_json(out / "generate.json", report.as_dict())
    write_bytes(out / "generate.md", generate_table.markdown(report).encode())
    write_bytes(out / "generate.html", generate_page.html(report).encode())
    reason = why_not()
    if reason is None:
        write_bytes(out / "generate.png", generate_plot.png(report))
    else:
        note(reason)


def _judge(report: Report) -> None:
    """Raise what is wrong with our own methods; another engine's text may differ, and it may fail."""
    check_texts(report.rows)
    failed = {row.method: None for row in report.rows if row.kind == "ours" and row.failed}
    if failed:
        raise ModelError(f"{', '.join(failed)} failed", hint="the table says why")
