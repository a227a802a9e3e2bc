"""``--method auto``: the method whose first results move the next-token distributions least.

All methods go through the model side by side, layer by layer: at some layers each rounds a copy of the weights, on
states of its own; through the others all pass unrounded. What remains is the mean KL divergence from the exact model,
on rows of the calibration text that no method has seen; the closing report is on other text. The first layer is
everybody's, and its times tell who could finish the whole model within the budget, and how many layers there is time
for. A rotation of the model is left out of the trials: it is the same for all methods.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from quantspec.calibrate.quantize.config import LayerResult, MethodName, QuantizeConfig, Trial
from quantspec.calibrate.quantize.evaluate import batches, log_probs
from quantspec.calibrate.quantize.layer import PROJECTIONS, DecoderLayer
from quantspec.calibrate.quantize.pipeline import LayerPipeline
from quantspec.calibrate.quantize.plan import Plan
from quantspec.calibrate.quantize.stream import StreamedModel
from quantspec.errors import UsageError
from quantspec.models import atomic
from quantspec.numerics.measures import kl_divergence

CANDIDATES: tuple[MethodName, ...] = ("rtn", "mse", "awq", "gptq", "learned")
"""What is tried, the quickest first. NF4 is not: few engines run it."""
_FIT_ROWS, _KL_ROWS = 32, 4  # calibration rows that methods are fitted to in trials, and others that tell them apart
_KL_POSITIONS = 128  # whose logits stand in memory at once
_TRIAL_SHARE = 1 / 3  # of the budget, at most, goes into choosing

Tell = Callable[[str], None]
_now = time.perf_counter


@dataclass
class _Candidate:
    """A method on its way through the model: its states on the rows it is fitted to, ``fit [S, T, H]``, and on those
    that it is measured on, ``seen``; the seconds that its layers took."""

    name: MethodName
    pipeline: LayerPipeline
    fit: Tensor
    seen: Tensor
    layer_seconds: list[float]


def choose(
    config: QuantizeConfig, plan: Plan, model: StreamedModel, ids: Tensor, file: Path, tell: Tell
) -> tuple[MethodName, list[Trial]]:
    """The method for ``config``, and what was tried, on the calibration text ``ids [S, T]``. ``file`` keeps both, so
    that a run that goes on does not choose anew. Raises ``UsageError``: too little text."""
    if file.is_file():
        kept = json.loads(file.read_text())
        return kept["method"], [Trial(**one) for one in kept["tried"]]
    tried = _try_all(config, plan, model, ids)
    for one in tried:
        tell(f"auto: {one.method}, {one.outcome}")
    measured = [one for one in tried if one.kl is not None and one.refusal is None]
    fitting = [one for one in tried if one.refusal is None] or tried[:1]
    # Without time to measure, the last that would finish: what costs more is mostly better.
    best = min(measured, key=lambda one: one.kl or 0.0) if measured else fitting[-1]
    tell(f"auto: taking {best.method}" + ("" if measured else ", unmeasured: the time budget leaves none for trials"))
    atomic.write_json(file, {"method": best.method, "tried": [asdict(one) for one in tried]})
    return best.method, tried


@torch.no_grad()
def _try_all(config: QuantizeConfig, plan: Plan, model: StreamedModel, ids: Tensor) -> list[Trial]:
    if len(ids) < 2:
        raise UsageError("--method auto needs two rows of calibration text", hint="give more text or --num-samples")
    began, budget, layers = _now(), 60 * config.time_budget, model.config.num_layers
    apart = min(_KL_ROWS, len(ids) // 2)
    exact, fit = model.embed(ids[:apart]), model.embed(ids[apart:][:_FIT_ROWS])
    tried: dict[str, Trial] = {}
    running: list[_Candidate] = []
    sample, dense_seconds = frozenset([0]), 0.0
    for index in range(layers):
        layer = model.layer(index)
        if index == 0:
            running = _first_layer(config, plan, model, layer, fit, exact, tried)
            running = [one for one in running if _fits(one, config, len(ids), layers, budget, tried)]
        else:
            for one in running:
                if index in sample:
                    _round_layer(one, config, layer, index, model)
                else:
                    _pass(layer, one.fit, one.seen, device=config.device)
        started = _now()
        _pass(layer, exact, device=config.device)
        dense_seconds = (_now() - started) * (1 + sum(1 + len(one.fit) / apart for one in running))
        if index == 0:
            left = _TRIAL_SHARE * budget - (_now() - began) - dense_seconds * (layers - 1)
            if left < 0 or not running:
                return [tried.get(name) or Trial(name, refusal="no time to try it") for name in CANDIDATES]
            sample = _spread(layers, 1 + int(left / max(1e-9, sum(one.layer_seconds[0] for one in running))))
    for one, kl in zip(running, _divergences(model, exact, [one.seen for one in running]), strict=True):
        tried[one.name] = replace(tried[one.name], kl=kl, layers=len(sample), seconds=round(sum(one.layer_seconds), 3))
    return [tried[name] for name in CANDIDATES]


def _first_layer(
    config: QuantizeConfig,
    plan: Plan,
    model: StreamedModel,
    layer: DecoderLayer,
    fit: Tensor,
    exact: Tensor,
    tried: dict[str, Trial],
) -> list[_Candidate]:
    """All candidates past the first layer, as far as a share of the budget goes; ``tried`` hears of all."""
    limit = _now() + _TRIAL_SHARE * 60 * config.time_budget
    running: list[_Candidate] = []
    for name in CANDIDATES:
        try:
            own = replace(config, method=name)
        except UsageError as error:
            tried[name] = Trial(name, refusal=str(error))
            continue
        if running and _now() > limit:
            tried[name] = Trial(name, refusal="no time to try it")
            continue
        pipeline = LayerPipeline(own, plan, None, _ignore)
        rows = min(len(fit), pipeline.num_samples)
        one = _Candidate(name, pipeline, fit[:rows].clone(), exact.clone(), [])
        _round_layer(one, own, layer, 0, model)
        tried[name] = Trial(name, layers=1, seconds=round(one.layer_seconds[0], 3))
        running.append(one)
    return running


def _fits(
    one: _Candidate, config: QuantizeConfig, rows: int, layers: int, budget: float, tried: dict[str, Trial]
) -> bool:
    """Whether the candidate would be through the whole model in what the trials leave of the budget, by its first
    layer; without calibration text time does not grow with the rows."""
    more = min(rows, one.pipeline.num_samples) / len(one.fit) if one.pipeline.calibrated else 1.0
    needed = one.layer_seconds[0] * layers * more
    if needed <= (1 - _TRIAL_SHARE) * budget:
        return True
    tried[one.name] = replace(tried[one.name], refusal=f"it would take about {needed / 60:.1f} minutes")
    return False


def _round_layer(
    one: _Candidate, config: QuantizeConfig, layer: DecoderLayer, index: int, model: StreamedModel
) -> None:
    """Round a copy of ``layer`` and move the candidate's states past it."""
    started = _now()
    own = DecoderLayer(model.config, index, dict(layer.weights))
    one.pipeline.quantize(own, index, model.store, one.fit if one.pipeline.calibrated else None)
    one.layer_seconds.append(_now() - started)
    rounded = PROJECTIONS if config.activation_bits == 8 else ()
    _pass(DecoderLayer(model.config, index, own.weights, rounded=rounded), one.seen, device=config.device)


