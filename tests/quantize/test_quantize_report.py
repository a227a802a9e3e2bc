"""What a run leaves to read: the same figures in JSON and on a page that needs nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from quantspec.calibrate.evaluate.config import EvalConfig, EvalReport, PositionBin
from quantspec.calibrate.evaluate.page import html as eval_page
from quantspec.calibrate.evaluate.run import evaluate
from quantspec.calibrate.evaluate.scoring import STREAMED
from quantspec.calibrate.page import steps
from quantspec.calibrate.quantize import report as module
from quantspec.calibrate.quantize.config import AcceptanceReport, LayerResult, QuantizeConfig, Trial
from quantspec.calibrate.quantize.page import html
from quantspec.calibrate.quantize.report import PAGE, REPORT, part_of, read_report
from quantspec.calibrate.quantize.run import run
from quantspec.models import atomic
from quantspec.models.load import load_model

Configure = Callable[..., QuantizeConfig]
VOID = {"meta"}


class Reader(HTMLParser):
    """Checks that tags nest, and gathers texts and what would be fetched."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "data")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}>"

    def handle_data(self, data: str) -> None:
        self.text += data


def check_self_contained(page: str) -> Reader:
    reader = Reader(page)
    assert reader.links == []
    assert not {"script", "link", "img", "iframe"} & set(reader.tags)
    assert "@import" not in page
    assert "url(" not in page
    return reader


def test_both_files_say_what_the_run_returned(configure: Configure, text: Path) -> None:
    config = configure(kv_cache_dtype="int8")
    report = run(config)
    assert read_report(config.out / REPORT)[1] == report
    assert atomic.verify_manifest(config.out)
    assert {REPORT, PAGE} <= json.loads((config.out / atomic.MANIFEST).read_text())["files"].keys()

    page = (config.out / PAGE).read_text()
    assert page == html(report)
    reader = check_self_contained(page)
    assert report.kl is not None
    assert report.kv_cache is not None
    for shown in (f"{report.kl:.4f} nats", f"{report.top1_agreement:.2%}", f"{report.kv_cache.kl:.5f}", str(text)):
        assert shown in reader.text
    assert all(layer.name in reader.text for layer in report.layers)
    assert page.count("<rect") > len(report.layers)
    assert report.settings["group_size"] == 32
    assert report.settings["damping"] == 0.01
    assert report.calibration is not None
    assert (report.calibration.source, report.calibration.rows, report.calibration.seq_len) == (str(text), 24, 64)
    assert report.eval_tokens == 4 * 63


def test_bytes_by_part_are_all_bytes(configure: Configure) -> None:
    report = run(replace(configure(method="rtn"), eval_samples=0))
    parts = {one.part: one for one in report.bytes_by_part}
    assert sum(one.before for one in parts.values()) == report.bytes_before
    assert sum(one.after for one in parts.values()) == report.bytes_after
    assert parts["embedding"].before == parts["embedding"].after == 64 * 64 * 2
    assert parts["LM head"].before == parts["LM head"].after == 0  # tied
    # one bf16 scale for 32 weights of 16 bits
    assert parts["MLP"].scales * 32 == parts["MLP"].before
    assert parts["norms and biases"].after == 7 * 64 * 2
    assert report.perplexity_after is None
    assert report.held_out is None
    check_self_contained(html(report))


@pytest.mark.parametrize(
    "name, part",
    [
        ("model.embed_tokens.weight", "embedding"),
        ("lm_head.weight_packed", "LM head"),
        ("model.layers.3.self_attn.q_proj.weight_scale", "attention"),
        ("model.layers.3.self_attn.q_proj.bias", "norms and biases"),
        ("model.layers.3.self_attn.q_norm.weight", "norms and biases"),
        ("model.layers.3.mlp.up_proj.weight", "MLP"),
        ("model.norm.weight", "norms and biases"),
    ],
)
def test_parts(name: str, part: str) -> None:
    assert part_of(name) == part


def test_perplexity_is_that_of_the_kernels_that_generate(configure: Configure, text: Path) -> None:
    config = configure(bits=3)
    report = run(config)
    backend = load_model(config.out).backend
    assert report.eval_backend == (STREAMED if backend.startswith("reference") else backend)
    found = evaluate(
        EvalConfig(model=str(config.out), against=str(config.model), data=text, seq_len=64, num_samples=4), print
    )
    assert found.parent is not None
    if not backend.startswith("reference"):
        assert report.perplexity_after == found.perplexity
    # The parent's fp32 sums come in another order.
    assert report.kl == pytest.approx(found.parent.kl, rel=1e-4)
    assert report.perplexity_before == pytest.approx(found.parent.perplexity, rel=1e-5)


