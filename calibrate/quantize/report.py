"""What a run leaves to read: the closing comparison, bytes by part, and the report's files."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from quantspec.calibrate.evaluate.config import PositionBin
from quantspec.calibrate.evaluate.scoring import (
    STREAMED,
    Comparison,
    Scores,
    compare,
    scores_as_run,
    scores_streamed,
)
from quantspec.calibrate.quantize.config import (
    AcceptanceReport,
    KVCacheReport,
    LayerResult,
    PartBytes,
    QuantizeConfig,
    QuantizeReport,
    Sensitivity,
    TextReport,
    Trial,
)
from quantspec.calibrate.quantize.stream import StreamedModel
from quantspec.engine.engine import is_out_of_memory
from quantspec.errors import QuantSpecError
from quantspec.kernels.memory import available_bytes
from quantspec.models.base import CausalModel
from quantspec.models.cache import kv_format
from quantspec.models.config import ModelConfig
from quantspec.models.load import load_model
from quantspec.models.tensors import TensorStore
from quantspec.numerics.scheme import KVCacheDtype

REPORT, PAGE = "quantization_report.json", "quantization_report.html"
_PARTS = {
    "embedding": "model.embed_tokens.",
    "LM head": "lm_head.",
    "attention": ".self_attn.",
    "MLP": ".mlp.",
}
_SCALES = (".weight_scale", ".weight_zero_point", ".scales", ".qzeros", ".g_idx")

Tell = Callable[[str], None]


def against_parent(config: QuantizeConfig, folder: Path, ids: Tensor, tell: Tell) -> dict[str, Any]:
    """The report's fields of held-out text ``ids [S, T]``: the parent streamed from disk in fp32, the result in
    ``folder`` on the kernels that generate, so that what *they* round counts too."""

    def measure(after: Scores) -> Comparison:
        return compare(ids, scores_streamed(StreamedModel(config.model, config.device), ids), after)

    backend, found = _measured(config, folder, ids, ("auto",), measure, tell)
    return {
        "perplexity_before": found.perplexity_before,
        "perplexity_after": found.perplexity_after,
        "kl": found.kl,
        "top1_agreement": found.top1_agreement,
        "eval_tokens": found.nll_before.numel(),
        "eval_backend": backend,
        "by_position": found.by_position(),
    }


def of_kv_cache(config: QuantizeConfig, folder: Path, ids: Tensor, tell: Tell) -> KVCacheReport | None:
    """What keys and values in the bits that were asked for cost the result on ``ids [S, T]``."""
    dtype = config.kv_cache_dtype
    if dtype == "auto":
        return None
    _, found = _measured(config, folder, ids, ("auto", dtype), partial(compare, ids), tell)
    model = ModelConfig.load(folder)
    form = kv_format(model, dtype)
    assert form is not None
    return KVCacheReport(
        dtype=dtype,
        bytes_per_token=model.num_layers * 2 * model.num_kv_heads * form.row_bytes,
        perplexity_before=found.perplexity_before,
        perplexity_after=found.perplexity_after,
        kl=found.kl,
        top1_agreement=found.top1_agreement,
    )


def _measured(
    config: QuantizeConfig,
    folder: Path,
    ids: Tensor,
    kinds: Sequence[KVCacheDtype],
    measure: Callable[..., Comparison],
    tell: Tell,
) -> tuple[str, Comparison]:
    """What computes, and ``measure`` of the model's scores with each of ``kinds`` of cache, as `generate` would load
    it. From disk in fp32 where it does not fit or has no kernels, and in the place of the reference, whose arithmetic
    that is, at more rows a second."""
    room = available_bytes() if config.device == "cpu" else None
    models: list[CausalModel] = []
    try:
        if room is not None and 2 * len(kinds) * TensorStore(folder).nbytes() > room:
            raise MemoryError
        models += [load_model(folder, device=config.device, kv_cache_dtype=kind) for kind in kinds]
        if not models[0].backend.startswith("reference"):
            return models[0].backend, measure(*(scores_as_run(model, ids) for model in models))
    except (QuantSpecError, MemoryError, RuntimeError) as error:
        if not (isinstance(error, QuantSpecError) or is_out_of_memory(error)):
            raise
        reason = str(error) if isinstance(error, QuantSpecError) else "it does not fit into memory"
        tell(f"the result is measured in fp32, layer by layer from disk: {reason}")
    models.clear()
    gc.collect()
    streamed = (StreamedModel(folder, config.device, kind) for kind in kinds)
    return STREAMED, measure(*(scores_streamed(model, ids) for model in streamed))


def settings(config: Any) -> dict[str, Any]:
    """All options by name, those of nested dataclasses too, as JSON has them."""
    found: dict[str, Any] = {}
    for one in fields(config):
        value = getattr(config, one.name)
        if is_dataclass(value):
            found |= settings(value)
        else:
            plain = value is None or isinstance(value, bool | int | float | str)
            found[one.name] = value if plain else list(value) if isinstance(value, tuple) else str(value)
    return found


def text_report(source: object, ids: Tensor | None) -> TextReport | None:
    """Of rows ``ids [S, T]`` from ``source`` (None: what is bundled)."""
    return None if ids is None else TextReport("bundled" if source is None else str(source), *ids.shape)


def bytes_by_part(before: TensorStore, after: TensorStore) -> list[PartBytes]:
    """Where the bytes are, in the order of a forward."""
    sizes = [{part: [0, 0] for part in (*_PARTS, "norms and biases")} for _ in range(2)]
    for store, size in zip((before, after), sizes, strict=True):
        for name in store:
            info = store.info(name)
            counted = size[part_of(name)]
            counted[0] += info.end - info.begin
            counted[1] += (info.end - info.begin) * name.endswith(_SCALES)
    return [PartBytes(part, old[0], *sizes[1][part]) for part, old in sizes[0].items()]


def part_of(name: str) -> str:
    """Which part of a model a stored tensor belongs to."""
    found = next((part for part, mark in _PARTS.items() if mark in name), None)
    return found if found and not name.endswith((".bias", "_norm.weight")) else "norms and biases"


def read_report(path: Path) -> tuple[str, QuantizeReport]:
    """The fingerprint of a finished run and its report. Raises ``OSError``, ``ValueError``, ``KeyError`` or
    ``TypeError`` for a file that is none."""
    content = json.loads(path.read_text())
    seal, kv = content.pop("fingerprint"), content["kv_cache"]
    lists = {
        "layers": LayerResult,
        "sensitivity": Sensitivity,
        "tried": Trial,
        "by_position": PositionBin,
        "bytes_by_part": PartBytes,
    }
    content |= {name: [kind(**one) for one in content.get(name, ())] for name, kind in lists.items()}
    content |= {name: text and TextReport(**text) for name in ("calibration", "held_out") for text in (content[name],)}
    accepted = content["acceptance"]
    content["acceptance"] = accepted and AcceptanceReport(**accepted)
    return seal, QuantizeReport(**content | {"kv_cache": kv and KVCacheReport(**kv)})
