"""Texts for calibration and measurement: from files to rows of token ids."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantspec.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor

_BUNDLED = Path(__file__).parent / "quantize" / "data"
CALIBRATION, HELD_OUT = _BUNDLED / "calibration.jsonl", _BUNDLED / "held_out.jsonl"
DOC_BREAK = "<|doc|>"


def load_texts(path: Path) -> list[str]:
    """The documents of a ``.jsonl`` file (``text``, or ``question`` and ``answer``), or of a text file split at
    ``<|doc|>`` lines. Raises ``ModelError`` when the file is missing, empty or not of that form."""
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"cannot read text from {path}: {error}") from error
    if path.suffix == ".jsonl":
        lines = enumerate(content.split("\n"), start=1)
        texts = [_row_text(path, number, line) for number, line in lines if line.strip()]
    else:
        texts = content.split(DOC_BREAK)
    texts = [text.strip() for text in texts if text.strip()]
    if not texts:
        raise ModelError(f"{path} holds no text")
    return texts


def _row_text(path: Path, number: int, line: str) -> str:
    hint = 'each line must be {"text": ...} or {"question": ..., "answer": ...}'
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ModelError(f"{path}, line {number}: not JSON", hint=hint) from error
    if isinstance(row, dict) and isinstance(row.get("question"), str) and isinstance(row.get("answer"), str):
        return f"Question: {row['question'].strip()}\nAnswer: {row['answer'].strip()}"
    if isinstance(row, dict) and isinstance(row.get("text"), str):
        return str(row["text"])
    raise ModelError(f"{path}, line {number}: no text", hint=hint)


def load_tokenizer(folder: Path) -> Any:
    """``tokenizer.json`` of a model folder. Raises ``ModelError`` when there is none or it is damaged."""
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ModelError(f"no tokenizer.json in {folder}", hint="save the model's fast tokenizer into its folder")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise ModelError(f"{path} is not a tokenizer: {str(error).splitlines()[0]}") from error


def token_rows(
    texts: Sequence[str], tokenizer: Any, eos_id: int | None, seq_len: int, num_rows: int, seed: int | None
) -> Tensor:
    """Rows of token ids ``[rows, seq_len]`` int64: documents shuffled by ``seed`` (None: kept in order), each encoded
    with its special tokens and closed by ``eos_id``, joined end to end and cut. At most ``num_rows``; a short text
    gives fewer rows, and less than ``seq_len`` tokens one shorter row."""
    import torch

    order = list(texts)
    if seed is not None:
        random.Random(seed).shuffle(order)
    ids: list[int] = []
    for text in order:
        ids += tokenizer.encode(text).ids + ([] if eos_id is None else [eos_id])
        if len(ids) >= seq_len * num_rows:
            break
    if len(ids) < 2:
        raise ModelError("the text is too short: fewer than two tokens")
    rows = min(num_rows, len(ids) // seq_len)
    flat = torch.tensor(ids, dtype=torch.int64)
    return flat[: rows * seq_len].view(rows, seq_len) if rows else flat[None]
