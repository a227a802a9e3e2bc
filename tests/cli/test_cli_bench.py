"""``quantspec bench``: its JSON, its arithmetic on times that are made up, its pictures, and misuse. No timing is
asserted."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from quantspec.benchmarks import contenders, kernels, page
from quantspec.benchmarks.kernels import Machine, Measured
from quantspec.calibrate.cost import timing
from quantspec.cli.bench import _closing
from quantspec.errors import Unavailable
from quantspec.kernels.cpu import library, probes

ROW_KEYS = {"backend", "mode", "K", "N", "group_size", "n", "ms", "v", "gbps", "bandwidth_fraction", "bound_ms"}

native = pytest.mark.skipif(library.usable() is not None, reason=str(library.usable()))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Small copies and buffers: what is measured then means nothing, how it is reported is all the same. Threads are
    afterwards as they were."""
    monkeypatch.setattr(contenders, "LEAST_BYTES", 2**16)
    monkeypatch.setattr(probes, "l3_bytes", lambda: 2**14)
    monkeypatch.setattr(probes, "LEAST_BYTES", 2**20)
    before = torch.get_num_threads()
    yield
    kernels.set_threads(0, before)


def test_figures_of_made_up_times() -> None:
    machine = Machine(bandwidth=40e9, tile_macs=100e9)
    times = {1: [2e-3, 1e-3, 4e-3], 64: [8e-3]}
    one, wide = Measured("cpu-int8", "int8", (1000, 2000), 128, 20_000_000, 2_000_000, times).rows(machine)
    assert one.keys() >= ROW_KEYS
    # 20 MB at 40 GB/s take 0.5 ms, 2 M multiply-adds at 100 G/s 0.02 ms; the least of the times counts.
    assert (one["ms"], one["ms_median"], one["v"], one["samples"]) == pytest.approx((1.0, 2.0, 1.0, 3))
    assert (one["gbps"], one["bandwidth_fraction"], one["bound_ms"]) == pytest.approx((20.0, 0.5, 0.5))
    # 64 rows are bound by 128 M multiply-adds: 1.28 ms.
    assert (wide["v"], wide["bound_ms"], wide["over_bound"]) == pytest.approx((8.0, 1.28, 6.25))
    dense = Measured("torch-fp32", "dense", (1000, 2000), None, 20_000_000, 2_000_000, times).rows(machine)
    assert [row["bound_ms"] for row in dense] == pytest.approx([0.5, 0.5])
    assert dense[0]["group_size"] is None


def test_the_better_look_at_the_machine_counts() -> None:
    found = kernels.best(Machine(3.0, 5.0, None), Machine(4.0, 2.0, None))
    assert (found.bandwidth, found.tile_macs, found.peak_macs) == (4.0, 5.0, None)


def test_calls_alternate_and_slow_ones_give_way(monkeypatch: pytest.MonkeyPatch) -> None:
    now, made = 0.0, []

    def call(name: str, seconds: float) -> Any:
        def run() -> None:
            nonlocal now
            now += seconds
            made.append(name)

        return run

    monkeypatch.setattr(timing, "perf_counter", lambda: now)
    calls = {name: call(name, seconds) for name, seconds in {"quick": 1e-4, "slow": 0.025, "stuck": 5.0}.items()}
    times = timing.alternate(calls, rounds=10, seed=1)
    assert times["quick"] == pytest.approx([1e-4] * 80)
    # It has 16 ms a round and 25 are gone after the first look: it runs in rounds 2, 4, 5, 7, 8 and 10.
    assert times["slow"] == pytest.approx([0.025] * 6)
    assert times["stuck"] == pytest.approx([5.0])
    blocks = [name for number, name in enumerate(made) if number == 0 or made[number - 1] != name]
    assert len(blocks) > 10  # not one backend after the other


@native
@pytest.mark.usefixtures("quick")
def test_kernels_json_and_pictures(call: Any, tmp_path: Path) -> None:
    plot, site = tmp_path / "v.png", tmp_path / "v.html"
    options = ("--shapes", "128x96,64x33", "--widths", "1,2,5", "--group-size", 32, "--rounds", 1, "--threads", 1)
    result = call("bench", "kernels", *options, "--json", "--plot", plot, "--html", site)
    assert result.code == 0, result.err
    report = json.loads(result.out)
    assert report["read_bandwidth_gbps"] > 0
    assert all(row.keys() >= ROW_KEYS for row in report["rows"])
    measured = {(row["backend"], row["K"], row["N"], row["n"]) for row in report["rows"]}
    names = {"cpu-int8", "cpu-fp32", "torch-fp32", "torch-bf16", "torch-int4"} - report["left_out"].keys()
    assert measured == {(name, *shape, n) for name in names for shape in ((128, 96), (64, 33)) for n in (1, 2, 5)}
    assert {row["group_size"] for row in report["rows"] if row["mode"] == "dense"} == {None}
    assert {row["mode"] for row in report["rows"] if row["backend"].startswith("cpu-")} == {"int8", "fp32"}
    assert report["command"].startswith("quantspec bench kernels --shapes 128x96,64x33")
    assert plot.read_bytes().startswith(b"\x89PNG")
    text = site.read_text()
    assert text.count("<svg") == text.count("</svg>") > 4
    assert "<script" not in text
    assert not re.search(r"https?://|src=|@import", text)
    assert "K = 64, N = 33" in text


