"""``quantspec tune``: what speculation costs and gives on this machine, measured once and kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from quantspec.calibrate.cost.config import TuneConfig
from quantspec.cli.bench_parts import Listed, json_option, try_folder
from quantspec.cli.generate import ENGINE
from quantspec.cli.invocation import Invocation
from quantspec.cli.options import Flag, assemble, field_names, options_from
from quantspec.cli.places import profiles
from quantspec.cli.render import note, table
from quantspec.cli.signals import resumable
from quantspec.errors import UsageError

if TYPE_CHECKING:
    from quantspec.calibrate.cost.run import Tuned

CONTEXTS = Listed("a list of whole numbers, like 128,1024", int)
FLAGS = {
    **{name: flag for name, flag in ENGINE.items() if name in field_names(TuneConfig) - {"model", "head"}},
    "draft_model": Flag(("--spec-model",)),
    "prompts": Flag(metavar="FILE"),
}


@click.command
@click.argument("model", default=TuneConfig.__dataclass_fields__["model"].default)
@click.option(
    "--contexts",
    type=CONTEXTS,
    metavar="n,...",
    default=",".join(map(str, TuneConfig.contexts)),
    show_default=True,
    help="Tokens of context at which forwards are timed.",
)
@options_from(TuneConfig, FLAGS, skip=("model", "contexts"))
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE", help="Default: where generate looks for it.")
@click.option("--explain", is_flag=True, help="Show planned against measured speed of every drafter, with a plot.")
@json_option
@click.pass_obj
def tune(invocation: Invocation, model: str, out: Path | None, explain: bool, as_json: bool, **options: Any) -> None:
    """Measure MODEL and its drafters on this machine, and choose how to decode.

    Forwards of many widths, every drafter that is named or comes with MODEL, and what the target accepts of it on
    --prompts make a profile; `quantspec generate` decodes by it from then on. Stopped, the same command goes on. With
    --explain, a profile that is there and holds is explained and not measured again, unless prompts are named.
    """
    config = assemble(TuneConfig, options, model=model)
    if out is not None:
        _check_place(out)
    from quantspec.calibrate.cost.run import tune as measure

    with resumable(invocation.command):
        tuned = measure(config, out, profiles(), note, again=not explain or config.prompts is not None)
    _print(tuned, explain, as_json)


def _check_place(out: Path) -> None:
    """Say now, not after minutes of measuring, that the profile cannot be written."""
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise UsageError(f"cannot write {out}", hint="name a file in a folder that exists")
    if out.suffix in (".html", ".png"):
        raise UsageError(f"{out} would be overwritten by the picture", hint="name a .json file")
    try_folder(out.absolute().parent)


def _print(tuned: Tuned, explain: bool, as_json: bool) -> None:
    from quantspec.calibrate.cost.explain import COLUMNS, caption, median_error, rows

    found, profile = rows(tuned.profile), tuned.profile
    pictures = _draw(tuned) if explain else []
    if as_json:
        report = {
            "profile": str(tuned.path),
            "machine": dict(profile.machine),
            "kernels": profile.kernels,
            "created": profile.created,
            "chosen": profile.chosen.as_dict(),
            "rows": [row.json() for row in found],
            "median_error": median_error(found),
            "noise": tuned.noise,
            "seconds": tuned.seconds,
            "pictures": [str(path) for path in pictures],
        }
        click.echo(json.dumps(report))
        return
    if explain:
        table(f"Planned and measured on {profile.machine.get('device', profile.machine['processor'])}", COLUMNS, [
            row.cells() for row in found
        ])  # fmt: skip
        click.echo(caption(profile, found))
    best = next(row for row in found if row.chosen)
    click.echo(
        f"chosen: {best.drafter}{f' ({best.setting})' if best.setting else ''}, {best.measured:.1f} tokens/s, "
        f"{best.speedup:.2f}x plain decoding"
    )
    click.echo(f"profile: {tuned.path}")
    for path in pictures:
        click.echo(f"picture: {path}")


def _draw(tuned: Tuned) -> list[Path]:
    """The page, and the picture where there is what draws it, beside the profile."""
    from quantspec.calibrate.cost import picture
    from quantspec.calibrate.cost.explain import html
    from quantspec.models.atomic import write_bytes

    written = [tuned.path.with_suffix(".html")]
    write_bytes(written[0], html(tuned.profile).encode())
    reason = picture.why_not()
    if reason is None:
        written.append(tuned.path.with_suffix(".png"))
        write_bytes(written[1], picture.png(tuned.profile))
    else:
        note(reason)
    return written