def test_without_room_the_comparison_streams_and_says_so(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(configure("whole"))
    monkeypatch.setattr(module, "available_bytes", lambda: 1000)
    report = run(configure())
    assert report.eval_backend == STREAMED
    assert any("does not fit into memory" in note for note in report.notes)
    # int8 activations of the kernels against fp32 ones
    assert report.perplexity_after == pytest.approx(whole.perplexity_after, rel=0.02)


def test_memory_that_ends_while_measuring(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layers are done: the run goes on by streaming and does not lose them."""
    calls: list[object] = []

    def short(*arguments: object) -> None:
        calls.append(arguments)
        raise MemoryError

    monkeypatch.setattr(module, "scores_as_run", lambda model, ids: (short() for _ in range(9)))
    report = run(configure(kv_cache_dtype="int8"))
    native = not load_model(report.out).backend.startswith("reference")  # which streams anyway
    assert len(calls) == 2 * native
    assert report.eval_backend == STREAMED
    assert report.kv_cache is not None
    assert 0 < report.kv_cache.kl < 0.1


def test_available_memory_heeds_the_limits_of_the_process() -> None:
    program = """
import resource
from quantspec.kernels.memory import available_bytes
free = available_bytes()
resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))
capped = available_bytes()
assert capped is not None
assert 0 < capped < 2**30, capped
assert free is None or free >= capped
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_fallbacks_and_more_damping_stand_out(configure: Configure) -> None:
    report = run(replace(configure(method="rtn"), eval_samples=0))
    plain = [replace(one, method="gptq", damping=0.01) for one in report.layers]
    odd = [
        replace(plain[0], damping=0.1),
        replace(plain[1], method="rtn", damping=None, fallback_reason="the Hessian is <singular>"),
        *plain[2:],
    ]
    quiet, loud = (html(replace(report, layers=layers, notes=["a < b"])) for layers in (plain, odd))
    assert quiet.count("<circle") == 0
    assert loud.count("<circle") == 2
    text = check_self_contained(loud).text
    assert "the Hessian is <singular>" in text
    assert "damping 0.1" in text
    assert "Note: a < b" in text


def test_what_rounding_for_acceptance_did(configure: Configure) -> None:
    report = run(replace(configure(method="rtn"), eval_samples=0))
    page = check_self_contained(html(replace(report, acceptance=AcceptanceReport(0.5, 0.625, 0.01))))
    assert "0.6250 (+0.1250)" in page.text


def test_what_auto_tried_is_shown(configure: Configure) -> None:
    report = run(replace(configure(method="rtn"), eval_samples=0))
    tried = [Trial("gptq", 0.0125, 2, 3.0), Trial("awq", refusal="no <time>")]
    page = check_self_contained(html(replace(report, tried=tried)))
    assert all(one.outcome in page.text for one in tried)


def test_mixed_widths_show_what_they_were_chosen_by(configure: Configure) -> None:
    report = run(replace(configure(method="rtn", bits_per_weight=4.75), eval_samples=0))
    page = check_self_contained((Path(report.out) / PAGE).read_text())
    assert "Sensitivity" in page.text
    assert page.tags.count("rect") > len(report.layers) + len(report.sensitivity)
    assert len(report.sensitivity) == 3 * 4
    assert report.bits_per_weight is not None
    assert report.bits_per_weight <= 4.75


@pytest.mark.parametrize("errors", [[0.0, 0.0], [1e-3, 1e-3], [1e-9, 10.0]])
def test_a_map_of_any_errors(configure: Configure, errors: list[float]) -> None:
    report = run(replace(configure(method="rtn"), eval_samples=0))
    layers = [LayerResult(f"model.layers.{79 * i}.mlp.up_proj", "rtn", error) for i, error in enumerate(errors)]
    check_self_contained(html(replace(report, layers=layers)))


def test_the_page_of_an_evaluation_of_tasks_alone() -> None:
    metrics = {"acc,none": 0.25, "acc_stderr,none": 0.1, "perplexity_stderr,none": "N/A", "alias": "<t>"}
    report = EvalReport("m<&", "cpu-int8", "auto", 10, tasks={"quiz": metrics}, notes=["slower"])
    reader = check_self_contained(eval_page(report))
    assert "m<&" in reader.text
    assert all(shown in reader.text for shown in ("quiz", "0.2500", "0.1000", "slower"))


def test_the_page_of_an_evaluation_without_a_parent() -> None:
    bins = [PositionBin(1, 9, 2.5), PositionBin(9, 17, 2.25)]
    report = EvalReport("m", "cpu-int8", "auto", 10, perplexity=11.5, rows=1, tokens=16, data="text", by_position=bins)
    reader = check_self_contained(eval_page(report))
    assert "2.2500" in reader.text
    assert "agreement" not in reader.text


@pytest.mark.parametrize("low", [0.84375, 1.0])
def test_no_axis_of_shares_goes_past_all(low: float) -> None:
    drawn = steps("agreement", [(1, 9, 1.0), (9, 17, low)], percent=True)
    ticks = [float(part.split("%")[0].rpartition(">")[2]) for part in drawn.split("</text>") if part.endswith("%")]
    assert min(ticks) < 100 == max(ticks)
    assert "nan" not in drawn
