"""The page of `quantspec eval`, and the parts that the page of a quantization shares with it."""

from __future__ import annotations

from collections.abc import Sequence

from quantspec.calibrate.evaluate.config import EvalReport, PositionBin
from quantspec.calibrate.page import count_bytes, document, facts, figure, paragraph, section, steps, table, tiles


def html(report: EvalReport) -> str:
    """A page that needs nothing else."""
    parent = report.parent
    shown = {"weights": count_bytes(report.weight_bytes), "kernels": report.backend}
    if report.perplexity is not None:
        shown["perplexity"] = f"{report.perplexity:.3f}"
    if parent is not None:
        shown |= {
            "perplexity of the parent": f"{parent.perplexity:.3f}",
            "ratio of perplexities": f"{parent.ratio:.4f}",
            "KL divergence": f"{parent.kl:.4f} nats",
            "top-1 agreement": f"{parent.top1_agreement:.2%}",
        }
    parts = [paragraph(report.model + (f", against {parent.model}" if parent else "")), tiles(shown)]
    if report.perplexity is not None:
        parts.append(
            section("Held-out text", table(("", "value", "95% interval"), intervals(report)), _explained(report))
        )
        parts.append(by_position(report.by_position))
    if report.tasks:
        parts.append(section("Tasks", table(("task", "metric", "value", "standard error"), _tasks(report), (0, 1))))
    parts.append(section("Settings", facts({**report.settings, "seconds": f"{report.seconds:.1f}"})))
    if report.notes:
        parts.append(section("Notes", *map(paragraph, report.notes)))
    return document("Evaluation", parts)


def by_position(bins: Sequence[PositionBin]) -> str:
    """Charts of agreement and divergence, or of the loss where there is no parent, and their figures."""
    compared = all(one.top1_agreement is not None and one.kl is not None for one in bins)
    if compared:
        charts = [_chart("Top-1 agreement", bins, "top1_agreement"), _chart("KL divergence, nats", bins, "kl")]
    else:
        charts = [_chart("Loss, nats per token", bins, "loss")]
    rows = []
    for one in bins:
        row = [f"{one.start} to {one.end - 1}", f"{one.loss:.4f}"]
        if one.top1_agreement is not None and one.kl is not None:
            row += [f"{one.top1_agreement:.2%}", f"{one.kl:.5f}"]
        rows.append(row)
    columns = ("tokens of context", "loss, nats", *(("top-1 agreement", "KL, nats") if compared else ()))
    return section("By position", f'<div class="charts">{"".join(charts)}</div>', table(columns, rows))


def _chart(caption: str, bins: Sequence[PositionBin], name: str) -> str:
    ranges = [(one.start, one.end, getattr(one, name)) for one in bins]
    return figure(caption, steps(caption, ranges, percent=name == "top1_agreement", zero=name == "kl"))


def intervals(report: EvalReport) -> list[tuple[str, str, str]]:
    """Name, value and 95% interval of each figure, for people."""

    def between(bounds: list[float] | None, form: str) -> str:
        return "" if bounds is None else f"{bounds[0]:{form}} to {bounds[1]:{form}}"

    rows = [("perplexity", f"{report.perplexity:.4f}", between(report.perplexity_95, ".4f"))]
    if (parent := report.parent) is not None:
        rows += [
            (f"perplexity of {parent.model} ({parent.backend})", f"{parent.perplexity:.4f}", ""),
            ("ratio of perplexities", f"{parent.ratio:.5f}", between(parent.ratio_95, ".5f")),
            ("KL divergence, nats per token", f"{parent.kl:.5f}", between(parent.kl_95, ".5f")),
            ("top-1 agreement", f"{parent.top1_agreement:.2%}", between(parent.top1_agreement_95, ".2%")),
        ]
    return rows


def _explained(report: EvalReport) -> str:
    return paragraph(
        f"{report.tokens:,} tokens in {report.rows:,} rows of {report.data}. Intervals are of a bootstrap over rows, "
        "which keeps both models paired. KL divergence is of the model's next-token distribution from its parent's."
    )


def _tasks(report: EvalReport) -> list[tuple[str, str, str, str]]:
    rows = []
    for task, metrics in report.tasks.items():
        for name, value in metrics.items():
            metric, _, kind = name.partition(",")
            if isinstance(value, float) and not metric.endswith("_stderr"):
                error = metrics.get(f"{metric}_stderr,{kind}")
                rows.append((task, metric, f"{value:.4f}", f"{error:.4f}" if isinstance(error, float) else ""))
    return rows