@native
@pytest.mark.usefixtures("quick")
def test_kernels_prints_tables(call: Any) -> None:
    backends = ("--backends", "cpu-int8,torch-fp32", "--widths", "4")
    result = call("bench", "kernels", "--shapes", "64x32", *backends, "--rounds", 1)
    assert result.code == 0, result.err
    lines = [line for line in result.out.splitlines() if line.startswith("|")]
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["1", "4"]  # width 1 is always measured
    assert "64 inputs x 32 outputs" in result.out
    assert "times as fast as dense fp32" in result.out
    assert "\x1b" not in result.out


@pytest.mark.parametrize(
    "options, complaint",
    [
        (("--shapes", "4096"), "'4096' is not KxN[,KxN]"),
        (("--shapes", "axb"), "'axb' is not KxN[,KxN]"),
        (("--shapes", "100x64"), "K must be a multiple of 32, not 100 (shape 100x64)"),
        (("--shapes", "0x64"), "a shape needs at least one input and one output, not 0x64"),
        (("--widths", "1,0"), "widths are numbers of rows from 1 to 4096, not 0"),
        (("--widths", "one"), "'one' is not n[,n]"),
        (("--backends", "magic"), "unknown backend 'magic'"),
        (("--group-size", "48"), "the group size must be a multiple of 32, not 48"),
        (("--threads", "0"), "threads must be from 1 to 1024, not 0"),
        (("--rounds", "0"), "rounds must be at least 1, not 0"),
        (("--device", "tpu"), "'tpu' is not one of"),
        (("--plot", "nowhere/v.png"), "cannot write nowhere/v.png"),
        (("--html", "."), "cannot write ."),
    ],
)
def test_misuse_is_one_line_before_anything_is_measured(call: Any, options: tuple[str, ...], complaint: str) -> None:
    result = call("bench", "kernels", *options)
    assert (result.code, result.out) == (2, "")
    assert complaint in result.error
    assert "measuring" not in result.err


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs a folder that nobody can write")
def test_a_folder_that_cannot_be_written_is_said_before_anything_is_measured(call: Any) -> None:
    result = call("bench", "kernels", "--html", "/proc/curves.html")
    assert (result.code, result.out) == (4, "")
    assert "cannot write into /proc" in result.error
    assert "measuring" not in result.err


def test_no_cuda_is_one_line(call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = call("bench", "kernels", "--device", "cuda")
    assert (result.code, result.out) == (2, "")
    assert "there is no CUDA device" in result.error


def test_no_compiler_is_one_line(call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise Unavailable("no C++ compiler found", hint="install g++ or clang++")

    monkeypatch.setattr(library, "load", fail)
    result = call("bench", "kernels")
    assert (result.code, result.out) == (2, "")
    assert "no C++ compiler found. hint: install" in result.error


def test_a_png_without_matplotlib_is_one_line(call: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("quantspec.benchmarks.plot.find_spec", lambda name: None)
    result = call("bench", "kernels", "--plot", tmp_path / "v.png")
    assert (result.code, result.out) == (2, "")
    assert "a PNG needs matplotlib" in result.error
    assert "quantspec[plots]" in result.error


@native
@pytest.mark.usefixtures("quick")
def test_a_backend_asked_for_by_name_must_run(call: Any) -> None:
    options = ("--shapes", "96x32", "--group-size", 96, "--rounds", 1, "--widths", 1)
    result = call("bench", "kernels", *options, "--backends", "torch-int4")
    assert result.code == 2
    assert "torch-int4 has no groups of 96" in result.error
    report = json.loads(call("bench", "kernels", *options, "--json").out)
    assert report["left_out"] == {"torch-int4": "torch-int4 has no groups of 96"}


def test_the_closing_lines_without_a_bare_instruction() -> None:
    """Portable code has none to be held against."""
    reading = {"threads": 1, "page_bytes": 4096, "prefetch": 0}
    report = {"read_bandwidths": [reading], "tile_gmacs": 3.0, "raw_peak_gmacs": None, "processor": "P", "threads": 1}
    report |= {"read_bandwidth_gbps": 9.0, "rounds": 1, "rows": []}
    lines = list(_closing({**report, "left_out": {"a": "it is not here", "b": "b has no groups of 96"}}))
    assert lines[0].endswith("inner loop 3 GMAC/s.")
    assert lines[1:3] == ["Left out: a, it is not here.", "Left out: b has no groups of 96."]


def test_the_page_escapes_names() -> None:
    row = {"K": 32, "N": 1, "backend": "<b>", "mode": "dense", "n": 1, "ms": 1.0, "bound_ms": 1.0}
    report = {"rows": [row], "threads": 1, "group_size": 32, "read_bandwidth_gbps": 1.0, "rounds": 1}
    assert "<b>" not in page.html(report)
    assert "&lt;b&gt;" in page.html(report)
