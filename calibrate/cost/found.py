"""Which drafters there are for a target: those of the default family, and draft models and heads that are named."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantspec.drafters.eagle3_files import is_eagle3
from quantspec.drafters.medusa_files import is_medusa, read_medusa_config
from quantspec.drafters.peagle_files import is_peagle
from quantspec.engine.build import DEFAULT_TARGET, FAMILY, NEEDED
from quantspec.errors import ModelError, QuantSpecError, UsageError
from quantspec.models import resolve
from quantspec.models.config import read_config

PLAIN = "none"
"""What all others are held against."""


@dataclass(frozen=True)
class Found:
    """A drafter by the name it has in tables: the method and parts that make it, or why it cannot be had."""

    name: str
    options: Mapping[str, str] = field(default_factory=dict)
    error: str = ""


def find(model: str, draft_model: str | None, heads: Sequence[str], note: Callable[[str], None]) -> list[Found]:
    """Plain decoding first, then every drafter in the order of the engine's methods, then heads by name.

    ``heads`` are the target's own or, with a draft model, its inner ones of a cascade. Raises ``UsageError``: two heads
    of one name.
    """
    found = list(_found(model, draft_model, heads, note))
    twice = [one.name for i, one in enumerate(found) if one.name in {each.name for each in found[:i]}]
    if twice:
        raise UsageError(f"two heads are named {twice[0]}", hint="rename a folder: rows of the table go by their names")
    return found


def _found(model: str, draft_model: str | None, heads: Sequence[str], note: Callable[[str], None]) -> Iterator[Found]:
    family: Mapping[str, Mapping[str, str]] = FAMILY if model == "default" else {}
    given = {} if draft_model is None else {"draft_model": draft_model}
    taken = set()
    for method, needed in NEEDED.items():
        parts = {**family.get(method, {}), **(given if "draft_model" in needed else {})}
        if parts.keys() != set(needed):
            continue
        try:
            taken |= {resolve.resolve(name) for name in parts.values()}
        except ModelError as error:
            note(f"left out {method}: {error}")
            continue
        yield Found(method, {"method": method, **parts})
    for head in (*(_more_heads(taken) if family else ()), *heads):
        name = head if head.startswith(f"{resolve.DEFAULT}/") else Path(head).name
        name = name.removeprefix(f"{resolve.DEFAULT}/")
        try:
            yield Found(name, _options(model, draft_model, head))
        except QuantSpecError as error:
            yield Found(name, error=str(error))


def _more_heads(taken: set[Path]) -> list[str]:
    """Heads of the family that no method names, such as quantized ones."""
    folders = sorted(path.parent for path in resolve.FAMILY.glob("*/config.json"))
    return [
        f"{resolve.DEFAULT}/{folder.name}"
        for folder in folders
        if folder not in taken and not (folder / "tokenizer.json").is_file()
    ]


def _options(model: str, draft_model: str | None, head: str) -> dict[str, str]:
    """Method and parts of a head: the target's own if it has the target's width, else the inner one of a cascade."""
    folder = resolve.resolve(head)
    raw, width = read_config(folder), _width(folder)
    models = {"": DEFAULT_TARGET if model == "default" else model}
    draft_model = draft_model or (FAMILY["draft"]["draft_model"] if model == "default" else None)
    if draft_model is not None:
        models[draft_model] = draft_model
    widths = {name: read_config(resolve.resolve(each)).get("hidden_size") for name, each in models.items()}
    fitting = next((name for name, each in widths.items() if each == width), None)
    if fitting is None:
        sizes = " or ".join(str(each) for each in widths.values())
        raise ModelError(f"{head} is for a model of width {width}, and there is one of {sizes}")
    if fitting:
        return {"method": "cascade", "draft_model": fitting, "head": head}
    kinds = (("medusa", is_medusa), ("peagle", is_peagle), ("eagle3", is_eagle3))
    return {"method": next((kind for kind, holds in kinds if holds(raw)), "eagle"), "head": head}


def _width(folder: Path) -> Any:
    """Of the model that a head is for."""
    raw = read_config(folder)
    if is_medusa(raw):
        return read_medusa_config(folder).hidden_size
    nested = raw.get("transformer_layer_config")
    layer = nested if isinstance(nested, dict) else raw
    return raw.get("target_hidden_size") or layer.get("hidden_size")
