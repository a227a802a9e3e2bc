"""What drafters are measured on: the user's prompts, or a few bundled ones of each kind of task in Spec-Bench."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from quantspec.calibrate.documents import load_prompts
from quantspec.errors import ModelError
from quantspec.models.tokenizer import Tokenizer

BUNDLED = Path(__file__).parent / "data" / "prompts.jsonl"
MOST = 64
"""Prompts that are read of a file: more would not be reached in time."""
_BEGINNING = 64  # tokens of a plain text, which the model then goes on with


def read_prompts(
    path: Path | None, tokenizer: Tokenizer, context: int, new_tokens: int, note: Callable[[str], None]
) -> list[tuple[int, ...]]:
    """Token ids of each prompt that leaves room for ``new_tokens`` within the context; ``note`` hears of the others.

    Raises ``ModelError`` for a file that cannot be read or holds no prompt that fits.
    """
    chat = tokenizer.chat if tokenizer.chat_template is not None else None
    found = []
    for asked in load_prompts(path or BUNDLED, None, chat)[:MOST]:
        ids = tokenizer.encode(asked.text, add_special=not asked.templated)
        found.append(tuple(ids[:_BEGINNING] if asked.begun else ids))
    kept = [ids for ids in found if 0 < len(ids) <= context - new_tokens]
    name = "the bundled set" if path is None else str(path)
    if not kept:
        raise ModelError(
            f"no prompt of {name} leaves room for {new_tokens} new tokens in a context of {context}",
            hint="give shorter prompts with --prompts, or lower --max-new-tokens",
        )
    if len(kept) < len(found):
        note(f"left out {len(found) - len(kept)} of {len(found)} prompts: longer than the context of {context} tokens")
    return kept
