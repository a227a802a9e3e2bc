"""``quantspec generate --dry-run``: what memory a run would take, before anything is loaded."""

from __future__ import annotations

import json

import click

from quantspec.cli.render import note, table
from quantspec.engine.config import EngineConfig
from quantspec.errors import ResourceError, UsageError
from quantspec.types import SamplingParams


def show_memory(config: EngineConfig, params: SamplingParams, prompt: str | None, *, as_json: bool) -> None:
    """Print the plan for a prompt and its output (None: for ``max_context``). Raises ``ResourceError``: it does not
    fit; the hint says what to change; ``UsageError``: the prompt is longer than the context."""
    from quantspec.engine import build, memory  # torch comes with it

    load = build.price(config, note)
    sequences = min(params.n, config.max_batch)
    context = None
    if prompt is not None:
        from quantspec.models.tokenizer import Tokenizer

        length = len(Tokenizer(load.target.folder).encode(prompt))
        if load.target.config and length >= load.most_context:  # which the run would refuse, whatever is free
            raise UsageError(
                f"the prompt has {length} tokens, but the context holds {load.most_context}", hint="shorten the prompt"
            )
        context = length + params.max_new_tokens
    plan, longest = load.plan(context, sequences), load.longest(sequences)
    ways = [] if plan.fits else list(memory.changes(load, plan))
    if as_json:
        click.echo(json.dumps(plan.as_dict() | {"longest_context": longest, "changes": ways}))
    else:
        rows = [(part.name, memory.size(part.bytes)) for part in plan.parts]
        rows += [("together", memory.size(plan.running)), ("while it loads, at most", memory.size(plan.loading))]
        rows += [(f"free on {plan.device}", "unknown" if plan.free is None else memory.size(plan.free))]
        many = f" in each of {plan.sequences} sequences" if plan.sequences > 1 else ""
        table(f"memory for a context of {plan.context:,} tokens{many}", ("part", "size"), rows)
        if plan.fits:
            click.echo(f"it fits, and so do contexts of up to {longest:,} tokens")
    if not plan.fits:
        raise ResourceError(memory.shortage(plan), hint="; ".join(ways) or "take a smaller model")
