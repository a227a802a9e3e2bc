"""The parts of ``benchmarks.gpu``, one a process: ``python -m quantspec.benchmarks.gpu_parts NAME RESULT.json``.

What a part has found is written after each of its steps, so that one that is stopped or fails leaves what it had.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import torch

from quantspec.benchmarks import cuda_timing
from quantspec.benchmarks.config import DecodeBench, KernelBench
from quantspec.benchmarks.shapes import SHAPES
from quantspec.errors import QuantSpecError, Unavailable, VerificationError
from quantspec.models.atomic import write_bytes
from quantspec.models.load_triton import Kernels

PRODUCTS = {
    "70b gate_up": (8192, 57344, 4),
    "8b gate_up": (4096, 28672, 4),
    "8b o": (4096, 4096, 4),
    "8b head": (4096, 128256, 8),
    "8b down": (14336, 4096, 4),
    "8b qkv": (4096, 6144, 4),
    "70b down": (28672, 8192, 4),
}
"""``(K, N, bits)`` of matrices of Llama 3.1, in the order in which they are measured."""
WIDTHS = (1, 2, 4, 8, 16, 32, 48, 64)
KERNELS: tuple[Kernels, ...] = ("cuda", "triton")
HALVES = (torch.bfloat16, torch.float16)
METHODS = ("none", "eagle", "cascade", "draft", "lookup")
PROMPTS = (
    "Question: A baker makes 24 rolls an hour for 6 hours and sells 100 of them. How many are left?\nAnswer:",
    "Question: Tom has three times as many marbles as Ann, who has 14. How many have they together?\nAnswer:",
    "def fibonacci(n):\n",
    "The history of the printing press begins",
)
"""Written for this: not of any training data."""
NOT_HERE = ("emulated", "compile", "cuda_build")
"""Tests that need no device, though their names say triton or cuda."""


class Found:
    """What a part has found so far, and the file that holds it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.result: dict[str, Any] = {}

    def put(self, **values: Any) -> None:
        self.result |= values
        self._write({})

    def say_why(self, why: str) -> None:
        self._write({"why": why})

    def _write(self, more: dict[str, str]) -> None:
        write_bytes(self._path, json.dumps({"result": self.result, **more}).encode())


def environment(found: Found) -> None:
    """What is there, and what the device's memory and its matrix units give."""
    packages = ("torch", "triton", "transformers", "bitsandbytes", "gptqmodel", "numpy")
    found.put(
        python=platform.python_version(),
        system=platform.platform(),
        cores=len(os.sched_getaffinity(0)),
        packages={name: _version(name) for name in packages},
        cuda=torch.version.cuda,
        nvcc=_first_line(["nvcc", "--version"], "release"),
        driver=_first_line(["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem", "--format=csv,noheader"]),
        commit=_first_line(["git", "rev-parse", "HEAD"]),
    )
    found.put(**look().json())


def build(found: Found) -> None:
    """Compile the CUDA kernels for every format of weights that other parts use, side by side."""
    from quantspec.benchmarks.gpu_kernels import CASES
    from quantspec.kernels.cuda import build, library
    from quantspec.kernels.cuda.packed import format_for

    target = library.load(_index()).target
    weights = (replace(case, n_out=1).weight(torch.bfloat16, _device()) for case in CASES)
    formats = list(dict.fromkeys(map(format_for, weights)))

    def seconds(tile: Any) -> float:
        began = perf_counter()
        build.build(target, tile)
        return round(perf_counter() - began, 1)

    with ThreadPoolExecutor(len(formats)) as threads:
        found.put(seconds=dict(zip(map(str, formats), threads.map(seconds, formats), strict=True)))


def products(found: Found) -> None:
    """Packed products against fp64, and their rows at n = 1 to 64."""
    from quantspec.benchmarks import gpu_kernels

    wrong = _attempt(found, "cuda", lambda: gpu_kernels.check("cuda", _device(), HALVES))
    wrong += _attempt(found, "triton", lambda: gpu_kernels.check("triton", _device(), (*HALVES, torch.float32)))
    _refuse(wrong)


def triton(found: Found) -> None:
    """Triton's other kernels against fp64."""
    from quantspec.benchmarks import gpu_triton

    found.put(errors=gpu_triton.check(_device()))


def kernels(found: Found) -> None:
    """``bench kernels`` over matrices of Llama 3.1."""
    from quantspec.benchmarks import cuda_kernels

    machine, rows = look(), []
    for name, (k, n_out, bits) in PRODUCTS.items():
        config = KernelBench(shapes=((k, n_out),), widths=WIDTHS, device="cuda", rounds=9)
        report = cuda_kernels.run(config, _say, bits=bits, machine=machine)
        rows += [{"matrix": name, "dtype": "bfloat16", **row} for row in report["rows"]]
        found.put(**machine.json(), left_out=report["left_out"], rows=rows)
    k, n_out, bits = PRODUCTS["70b gate_up"]
    config = KernelBench(shapes=((k, n_out),), widths=WIDTHS, device="cuda", rounds=9, backends=("cuda", "triton"))
    report = cuda_kernels.run(config, _say, bits=bits, dtype=torch.float16, machine=machine)
    rows += [{"matrix": "70b gate_up", "dtype": "float16", **row} for row in report["rows"]]
    machine = look_again(machine)
    found.put(**machine.json(), rows=rows)