def _pass(layer: DecoderLayer, *states: Tensor, device: str) -> None:
    """Move states ``[S, T, H]`` past ``layer``, in place."""
    for hidden in states:
        for batch in batches(hidden):
            batch.copy_(layer.forward(batch.to(device)))


def _spread(layers: int, count: int) -> frozenset[int]:
    """``count`` layers, evenly, the first among them."""
    count = min(count, layers)
    return frozenset(number * layers // count for number in range(count))


def _divergences(model: StreamedModel, exact: Tensor, others: Sequence[Tensor]) -> list[float]:
    """Mean KL(exact || other) in nats of the next token, from states ``[S, T, H]`` behind the last layer."""
    head, totals = model.head(), [0.0] * len(others)
    flat = [model.final_norm(states).flatten(0, 1).split(_KL_POSITIONS) for states in (exact, *others)]
    for parts in zip(*flat, strict=True):
        before, *after = (part.to(model.device) for part in parts)
        log_before = log_probs(before, head)
        for number, states in enumerate(after):
            totals[number] += float(kl_divergence(log_before, log_probs(states, head)).double().sum())
    return [total / (exact.shape[0] * exact.shape[1]) for total in totals]


def _ignore(result: LayerResult) -> None:
    """Trials' layers are nobody's result."""
