"""`quantspec eval`: a model on text and on tasks, on the kernels that generate with it, alone or against its parent."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from math import exp
from pathlib import Path
from typing import Any

from torch import Tensor

from quantspec.calibrate import data
from quantspec.calibrate.evaluate.config import EvalConfig, EvalReport, ParentReport
from quantspec.calibrate.evaluate.scoring import (
    STREAMED,
    Comparison,
    Scores,
    by_position,
    compare,
    interval,
    losses,
    perplexity,
    scores_as_run,
    scores_streamed,
)
from quantspec.calibrate.quantize.stream import StreamedModel
from quantspec.engine.build import build
from quantspec.engine.engine import Engine, is_out_of_memory
from quantspec.errors import ModelError, UsageError
from quantspec.kernels.memory import available_bytes
from quantspec.models.atomic import verify_manifest
from quantspec.models.load import load_model
from quantspec.models.resolve import resolve
from quantspec.models.tensors import open_store
from quantspec.models.tokenizer import Tokenizer

_WHOLE = 2**40  # rows: more than any text has

OnRow = Callable[[int, int], None]
"""Hears how many rows of how many are measured."""


def evaluate(config: EvalConfig, notice: Callable[[str], None], on_row: OnRow | None = None) -> EvalReport:
    """Measure what ``config`` names; ``notice`` gets a line for each thing that is not as asked for.

    Raises ``UsageError`` or ``ModelError`` for models that cannot be loaded or do not go together and for text that is
    missing or too short, ``Unavailable`` for tasks without lm-evaluation-harness.
    """
    started, notes = time.perf_counter(), []

    def note(line: str) -> None:
        notes.append(line)
        notice(line)

    if config.tasks:
        from quantspec.calibrate.evaluate.tasks import require_harness

        require_harness()
    texts = data.load_texts(config.data or data.HELD_OUT) if _has_text(config) else None
    engine = build(config.engine(), note)
    parent = None if config.against is None else _parent(config, engine, note)
    found: dict[str, Any] = {}
    if texts is not None:
        found = _on_text(config, engine, texts, parent, on_row)
    if config.tasks:
        from quantspec.calibrate.evaluate.tasks import run_tasks

        found["tasks"] = run_tasks(config, engine)
    return EvalReport(
        model=config.model,
        backend=engine.model.backend,
        kv_cache_dtype=config.kv_cache_dtype,
        weight_bytes=engine.weight_bytes,
        settings={one.name: _plain(getattr(config, one.name)) for one in fields(config)},
        seconds=time.perf_counter() - started,
        notes=notes,
        **found,
    )


def _has_text(config: EvalConfig) -> bool:
    return config.data is not None or not config.tasks


def _plain(value: Any) -> Any:
    """A setting as JSON has it."""
    return str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value


@dataclass(frozen=True)
class _Parent:
    backend: str
    max_positions: int
    scores: Callable[[Tensor], Scores]
    """Of rows ``[S, T]``."""


def _parent(config: EvalConfig, engine: Engine, notice: Callable[[str], None]) -> _Parent:
    """Load the parent. Raises ``UsageError`` where its tokens are not the model's."""
    assert config.against is not None
    folder = resolve(config.against)
    assert engine.tokenizer is not None
    if Tokenizer(folder).fingerprint() != engine.tokenizer.fingerprint():
        raise UsageError(
            f"{config.against} has another tokenizer than {config.model}: their distributions cannot be compared",
            hint="give the model that it was made from",
        )
    room = available_bytes()
    try:
        # fp32 copies of 16-bit weights
        if room is not None and 2 * open_store(folder).nbytes() > room and config.device == "cpu":
            raise MemoryError
        model = load_model(folder, device=config.device, mode=config.mode)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        notice(f"{config.against} does not fit into memory: it is read from disk layer by layer")
        verify_manifest(folder)
        streamed = StreamedModel(folder, config.device)
        _same_vocabulary(config, engine, streamed.config.vocab_size)
        return _Parent(STREAMED, streamed.config.max_positions, partial(scores_streamed, streamed))
    for line in model.notes:
        notice(f"{config.against}: {line}")
    _same_vocabulary(config, engine, model.vocab_size)
    return _Parent(model.backend, model.max_positions, partial(scores_as_run, model))


def _same_vocabulary(config: EvalConfig, engine: Engine, size: int) -> None:
    if size != engine.model.vocab_size:
        raise UsageError(
            f"{config.against} has {size} tokens in its vocabulary, and {config.model} {engine.model.vocab_size}",
            hint="give the model that it was made from",
        )


def _on_text(
    config: EvalConfig, engine: Engine, texts: list[str], parent: _Parent | None, on_row: OnRow | None
) -> dict[str, Any]:
    """The report's fields that come of text."""
    length = min(config.seq_len, engine.max_context, *([parent.max_positions] if parent else []))
    ids = _rows(config, engine, texts, length)
    told = None if on_row is None else lambda done: on_row(done, len(ids))
    scores = scores_as_run(engine.model, ids, told)
    found: dict[str, Any] = {}
    if parent is None:
        nll = losses(ids, scores)
        found["by_position"] = by_position(nll)
    else:
        compared = compare(ids, parent.scores(ids), scores)
        nll = compared.nll_after
        found |= {"parent": _parent_report(config, parent.backend, compared), "by_position": compared.by_position()}
    return found | {
        "perplexity": perplexity(nll),
        "perplexity_95": _exp(interval(nll)),
        "rows": len(ids),
        "tokens": nll.numel(),
        "data": str(config.data or "the bundled held-out set"),
    }


def _rows(config: EvalConfig, engine: Engine, texts: list[str], length: int) -> Tensor:
    assert engine.tokenizer is not None
    eos = next(iter(engine.tokenizer.eos_ids), None)
    tokenizer = data.load_tokenizer(engine.tokenizer.folder)
    ids = data.token_rows(texts, tokenizer, eos, length, config.num_samples or _WHOLE, None)
    if int(ids.max()) >= engine.model.vocab_size:
        raise ModelError(f"the tokenizer of {config.model} has tokens that the model's vocabulary lacks")
    return ids


def _parent_report(config: EvalConfig, backend: str, compared: Comparison) -> ParentReport:
    change = compared.nll_after.double() - compared.nll_before.double()
    return ParentReport(
        model=str(config.against),
        backend=backend,
        perplexity=compared.perplexity_before,
        ratio=perplexity(change),
        ratio_95=_exp(interval(change)),
        kl=compared.kl,
        kl_95=interval(compared.divergence),
        top1_agreement=compared.top1_agreement,
        top1_agreement_95=interval(compared.agreement),
    )


def _exp(bounds: list[float] | None) -> list[float] | None:
    return None if bounds is None else [exp(bound) for bound in bounds]
