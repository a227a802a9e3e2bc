"""What the commands of ``quantspec bench`` have in common: lists as options, where figures were measured, output
folders."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from quantspec.cli.invocation import Invocation
from quantspec.errors import ResourceError, Unavailable, UsageError, VerificationError
from quantspec.kernels.machine import cpu_flags, processor

if TYPE_CHECKING:
    from quantspec.benchmarks.generate_rows import Row


class Listed(click.ParamType[Any, Any]):
    """Values with commas between them, as a tuple."""

    def __init__(self, name: str, item: Callable[[str], Any]) -> None:
        self.name, self._item = name, item

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[Any, ...]:
        if isinstance(value, tuple):
            return value
        try:
            return tuple(self._item(part.strip()) for part in value.split(","))
        except ValueError:
            self.fail(f"{value!r} is not {self.name}", param, ctx)


NAMES = Listed("name[,name]", str)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")


def circumstances(invocation: Invocation) -> dict[str, Any]:
    """The machine, the command and the time of a measurement."""
    return {
        "processor": processor(),
        "cpu_flags": cpu_flags(),
        "command": invocation.command,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def try_folder(folder: Path) -> None:
    """Say now, not after minutes of measuring, that a folder cannot be written into. Raises ``ResourceError``."""
    from tempfile import TemporaryFile

    try:
        TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ResourceError(f"cannot write into {folder}: {error.strerror}", hint="choose another folder") from error


def check_places(plot: Path | None, html: Path | None) -> None:
    """Say now, not after minutes of measuring, that a picture cannot be written."""
    for path in (plot, html):
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            raise UsageError(f"cannot write {path}", hint="name a file in a folder that exists")
        if path is not None:
            try_folder(path.parent)
    if plot is not None:
        from quantspec.benchmarks.plot import why_not

        reason = why_not()
        if reason is not None:
            raise Unavailable(reason, hint="pip install 'quantspec[plots]', or use --html, which needs nothing")


def check_texts(rows: Iterable[Row], of: str = "") -> None:
    """Raise ``VerificationError`` where one of our own methods has another text than plain decoding and must not;
    another engine's may differ."""
    ours = [row for row in rows if row.kind == "ours"]
    differ = [row.method for row in ours if row.equal_to_plain is False and row.exactness == "exact"]
    wrong = dict.fromkeys(differ)
    if wrong:
        raise VerificationError(f"the text of {', '.join(wrong)} differs from plain decoding's{of}")
