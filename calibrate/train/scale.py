"""Measure how a drafter's acceptance grows with training data and depth, fit the law, and say which drafter to train.

A grid of EAGLE-3 heads is trained one after the other; every finished one is kept, so that the same command goes on
where it stopped, and a larger grid adds to a smaller one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from statistics import median
from typing import Any

import numpy as np

from quantspec.calibrate.train import scale_report
from quantspec.calibrate.train.config import Eagle3Config, ScaleConfig
from quantspec.calibrate.train.measure import draft_greedy_texts
from quantspec.calibrate.train.methods import eagle3
from quantspec.calibrate.train.rollout import Rollouts, fingerprint, read_rollouts
from quantspec.calibrate.train.scaling import FACTOR, Interval, Law, Point, fit, ratio, refuse_far, refuse_few
from quantspec.errors import ModelError, UsageError
from quantspec.models.atomic import make_folder, write_json

Run = Mapping[str, Any]
_FREE = {"out", "layers", "held_out", "features", "fp8", "optim", "run"}
"""Fields in which one call may differ from the next without making other heads."""


def run(config: ScaleConfig) -> dict[str, Any]:
    """Train what is missing of the grid and write `scale.json`, `scale.html` and, where matplotlib is, `scale.png`.

    Returns the runs, the law and the best drafter within the budgets. Raises `UsageError` for a grid that fits no law,
    and, once all is written, for a budget beyond what the law can say.
    """
    if config.held_out is None:
        raise UsageError("a law is fitted to acceptance on held-out text", hint="name it with --held-out")
    _check(config)
    held, texts = read_rollouts(config.held_out), read_rollouts(config.rollouts)
    if held.model != fingerprint(config.base):
        hint = "make held-out rollouts with the base itself"
        raise ModelError(f"{config.held_out} was not written by {config.base}", hint=hint)
    make_folder(config.out)
    _hold_to(config)
    grid = [
        (layers, tokens) for layers in sorted(set(config.grid_layers)) for tokens in sorted(set(config.grid_tokens))
    ]
    runs = [_run(config, layers, tokens, texts, held) for layers, tokens in grid]
    law = fit([Point(each["tokens"], each["parameters"], each["acceptance_length"], each["error"]) for each in runs])
    record: dict[str, Any] = {"runs": runs, "law": law_record(law)}
    try:
        record["drafters"] = drafters(law, runs, config)
    except UsageError as error:
        record["refused"] = str(error)
        raise
    finally:
        write_json(config.out / "scale.json", record)
        scale_report.write(config.out, record, law)
    return record | {"out": str(config.out)}


def _check(config: ScaleConfig) -> None:
    """Refuse, before anything is trained, what would be refused after."""
    tokens, layers = config.grid_tokens, config.grid_layers
    if min((*tokens, *layers), default=0) < 1:
        raise UsageError("a grid needs tokens and layers above 0", hint="give --grid-tokens and --grid-layers")
    refuse_few(len(set(tokens)) * len(set(layers)), len(set(tokens)), len(set(layers)))
    if config.start is not None:
        raise UsageError("a law is of heads that start from nothing", hint="leave --start out")
    if config.budget_tokens:
        refuse_far("training tokens", config.budget_tokens, tokens)


def _hold_to(config: ScaleConfig) -> None:
    """Raise a `UsageError` if the folder holds runs with other settings."""
    own = {field.name for field in fields(Eagle3Config)} - _FREE
    settings = {name: value for name, value in asdict(config).items() if name in own} | {
        f"optim.{name}": value for name, value in asdict(config.optim).items() if name not in ("steps", "minutes")
    }
    settings, path = json.loads(json.dumps(settings, default=str)), config.out / "settings.json"
    if not path.exists():
        write_json(path, settings)
    before = json.loads(path.read_text())
    for name, value in settings.items():
        if before.get(name) != value:
            hint = f"it was {before.get(name)!r}; name another folder"
            raise UsageError(f"{config.out} holds runs with another {name} than {value!r}", hint=hint)


def _run(config: ScaleConfig, layers: int, tokens: int, texts: Rollouts, held: Rollouts) -> Run:
    """Train and measure one head of the grid, unless it is there."""
    folder = config.out / f"layers-{layers}-tokens-{tokens}"
    path = folder / "result.json"
    if path.exists():
        done: Run = json.loads(path.read_text())
        return done
    rows = config.optim.batch * config.optim.accumulate
    steps = max(1, round(tokens * len(texts) / len(texts.ids) / rows))
    head = Eagle3Config(**{field.name: getattr(config, field.name) for field in fields(Eagle3Config)})
    optim = replace(config.optim, steps=steps, minutes=0.0)
    trained = eagle3.run(replace(head, out=folder, layers=layers, held_out=None, optim=optim))
    stats = draft_greedy_texts(config.base, "eagle3", folder, held)
    length, error = ratio([each.new_tokens - 1 for each in stats], [each.target_forwards for each in stats])
    result = {
        "layers": layers,
        "tokens": trained["tokens"],
        "parameters": trained["parameters"],
        "steps": trained["steps"],
        "acceptance_length": length,
        "error": error,
        "draft_ms": 1e3 * median(each.draft_seconds / max(1, each.target_forwards) for each in stats),
        "verify_ms": 1e3 * median(each.verify_seconds / max(1, each.target_forwards) for each in stats),
    }
    write_json(path, result)
    (folder / "state.safetensors").unlink(missing_ok=True)
    return result


def law_record(law: Law) -> dict[str, Any]:
    """A law as JSON."""
    terms = {name: asdict(term) for name, term in zip("abc", law.intervals(), strict=True)}
    return {
        "form": "a + b ln(tokens) + c ln(parameters)",
        **terms,
        "left_out_error": law.left_out_error,
        "explained": law.explained,
        "residual": law.noise,
        "standard_error": law.error,
    }


def drafters(law: Law, runs: Sequence[Run], config: ScaleConfig) -> list[dict[str, Any]]:
    """Every depth within the budgets, the fastest first: its predicted length and tokens per second, with intervals.

    Depths between and beyond those measured count too, as far as the law reaches. Raises `UsageError` where nothing
    fits, or a budget lies beyond the law.
    """
    layers = np.array([each["layers"] for each in runs], float)
    size, base_size = np.polyfit(layers, [each["parameters"] for each in runs], 1)
    per_layer, least = _line(layers, np.array([each["draft_ms"] for each in runs]))
    verify = median(each["verify_ms"] for each in runs)
    tokens = config.budget_tokens or max(each["tokens"] for each in runs)
    largest = max(each["parameters"] for each in runs)
    bound = config.budget_parameters or largest
    # A budget that the law cannot reach is refused, though a smaller drafter might do.
    law.predict(tokens, max(bound, min(each["parameters"] for each in runs)))
    found = []
    for depth in range(1, 1 + int((FACTOR * largest - base_size) / size)):
        parameters, draft = round(base_size + size * depth), float(least + per_layer * depth)
        if parameters > bound or (config.budget_draft_ms and draft > config.budget_draft_ms):
            break
        length = law.predict(tokens, parameters)
        speed = Interval(*(1e3 * each / (draft + verify) for each in asdict(length).values()))
        found.append(
            {
                "layers": depth,
                "parameters": parameters,
                "tokens": tokens,
                "draft_ms": draft,
                "acceptance_length": asdict(length),
                "tokens_per_second": asdict(speed),
            }
        )
    if not found:
        hint = f"one layer has {base_size + size:.4g} parameters and takes {least + per_layer:.3g} ms"
        raise UsageError("no drafter is as small as the budget asks", hint=hint)
    return sorted(found, key=lambda each: -each["tokens_per_second"]["value"])


def _line(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Slope (at least 0: a deeper head is not faster) and value at 0 of the line through times."""
    slope = max(0.0, float(np.polyfit(x, y, 1)[0]))
    return slope, float(y.mean() - slope * x.mean())