def decode(shape: str, kernels: Kernels | None = None) -> Callable[[Found], None]:
    """``bench decode`` with random weights of a shape."""

    def measure(found: Found) -> None:
        from quantspec.benchmarks import cuda_decode

        config = DecodeBench(shape=SHAPES[shape], device="cuda", kernels=kernels, tokens=200, widths=WIDTHS, rounds=5)
        found.put(**cuda_decode.run(config, _say))

    return measure


def generate(found: Found) -> None:
    """Text of the default family by every method, token for token that of plain decoding."""
    import quantspec
    from quantspec.benchmarks import equality
    from quantspec.types import SamplingParams

    wrong = []
    for backend in KERNELS:

        def run(backend: str = backend) -> dict[str, Any]:
            llms = {
                method: quantspec.load("default", method=method, device="cuda", backend=backend) for method in METHODS
            }
            texts = [equality.compare(llms, llms["none"].tokenizer.encode(prompt), 96) for prompt in PROMPTS]
            speeds = {}
            for method, llm in llms.items():
                done = llm.generate(PROMPTS[0], SamplingParams(max_new_tokens=128, ignore_eos=True, seed=0))
                assert not isinstance(done, list)
                speeds[method] = round(done.stats.decode_tokens_per_second, 1)
            return {"exactness": llms["none"].exactness, "texts": texts, "tokens_per_second": speeds}

        wrong += _attempt(found, backend, run)
        texts = found.result[backend].get("texts", [])
        wrong += [f"{backend}: {line}" for line in differences(texts)]
    _refuse(wrong)


