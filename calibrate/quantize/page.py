"""`quantization_report.html`: what a run did to a model, on one page that needs nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from pathlib import PurePath

from quantspec.calibrate.evaluate.page import by_position
from quantspec.calibrate.page import (
    GRAY,
    LINE,
    Cell,
    count_bytes,
    document,
    facts,
    figure,
    heat_map,
    paragraph,
    section,
    svg,
    table,
    tiles,
)
from quantspec.calibrate.quantize.config import AcceptanceReport, LayerResult, PartBytes, QuantizeReport

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_WORST = 10
_LEFT = 74


def html(report: QuantizeReport) -> str:
    """The page of one run."""
    parts = [_summary(report), tiles(_figures(report)), _layers(report)]
    if report.by_position:
        parts.append(by_position(report.by_position))
    parts.append(_bytes(report))
    if report.kv_cache is not None:
        parts.append(_kv_cache(report))
    if report.tried:
        rows = [(one.method, one.outcome) for one in report.tried]
        parts.append(section("What method auto tried", table(("method", "what came out"), rows, (0, 1))))
    if report.acceptance is not None:
        parts.append(_acceptance(report.acceptance))
    if report.sensitivity:
        parts.append(_sensitivity(report))
    parts += [_fallbacks(report), _text(report), section("Settings", facts(report.settings)), _every_layer(report)]
    return document("Quantization report", parts)


def _summary(report: QuantizeReport) -> str:
    settings = report.settings
    bits = "mixed widths" if settings.get("bits_per_weight") else f"{settings.get('bits')} bits"
    group = settings.get("group_size")
    grouped = "one scale per output channel" if group == -1 else f"groups of {group}"
    return paragraph(
        f"{PurePath(str(settings.get('model'))).name} by {settings.get('method')}, {bits}, {grouped}: "
        f"{report.out}, in {report.seconds:,.0f} s."
    )


def _figures(report: QuantizeReport) -> dict[str, str]:
    shown = {
        "weights": f"{count_bytes(report.bytes_before)} to {count_bytes(report.bytes_after)}",
        "smaller by": f"{report.bytes_before / report.bytes_after:.2f} times",
    }
    if report.bits_per_weight is not None:
        shown["bits per weight"] = f"{report.bits_per_weight:.3f}"
    if report.perplexity_before is not None and report.perplexity_after is not None:
        change = report.perplexity_after / report.perplexity_before - 1
        shown["perplexity"] = f"{report.perplexity_before:.3f} to {report.perplexity_after:.3f} ({change:+.2%})"
    if report.kl is not None:
        shown["KL divergence"] = f"{report.kl:.4f} nats"
    if report.top1_agreement is not None:
        shown["top-1 agreement"] = f"{report.top1_agreement:.2%}"
    return shown


def _layers(report: QuantizeReport) -> str:
    """Which layers hurt: a map of all, and a table of the worst."""
    worst = sorted(report.layers, key=lambda one: -one.error)[:_WORST]
    rows = [(one.name, f"{one.error:.3e}", _damping(one)) for one in worst]
    caption = "Relative error of each linear layer, on a logarithmic scale; a ring marks a fallback or more damping"
    return section(
        "Which layers hurt",
        figure(caption, _map(report.layers)),
        paragraph(
            "The mean square error of a layer's outputs on the calibration text, over their mean square (methods that "
            "read no text: of its weights)."
        ),
        table(("largest errors", "error", "damping"), rows),
    )


def _map(layers: Sequence[LayerResult]) -> str:
    base = least_damping(layers)
    cells = {}
    for one in layers:
        layer, name = _place(one.name)
        tip = f"{one.name}: error {one.error:.3e}, {one.method}" + (f", damping {one.damping:g}" if one.damping else "")
        ring = bool(one.fallback_reason) or (one.damping or 0) > base
        cells[layer, _PROJECTIONS.index(name)] = Cell(one.error, tip, ring)
    return heat_map("error by layer", _PROJECTIONS, cells)


def _place(name: str) -> tuple[int, str]:
    """Decoder layer and projection of ``model.layers.3.mlp.up_proj``."""
    parts = name.split(".")
    return int(parts[2]), parts[-1]


def least_damping(layers: Sequence[LayerResult]) -> float:
    """What a layer is damped with where nothing goes wrong."""
    return min((one.damping for one in layers if one.damping), default=0.0)


def _damping(one: LayerResult) -> str:
    return "" if one.damping is None else f"{one.damping:g}"


def _bytes(report: QuantizeReport) -> str:
    rows = [
        (one.part, count_bytes(one.before), count_bytes(one.after), count_bytes(one.scales) if one.scales else "")
        for one in report.bytes_by_part
        if one.before or one.after
    ]
    rows.append(("all", count_bytes(report.bytes_before), count_bytes(report.bytes_after), ""))
    return section(
        "Bytes by part",
        figure("Before and after", _bars(report.bytes_by_part)),
        table(("part", "before", "after", "of which scales, zero points"), rows),
    )


def _bars(parts: Sequence[PartBytes]) -> str:
    """Two bars of the same scale, cut into parts."""
    colors = ("#2f6fb0", "#7fb0de", "#d9892b", "#f0c47e", GRAY)
    sides: tuple[tuple[str, Callable[[PartBytes], int]], ...] = (
        ("before", lambda one: one.before),
        ("after", lambda one: one.after),
    )
    parts = [one for one in parts if one.before or one.after]
    most = max(sum(size(one) for one in parts) for _, size in sides) or 1
    drawn = []
    for row, (label, size) in enumerate(sides):
        x, y = float(_LEFT), 34 * row
        drawn.append(f'<text x="{_LEFT - 8}" y="{y + 17}" text-anchor="end">{label}</text>')
        for color, one in zip(colors, parts, strict=False):
            width = size(one) / most * 700
            tip = f"<title>{escape(one.part)}: {count_bytes(size(one))}</title>"
            drawn.append(f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="26" fill="{color}">{tip}</rect>')
            x += width
    x = float(_LEFT)
    for color, one in zip(colors, parts, strict=False):
        drawn.append(f'<rect x="{x}" y="76" width="11" height="11" fill="{color}" stroke="{LINE}"/>')
        drawn.append(f'<text x="{x + 16}" y="86">{escape(one.part)}</text>')
        x += 36 + 7 * len(one.part)
    return svg(_LEFT + 704, 92, "bytes by part, before and after", drawn)


def _kv_cache(report: QuantizeReport) -> str:
    kv = report.kv_cache
    assert kv is not None
    values = {
        "kept in": kv.dtype,
        "bytes per token": f"{kv.bytes_per_token:,}",
        "perplexity, unquantized": f"{kv.perplexity_before:.4f}",
        f"perplexity, {kv.dtype}": f"{kv.perplexity_after:.4f} ({kv.perplexity_after / kv.perplexity_before - 1:+.3%})",
        "KL divergence, nats per token": f"{kv.kl:.5f}",
        "top-1 agreement": f"{kv.top1_agreement:.2%}",
    }
    return section("Keys and values", facts(values))


def _acceptance(found: AcceptanceReport) -> str:
    values = {
        "before": f"{found.before:.4f}",
        "after": f"{found.after:.4f} ({found.after - found.before:+.4f})",
        "codes changed": f"{found.changed:.3%}",
    }
    said = "The mean probability that the target accepts a drawn token, on calibration text that was kept apart."
    return section("Acceptance as a drafter", paragraph(said), facts(values))


def _sensitivity(report: QuantizeReport) -> str:
    """Of mixed widths: what each stage was measured to cost, and what it was given."""
    given = {one.name: one.bits for one in report.layers}
    stages = list(dict.fromkeys(" ".join(_place(name)[1] for name in one.names) for one in report.sensitivity))
    cells, rows = {}, []
    for one in sorted(report.sensitivity, key=lambda one: -one.kl):
        layer, stage = _place(one.names[0])[0], " ".join(_place(name)[1] for name in one.names)
        tip = f"layer {layer}, {stage}: {one.kl:.2e} nats, given {given.get(one.names[0])} bits"
        cells[layer, stages.index(stage)] = Cell(one.kl, tip)
        rows.append((layer, stage, f"{one.kl:.2e}", given.get(one.names[0], "")))
    short = [" ".join(word.removesuffix("_proj") for word in stage.split()) for stage in stages]
    caption = f"KL divergence in nats when these layers alone are rounded to {report.sensitivity[0].bits} bits"
    return section(
        "Sensitivity",
        figure(caption, heat_map("KL", short, cells)),
        table(("layer", "linear layers", "KL", "bits given"), rows, (1,)),
    )


def _fallbacks(report: QuantizeReport) -> str:
    base = least_damping(report.layers)
    rows = [(one.name, one.fallback_reason) for one in report.layers if one.fallback_reason]
    rows += [(one.name, f"damping {one.damping:g}") for one in report.layers if (one.damping or 0) > base]
    said = table(("layer", "what was done instead"), rows, (0, 1)) if rows else paragraph("No layer needed one.")
    notes = [paragraph(f"Note: {note}") for note in report.notes]
    return section("Fallbacks and notes", said, *notes)


def _text(report: QuantizeReport) -> str:
    named = {"calibration": report.calibration, "held-out": report.held_out}
    rows = [
        (name, text.source, f"{text.rows:,}", f"{text.seq_len:,}", f"{text.rows * text.seq_len:,}")
        for name, text in named.items()
        if text is not None
    ]
    after = f"The result was measured on {report.eval_backend}, its parent in fp32." if report.eval_backend else ""
    measured = f"{after} {count_bytes(report.peak_bytes)} of memory at the peak, before that measurement."
    return section(
        "Text and machine",
        table(("text", "source", "rows", "tokens in a row", "tokens"), rows, (0, 1)) if rows else "",
        paragraph(measured),
    )


def _every_layer(report: QuantizeReport) -> str:
    rows = [
        (one.name, one.method, one.bits or "", f"{one.error:.3e}", _damping(one), f"{one.seconds:.2f}")
        for one in report.layers
    ]
    return section("Every layer", table(("layer", "method", "bits", "error", "damping", "seconds"), rows, (0, 1)))
