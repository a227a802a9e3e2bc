"""The prompts of ``bench generate``, by task: Spec-Bench's lines, GSM8K's, or any with a prompt. No torch here."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantspec.benchmarks.generate_config import GenerateBench
from quantspec.engine.config import did_you_mean
from quantspec.errors import ModelError, UsageError
from quantspec.models.tokenizer import Tokenizer

HELD_OUT = Path(__file__).parent / "held_out.jsonl"
_KEYS = ("turns", "question", "prompt", "text")


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt as text and as the target's token ids; ``number`` counts all that are used, ``rank`` those of its
    task."""

    number: int
    task: str
    rank: int
    text: str
    tokens: tuple[int, ...]


def read_prompts(config: GenerateBench, tokenizer: Tokenizer, context: int | None) -> tuple[list[Prompt], list[str]]:
    """The first ``config.limit`` prompts of each task, and a line for each that is left out because prompt and text do
    not fit into the target's ``context``.

    A question, and the first of Spec-Bench's turns, is put as the model's chat template has it, or as "Question: ...
    Answer:" where there is none; a ``prompt`` or ``text`` is given as it stands. Raises ``UsageError`` for a file that
    cannot be read or tasks it has not, ``ModelError`` for one that has no prompts or is not made of such lines.
    """
    path = config.prompts or HELD_OUT
    rows = list(_rows(path))
    tasks = dict.fromkeys(_task(row, path) for row in rows)
    for name in config.tasks:
        if name not in tasks:
            hint = did_you_mean(name, tasks) or f"it has {', '.join(tasks)}"
            raise UsageError(f"{path} has no task {name!r}", hint=hint)
    used: list[Prompt] = []
    left_out: list[str] = []
    ranks = dict.fromkeys(tasks, 0)
    for row in rows:
        task = _task(row, path)
        if (config.tasks and task not in config.tasks) or ranks[task] >= config.limit:
            continue
        text, ids = _encode(row, tokenizer)
        if context is not None and len(ids) + config.max_new_tokens > context:
            left_out.append(f"{task}: a prompt of {len(ids)} tokens does not fit into a context of {context}")
            continue
        used.append(Prompt(len(used), task, ranks[task], text, tuple(ids)))
        ranks[task] += 1
    if not used:
        raise ModelError(f"no prompt of {path} fits into the target's context of {context}")
    return used, left_out


def check_prompts(path: Path | None) -> None:
    """Before anything is loaded for them. Raises as ``read_prompts`` for a file that cannot be read, or is not made of
    such lines."""
    for _ in _rows(path or HELD_OUT):
        pass


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}", hint="give JSON lines with prompts") from error
    except UnicodeDecodeError as error:
        raise ModelError(f"{path} is not UTF-8 text") from error
    if not any(line.strip() for line in lines):
        raise ModelError(f"{path} has no prompts", hint="give JSON lines with prompts")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ModelError(f"{path}, line {number}, is not JSON") from error
        if not isinstance(row, dict) or not _source(row)[1]:
            hint = f"each line has one of {', '.join(_KEYS)}"
            raise ModelError(f"{path}, line {number}, has no prompt", hint=hint)
        yield row


def _source(row: dict[str, Any]) -> tuple[str, str]:
    """The key of a line's prompt, and the prompt; empty where there is none."""
    for key in _KEYS:
        value = row.get(key)
        if key == "turns" and isinstance(value, list) and value:
            value = value[0]
        if isinstance(value, str) and value.strip():
            return key, value
    return "", ""


def _task(row: dict[str, Any], path: Path) -> str:
    """Spec-Bench names it ``task``, its original lines ``category``; else the file is one task."""
    names = (row.get("task"), row.get("category"))
    return next((name for name in names if isinstance(name, str) and name), path.stem)


def _encode(row: dict[str, Any], tokenizer: Tokenizer) -> tuple[str, list[int]]:
    key, text = _source(row)
    if key in ("prompt", "text"):
        return text, tokenizer.encode(text)
    if tokenizer.chat_template is None:
        text = f"Question: {text}\nAnswer:"
        return text, tokenizer.encode(text)
    text = tokenizer.chat([{"role": "user", "content": text}])
    return text, tokenizer.encode(text, add_special=False)