def differences(texts: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each method some of whose texts differ from plain decoding's."""
    counts: Counter[str] = Counter()
    for text in texts:
        for setting in text.values():
            counts.update(method for method, place in setting["differs_at"].items() if place is not None)
    total = sum(map(len, texts))
    return [f"{count} of {total} texts of {method} differ from plain decoding" for method, count in counts.items()]


def tests(found: Found) -> None:
    """The tests of the kernels and of what runs on them, on this device."""
    files = sorted(
        str(path)
        for path in Path("tests").rglob("test_*.py")
        if re.search("triton|cuda|gpu", path.name) and not any(word in path.name for word in NOT_HERE)
    )
    if not files:
        raise Unavailable("there are no tests here", hint="run from a checkout")
    words = [sys.executable, "-m", "pytest", "--import-mode=importlib", "-q", "-p", "no:cacheprovider", *files]
    words += ["-n", "4"] if find_spec("xdist") else []
    ran = subprocess.run(words, capture_output=True, text=True, check=False)
    print(ran.stdout, ran.stderr)
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", ran.stdout, re.MULTILINE)
    found.put(files=files, summary=ran.stdout.strip().splitlines()[-1:], failed=failed)
    if ran.returncode:
        raise VerificationError(f"{len(failed)} tests fail: {', '.join(failed[:5])}" if failed else "pytest failed")


def prove(found: Found) -> None:
    """Rows of whole decoders, in chains and trees, against one token at a time."""
    from quantspec.benchmarks.cuda_model import random_cuda_decoder
    from quantspec.models import prove as proof

    wrong = []
    for name, layers in (("8b", 4), ("70b", 2), ("1b", 4)):
        for kernels in KERNELS:

            def agree(name: str = name, layers: int = layers, kernels: Kernels = kernels) -> bool:
                shape = replace(SHAPES[name], layers=layers)
                return proof.rows_agree(random_cuda_decoder(shape, 128, kernels, _device(), seed=0))

            place = f"{name}, {layers} layers, {kernels}"
            wrong += _attempt(found, place, agree)
            if found.result[place] is False:
                wrong.append(f"{place}: rows change with their number")
    _refuse(wrong)


def launch(found: Found) -> None:
    """Programmatic dependent launch, on and off: chains of one product, and a whole step of the 8B shape."""
    from quantspec.benchmarks.cuda_contenders import CudaField
    from quantspec.benchmarks.cuda_decode import CudaDecoding
    from quantspec.benchmarks.cuda_model import random_cuda_decoder
    from quantspec.kernels.cuda import library

    ready = library.load(_index())
    if not ready.programmatic:
        raise Unavailable("this device has no programmatic dependent launch")
    graphs: dict[tuple[str, bool], Callable[[], object]] = {}
    nbytes, count = {}, {}
    fields = {name: CudaField((k, n), 128, _device()) for name, (k, n, bits) in PRODUCTS.items() if bits == 4}
    chains = {name: field.contender("cuda") for name, field in fields.items()}
    decoding = CudaDecoding(random_cuda_decoder(SHAPES["8b"], 128, "cuda", _device(), seed=0), 512, 1, 8, 0)
    for on in (True, False):
        ready.programmatic = on
        for name, chain in chains.items():
            nbytes[name], count[name] = chain.nbytes, len(chain.layers)
            for n in (1, 16):
                x = torch.randn(n, fields[name].shape[0], device=_device(), dtype=torch.bfloat16)
                graphs[f"{name}, n = {n}", on] = cuda_timing.graph([partial(layer, x) for layer in chain.layers])
        graphs["8b step", on] = decoding.graphs(8)["graph"]
    ready.programmatic = True
    times = {key: median(each) for key, each in cuda_timing.alternate(graphs, rounds=9).items()}
    read = look().bandwidth
    for (what, on), seconds in times.items():
        name = what.partition(",")[0]
        each = seconds / count.get(name, 1)
        fraction = {"of_read": nbytes[name] / each / read} if name in nbytes else {}
        found.result.setdefault(what, {})["on" if on else "off"] = {"us": each * 1e6, **fraction}
    found.put()


def sanitizer(found: Found) -> None:
    """compute-sanitizer's tools on a few products and on Triton's other kernels."""
    program = shutil.which("compute-sanitizer")
    if program is None:
        raise Unavailable("compute-sanitizer is not on the PATH")
    wrong = []
    part = [sys.executable, "-m", "quantspec.benchmarks.gpu_parts", "sanitized"]
    for tool in ("memcheck", "racecheck", "synccheck"):
        began = perf_counter()
        with TemporaryDirectory() as scratch:
            words = [program, "--tool", tool, "--error-exitcode", "5", *part, f"{scratch}/result.json"]
            # So that each tensor has an allocation of its own: a step past its end is seen.
            variables = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
            ran = subprocess.run(words, env=variables, capture_output=True, text=True, check=False)
        print(ran.stdout[-4000:], ran.stderr[-4000:])
        lines = [line for line in ran.stdout.splitlines() if "ERROR SUMMARY" in line or "RACECHECK SUMMARY" in line]
        said = lines[-1].strip("= ") if lines else f"exit status {ran.returncode}"
        found.put(**{tool: {"said": said, "seconds": round(perf_counter() - began, 1)}})
        if ran.returncode:
            wrong.append(f"{tool}: {said}")
    _refuse(wrong)


def sanitized(found: Found) -> None:
    """What ``sanitizer`` runs."""
    from quantspec.benchmarks import gpu_kernels, gpu_triton

    cases = (gpu_kernels.Case(300, 384), gpu_kernels.Case(1000, 2048, bits=8))
    for kind in KERNELS:
        gpu_kernels.check(kind, _device(), (torch.bfloat16,), cases, widths=(1, 8, 17, 33, 64))
    gpu_triton.check(_device(), (torch.bfloat16,))


def look() -> Any:
    from quantspec.benchmarks.cuda_kernels import look_at_device

    return look_at_device(_device())


def look_again(machine: Any) -> Any:
    """The better of what the device did before and does now."""
    return max(machine, look(), key=lambda each: each.bandwidth)


def _attempt(found: Found, name: str, measure: Callable[[], Any]) -> list[str]:
    """Put what ``measure`` returns under the name; or why not, as the only entry of the list."""
    try:
        found.put(**{name: measure()})
    except QuantSpecError as error:
        found.put(**{name: {"error": str(error)}})
        return [f"{name}: {error}"]
    return []


def _refuse(wrong: list[str]) -> None:
    if wrong:
        raise VerificationError("; ".join(wrong))


def _device() -> torch.device:
    return cuda_timing.current_device()


def _index() -> int:
    return torch.cuda.current_device()


def _say(line: str) -> None:
    print(line, flush=True)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _first_line(words: list[str], containing: str = "") -> str | None:
    """Of what a program says, if it is there."""
    try:
        ran = subprocess.run(words, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return next((line.strip() for line in ran.stdout.splitlines() if containing in line), None)


PARTS: dict[str, Callable[[Found], None]] = {
    "environment": environment,
    "build": build,
    "products": products,
    "triton": triton,
    "kernels": kernels,
    "decode-8b": decode("8b"),
    "decode-8b-triton": decode("8b", "triton"),
    "decode-70b": decode("70b"),
    "decode-1b": decode("1b"),
    "generate": generate,
    "tests": tests,
    "prove": prove,
    "launch": launch,
    "sanitizer": sanitizer,
    "sanitized": sanitized,
}


def main() -> int:
    name, path = sys.argv[1:]
    found = Found(Path(path))
    try:
        PARTS[name](found)
    except QuantSpecError as error:
        traceback.print_exc()
        found.say_why(str(error))
        return error.exit_code
    except Exception as error:
        traceback.print_exc()
        found.say_why(f"{type(error).__name__}: {error}"[:400])
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
