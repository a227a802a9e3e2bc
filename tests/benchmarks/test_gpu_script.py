"""The one script for a GPU: its budget, parts that fail or hang, and its page, with stand-ins for the parts."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from time import sleep
from typing import Any

import pytest
import torch

from quantspec.benchmarks import gpu, gpu_checks, gpu_found, gpu_page, gpu_parts
from quantspec.benchmarks.gpu import Part
from quantspec.errors import UsageError, VerificationError

WRITE = "import json, sys; json.dump({'result': {'x': 1}}, open(sys.argv[1], 'w')); "
PROGRAMS = {
    "right": WRITE,
    "wrong": WRITE.replace("}}", "}, 'why': 'rows change'}") + "print('a trace'); sys.exit(5)",
    "crash": "import os; os._exit(139)",
    "hang": WRITE + "import os, subprocess, time; p = subprocess.Popen(['sleep', '60']); "
    "open(sys.argv[1] + '.pid', 'w').write(str(p.pid)); time.sleep(60)",
}  # fmt: skip


def start(name: str, result: Path) -> list[str]:
    return [sys.executable, "-c", PROGRAMS[name], str(result)]


def run(tmp_path: Path, *parts: Part, minutes: float = 1.0, **options: Any) -> dict[str, Any]:
    report = gpu.run(tmp_path, minutes, parts, options.pop("start", start), **options)
    assert json.loads((tmp_path / "gpu.json").read_text()) == report
    return report["parts"]


def test_a_part_that_fails_takes_nothing_along(tmp_path: Path) -> None:
    found = run(tmp_path, *(Part(name, 0, 30) for name in ("wrong", "crash", "right")))
    assert [part["status"] for part in found.values()] == ["failed", "failed", "done"]
    assert (found["wrong"]["why"], found["wrong"]["exit_code"]) == ("rows change", 5)
    assert found["wrong"]["result"] == found["right"]["result"] == {"x": 1}
    assert found["crash"]["why"].startswith("exit status")
    assert "a trace" in (tmp_path / "gpu.log").read_text()
    assert "| wrong | failed |" in (tmp_path / "gpu.md").read_text()


def test_a_part_that_hangs_is_stopped_with_all_that_it_started(tmp_path: Path) -> None:
    places = []

    def noted(name: str, result: Path) -> list[str]:
        pid = tmp_path / "pid"
        places.append(pid)
        return [sys.executable, "-c", PROGRAMS[name].replace("sys.argv[1] + '.pid'", repr(str(pid))), str(result)]

    found = run(tmp_path, Part("hang", 0, 3), start=noted)["hang"]
    assert (found["status"], found["why"]) == ("stopped", "it took more than 3 s")
    assert found["result"] == {"x": 1}  # what it had found until then
    child = int(places[0].read_text())
    for _ in range(100):
        if not alive(child):
            break
        sleep(0.02)
    assert not alive(child)


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_what_no_longer_fits_is_left_out_with_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def clock() -> Iterator[float]:
        yield 0.0  # 120 seconds from here
        yield 0.0  # for the first part
        yield 0.0
        yield 90.0
        while True:
            yield 90.0

    times = clock()
    parts = Part("right", 10, 100), Part("wrong", 31, 100), Part("crash", 30, 100)
    found = run(tmp_path, *parts, minutes=2, clock=lambda: next(times))
    assert [part["status"] for part in found.values()] == ["done", "left out", "failed"]
    assert found["right"]["seconds"] == 90
    assert "wrong: left out in 0 s: 30 s were left, and it needs 31" in capsys.readouterr().out


def test_every_part_is_there_and_they_fit() -> None:
    assert [part.name for part in gpu.PARTS] == [name for part in gpu.PARTS for name in [part.name]]
    assert {part.name for part in gpu.PARTS} == gpu_parts.PARTS.keys() - {"sanitized"}
    assert all(part.least <= part.most for part in gpu.PARTS)
    assert [part.name for part in gpu.chosen("kernels,build")] == ["build", "kernels"]
    with pytest.raises(UsageError, match="no part 'all'"):
        gpu.chosen("all")


def test_a_part_leaves_what_it_had_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def half(found: gpu_found.Found) -> None:
        found.put(first=1)
        raise ZeroDivisionError("no more")

    monkeypatch.setitem(gpu_parts.PARTS, "half", half)
    monkeypatch.setattr(sys, "argv", ["gpu_parts", "half", str(tmp_path / "r.json")])
    assert gpu_parts.main() == 1
    report = json.loads((tmp_path / "r.json").read_text())
    assert report == {"result": {"first": 1}, "why": "ZeroDivisionError: no more"}


def test_texts_that_differ_are_counted() -> None:
    def text(greedy: int | None) -> dict[str, Any]:
        return {"greedy": {"differs_at": {"eagle": greedy, "draft": None}}, "sampled": {"differs_at": {"eagle": None}}}

    assert gpu_checks.differences([text(None)]) == []
    assert gpu_checks.differences([text(3), text(0)]) == ["2 of 4 texts of eagle differ from plain decoding"]


def product(backend: str, n: int, ms: float, nbytes: float = 243e6, matrix: str = "70b gate_up") -> dict[str, Any]:
    return {
        "matrix": matrix, "dtype": "bfloat16", "backend": backend, "mode": "w4a16", "K": 8192, "N": 57344, "n": n,
        "ms": ms, "ms_median": ms, "weight_bytes": nbytes,
    }  # fmt: skip


def report_of(**parts: Any) -> dict[str, Any]:
    return {"minutes": 8, "parts": {name: {"status": "done", "seconds": 1.0, "result": r} for name, r in parts.items()}}


def target(what: str, report: dict[str, Any]) -> str:
    return next(each for each in gpu_page.TARGETS if each.what.startswith(what)).line(report)


def test_targets() -> None:
    rows = [product("cuda", 1, 0.070), product("cuda", 16, 0.072), product("cuda", 32, 0.1), product("cuda", 64, 0.13)]
    rows += [product("triton", 1, 0.105), product("cuda", 1, 0.02, 61e6, "8b gate_up")]
    rows += [product("cuda", 1, 1.0, 9e6, "8b o")]  # small ones have no target
    report = report_of(kernels={"read_bandwidth_gbps": 4300.0, "rows": rows})
    # 243 MB in 72 us are 3375 GB/s; 61 MB in 20 us 3050.
    assert target("W4, n = 1..16, matrices of 60", report).endswith("| 71% | met |")
    assert target("W4, n = 1..16, matrices of 200", report).endswith("| 78% | **not met** |")
    assert target("v(16)", report).endswith("| 1.03 | met |")
    assert target("v(32)", report).endswith("| 1.43 | **not met** |")
    # 2 * 64 * 8192 * 57344 in 0.13 ms.
    assert target("n = 64", report).endswith("| 463 | met |")
    assert target("Triton", report).endswith("| 1.50 | met |")
    assert target("8B", report).endswith("| | not measured |")


def test_errors_are_those_of_their_type() -> None:
    found = {
        "cuda": {"w4 g128 float16": 3e-4, "w4 g32 float16": "no such groups"},
        "triton": {"w8 g128 bfloat16": 2e-3},
    }
    report = report_of(products=found, triton={"errors": {"rms_norm float32": 1e-7, "rope float16": 4e-4}})
    assert target("relative error, fp16", report).endswith("| 4.0e-04 | met |")
    assert target("relative error, bf16", report).endswith("| 2.0e-03 | met |")


def test_checks_that_failed_are_no_met_target() -> None:
    report = report_of(products={}, prove={})
    assert target("rows at n", report).endswith("| 0 | met |")
    report["parts"]["prove"]["status"] = "failed"
    assert target("rows at n", report).endswith("| 1 | **not met** |")
    report["parts"]["prove"]["status"] = "stopped"
    assert target("rows at n", report).endswith("| | not measured |")


def test_the_page_of_all_figures() -> None:
    machine = {
        "read_bandwidth_gbps": 4400.0, "read_bandwidths": [{"reader": "triton", "gbps": 4400.0}], "commit": "abc",
        "copy_bandwidth_gbps": 4300.0, "raw_peak_gmacs": 395e3, "device_name": "some GPU", "packages": {"torch": "2"},
    }  # fmt: skip
    decoding = {
        "backend": "cuda", "tokens_per_second": 470.0, "ms_per_step": 2.1, "graph_ms": 1.9, "parts_ms": {"mlp": 1.2},
        "graph_bandwidth_fraction": 0.5, "rows": [{"n": 16, "v": 1.04}],
    }  # fmt: skip
    texts = {"cuda": {"exactness": "exact", "tokens_per_second": {"none": 900.0}}}
    rows = [product("cuda", 1, 0.07)]
    page = gpu_page.page(
        report_of(
            environment=machine,
            kernels={**machine, "rows": rows, "left_out": {"bnb-nf4": "not installed"}},
            generate=texts,
            probe={"differ": {"float16 codes": 0.25}},
            launch={"8b step": {"on": {"us": 2000.0}, "off": {"us": 2200.0}}},
            **{"decode-8b": decoding},
        )
    )
    assert "790 TFLOP/s" in page
    assert "between wgmma and mma.sync: float16 codes 25.0%" in page
    assert "| 8b step | 2200.0 | 2000.0 |  |  |" in page
    assert "| 70b gate_up | bfloat16 | cuda | 1 | 70.0 | 3471 | 79% | 1.00 | 13 |" in page
    assert "| decode-8b | cuda | 470 | 2.100 | 1.900 | 50% | mlp 1.200 |  | 1.04 |  |" in page
    assert "The default family on cuda, exact: none 900 tokens/s." in page
    assert "Left out: bnb-nf4, not installed." in page


def test_tests_that_ask_for_a_device_are_found(tmp_path: Path) -> None:
    for name, text in {
        "test_a.py": "triton_device",
        "test_b.py": "torch.cuda.is_available()",
        "test_c.py": "1",
    }.items():
        (tmp_path / name).write_text(text)
    assert [Path(path).name for path in gpu_checks.device_tests(tmp_path)] == ["test_a.py", "test_b.py"]


TESTS = "import torch\nmark = torch.cuda.is_available()\ndef test_right(): pass\ndef test_wrong(): assert 0\n"


def test_outcomes_of_tests_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_x.py").write_text(TESTS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gpu_checks, "find_spec", lambda name: None)  # one process
    found = gpu_found.Found(tmp_path / "r.json")
    with pytest.raises(VerificationError, match=r"1 tests fail: tests/test_x.py::test_wrong"):
        gpu_checks.tests(found)
    assert found.result == {"counts": {"PASSED": 1, "FAILED": 1}, "failed": ["tests/test_x.py::test_wrong"]}


@pytest.mark.parametrize(
    "line, words",
    [
        ("tests/a.py::test_x[1-a b] PASSED    [ 50%]", ["tests/a.py::test_x[1-a b]", "PASSED"]),
        ("[gw1] [ 50%] FAILED tests/a.py::test_x[1-a b] ", ["FAILED", "tests/a.py::test_x[1-a b]"]),
        ("FAILED tests/a.py::test_x - AssertionError", None),  # of the summary, which would count it again
    ],
)
def test_lines_of_pytest(line: str, words: list[str] | None) -> None:
    found = gpu_checks._OUTCOME.search(line)
    assert (found and [word for word in found.groups() if word]) == words


def test_parts_find_quantspec_and_no_folder_beside_it(tmp_path: Path) -> None:
    program = "import quantspec.kernels, sys; from importlib.util import find_spec; "
    program += (
        "import json; json.dump({'result': {'shadow': find_spec('kernels') is not None}}, open(sys.argv[1], 'w'))"
    )
    found = run(tmp_path, Part("path", 0, 30), start=lambda name, result: [sys.executable, "-c", program, str(result)])
    assert found["path"]["result"] == {"shadow": False}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_done(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu", "--out", str(tmp_path / "out")])
    assert gpu.main() == 4
    assert "no CUDA device" in capsys.readouterr().err
    assert not os.path.exists(tmp_path / "out")
