"""``quantspec demo``: the main job on the default family, end to end, with one table at its end."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

import click

from quantspec import __version__
from quantspec.calibrate.quantize.config import QuantizeConfig
from quantspec.cli.invocation import Invocation
from quantspec.cli.quantize import DENSE_DEFAULT, progress
from quantspec.cli.render import megabytes, note, table
from quantspec.cli.signals import resumable
from quantspec.errors import VerificationError
from quantspec.kernels.machine import processor
from quantspec.types import SamplingParams

if TYPE_CHECKING:
    from quantspec.engine.request import Completion

PROMPTS = tuple(
    f"Question: {question}\nAnswer:"
    for question in (
        "A baker has 24 rolls. She sells 9 in the morning and 7 in the afternoon. How many rolls are left?",
        "Tom reads 12 pages a day. His book has 180 pages. How many days does he need to read the whole book?",
        "A ticket costs $8 for an adult and $5 for a child. What do 3 adults and 4 children pay together?",
        "Anna is twice as old as Ben. Ben is 3 years older than Carl, who is 6. How old is Anna?",
        "A train travels 60 miles in an hour. How many miles does it travel in 2 hours and 30 minutes?",
        "There are 5 boxes with 14 pencils each. 20 pencils are given away. How many pencils remain?",
    )
)
METHODS = {"none": "no drafter", "eagle": "EAGLE-2 tree", "cascade": "cascade"}


@dataclass(frozen=True)
class Row:
    """One method over all prompts."""

    method: str
    tokens_per_second: float
    acceptance_length: float
    target_forwards: int
    weight_bytes: int

    @classmethod
    def of(cls, method: str, completions: Sequence[Completion], weight_bytes: int) -> Self:
        """Totals: tokens over seconds (prefills included), tokens after the first over target forwards."""
        stats = [completion.stats for completion in completions]
        tokens, forwards = sum(each.new_tokens for each in stats), sum(each.target_forwards for each in stats)
        return cls(
            method,
            tokens / sum(each.seconds for each in stats),
            (tokens - len(stats)) / forwards,
            forwards,
            weight_bytes,
        )


@click.command
@click.option("--max-new-tokens", "-n", type=int, default=128, show_default=True, help="Tokens per prompt.")
@click.option("--out", "-o", type=click.Path(path_type=Path), help="Folder for the quantized target. Default: a cache.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.pass_obj
def demo(invocation: Invocation, max_new_tokens: int, out: Path | None, as_json: bool) -> None:
    """Quantize the default target to 4 bits, generate the same prompts with no drafter, with an EAGLE-2 tree and with
    the cascade, check that all texts are equal, and print one table. A second run reuses the quantized target."""
    params = SamplingParams(max_new_tokens=max_new_tokens, seed=0)
    import torch

    with resumable(invocation.command):
        target = _quantized_target(out or _cache() / f"default-{_edition()}-w4")
    rows: list[Row] = []
    plain: list[Completion] = []
    for method, name in METHODS.items():
        note(f"generating with {name}")
        completions, weight_bytes = _generate(target, method, params)
        plain = plain or completions
        if [each.token_ids for each in completions] != [each.token_ids for each in plain]:
            raise VerificationError(f"the text of {name} differs from plain decoding's")
        rows.append(Row.of(method, completions, weight_bytes))
    machine = f"{processor()}, {torch.get_num_threads()} threads"
    if as_json:
        click.echo(json.dumps({"machine": machine, "prompts": len(PROMPTS), "rows": [vars(row) for row in rows]}))
        return
    table(
        f"{len(PROMPTS)} prompts, greedy, texts equal, on {machine}",
        ("method", "tokens/s", "acceptance length", "target forwards", "weights"),
        (
            (
                METHODS[row.method],
                f"{row.tokens_per_second:.1f}",
                f"{row.acceptance_length:.2f}",
                row.target_forwards,
                megabytes(row.weight_bytes),
            )
            for row in rows
        ),
    )
    click.echo("Acceptance length counts the target's own (bonus) token and leaves the prompt's forward out.")
    if rows[0].tokens_per_second > max(row.tokens_per_second for row in rows[1:]):
        click.echo("A forward of so small a target takes less time than drafting: drafters pay on larger ones.")


def _quantized_target(out: Path) -> Path:
    """Quantize the default target into ``out``, or go on with what an earlier run left there."""
    from quantspec.calibrate.quantize.run import run
    from quantspec.models.resolve import resolve

    note(f"quantizing the default target into {out}")
    out.parent.mkdir(parents=True, exist_ok=True)
    with progress(sys.stderr.isatty()) as on_event:
        run(QuantizeConfig(model=resolve(DENSE_DEFAULT), out=out, eval_samples=0), on_event)
    return out


def _edition() -> str:
    """Names what the cached target depends on: another quantizer's result, or what it left unfinished, is not ours."""
    from quantspec.calibrate import quantize
    from quantspec.models.atomic import MANIFEST
    from quantspec.models.resolve import resolve

    sources = sorted(Path(next(iter(quantize.__path__))).rglob("*.py"))
    digest = hashlib.sha256()
    for path in (resolve(DENSE_DEFAULT) / MANIFEST, *sources):
        digest.update(path.read_bytes() if path.exists() else b"")
    return f"{__version__}-{digest.hexdigest()[:12]}"


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "quantspec"


def _generate(target: Path, method: str, params: SamplingParams) -> tuple[list[Completion], int]:
    """The completions of all prompts, one at a time, and the bytes of weights that it took."""
    from quantspec.engine.build import FAMILY
    from quantspec.engine.llm import load

    llm = load(str(target), method=method, notice=note, **FAMILY.get(method, {}))
    llm.generate(PROMPTS[0], SamplingParams(max_new_tokens=8))  # a first run pays for caches and thread pools
    completions: list[Completion] = []
    for prompt in PROMPTS:  # one at a time: a batch would be another measurement
        generation = llm.stream(prompt, params)
        for _ in generation:
            pass
        completions += generation.completions
    return completions, llm.weight_bytes
