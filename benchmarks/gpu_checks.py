"""Parts of ``benchmarks.gpu`` that check: a failed one raises ``VerificationError``, having left what it found."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch

from quantspec.benchmarks.cuda_timing import current_device
from quantspec.benchmarks.gpu_found import KERNELS, Found, attempt, refuse
from quantspec.benchmarks.shapes import SHAPES
from quantspec.errors import Unavailable, VerificationError

if TYPE_CHECKING:
    from quantspec.models.load_triton import Kernels

HALVES = (torch.bfloat16, torch.float16)
METHODS = ("none", "eagle", "cascade", "draft", "lookup")
PROMPTS = (
    "Question: A baker makes 24 rolls an hour for 6 hours and sells 100 of them. How many are left?\nAnswer:",
    "Question: Tom has three times as many marbles as Ann, who has 14. How many have they together?\nAnswer:",
    "def fibonacci(n):\n",
    "The history of the printing press begins",
)
"""Written for this: not of any training data."""
_ASKS = re.compile(r"triton_device|cuda\.is_available\(\)")
_OUTCOME = re.compile(
    r"^(\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED)|^\[gw\d+\].* (PASSED|FAILED|ERROR|SKIPPED) (\S+::.+?) *$"
)
"""A line of ``pytest -v``, without and with processes."""


def products(found: Found) -> None:
    """Packed products against fp64, and their rows at n = 1 to 64."""
    from quantspec.benchmarks import gpu_kernels

    wrong = attempt(found, "cuda", lambda: gpu_kernels.check("cuda", current_device(), HALVES))
    wrong += attempt(found, "triton", lambda: gpu_kernels.check("triton", current_device(), (*HALVES, torch.float32)))
    refuse(wrong)


def triton(found: Found) -> None:
    """Triton's other kernels against fp64."""
    from quantspec.benchmarks import gpu_triton

    found.put(errors=gpu_triton.check(current_device()))


def prove(found: Found) -> None:
    """Rows of whole decoders, in chains and trees, against one token at a time."""
    from quantspec.benchmarks.cuda_model import random_cuda_decoder
    from quantspec.models import prove as proof

    wrong = []
    for name, layers in (("8b", 4), ("70b", 2), ("1b", 4)):
        for kernels in KERNELS:

            def agree(name: str = name, layers: int = layers, kernels: Kernels = kernels) -> bool:
                shape = replace(SHAPES[name], layers=layers)
                return proof.rows_agree(random_cuda_decoder(shape, 128, kernels, current_device(), seed=0))

            place = f"{name}, {layers} layers, {kernels}"
            wrong += attempt(found, place, agree)
            if found.result[place] is False:
                wrong.append(f"{place}: rows change with their number")
    refuse(wrong)


def probe(found: Found) -> None:
    """Whether ``wgmma`` and ``mma.sync`` add up alike: the share of sums whose bits differ."""
    from quantspec.kernels.cuda.probe import differences

    found.put(differ=differences(current_device().index))


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
            return {
                "loaded": llms["none"].describe(),
                "exactness": llms["none"].exactness,
                "texts": texts,
                "tokens_per_second": speeds,
            }

        wrong += attempt(found, backend, run)
        texts = found.result[backend].get("texts", [])
        wrong += [f"{backend}: {line}" for line in differences(texts)]
    refuse(wrong)


def differences(texts: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each method some of whose texts differ from plain decoding's."""
    counts: Counter[str] = Counter()
    for text in texts:
        for setting in text.values():
            counts.update(method for method, place in setting["differs_at"].items() if place is not None)
    total = sum(map(len, texts))
    return [f"{count} of {total} texts of {method} differ from plain decoding" for method, count in counts.items()]


def tests(found: Found) -> None:
    """The tests that behave otherwise where there is a device, on this one."""
    files = device_tests(Path("tests"))
    if not files:
        raise Unavailable("there are no tests here", hint="run from a checkout")
    words = [sys.executable, "-m", "pytest", "--import-mode=importlib", "-v", "--tb=short", "-p", "no:cacheprovider"]
    words += ["-n", "4"] if find_spec("xdist") else []
    ran = subprocess.Popen([*words, *files], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    counts: Counter[str] = Counter()
    failed: list[str] = []
    assert ran.stdout is not None
    for line in ran.stdout:
        print(line, end="", flush=True)
        if outcome := _OUTCOME.search(line):
            words = [word for word in outcome.groups() if word]
            counts[next(word for word in words if word.isupper())] += 1
            failed += [word for word in words if "::" in word and ("FAILED" in words or "ERROR" in words)]
            found.put(counts=counts, failed=failed)
    if ran.wait():
        raise VerificationError(f"{len(failed)} tests fail: {', '.join(failed[:5])}" if failed else "pytest failed")


def device_tests(folder: Path) -> list[str]:
    """Files that ask for a device or take one where it is, but those of the benchmarks, which pretend one."""
    return sorted(
        str(path)
        for path in folder.rglob("test_*.py")
        if path.parent.name != "benchmarks" and _ASKS.search(path.read_text(encoding="utf-8"))
    )


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
    refuse(wrong)


def sanitized(found: Found) -> None:
    """What ``sanitizer`` runs."""
    from quantspec.benchmarks import gpu_kernels, gpu_triton

    cases = (gpu_kernels.Case(300, 384), gpu_kernels.Case(1000, 2048, bits=8))
    for kind in KERNELS:
        gpu_kernels.check(kind, current_device(), (torch.bfloat16,), cases, widths=(1, 8, 17, 33, 64))
    gpu_triton.check(current_device(), (torch.bfloat16,))
