"""Engines on the kernels that were asked for: texts, labels, threads, and what the user is told."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

import quantspec
from quantspec.engine.llm import LLM
from quantspec.errors import ResourceError, UsageError
from quantspec.kernels.cpu import library, packed
from quantspec.kernels.cpu.library import bind
from quantspec.types import SamplingParams

PROMPTS = ("Question: A baker has 24 rolls and sells 9. How many are left?\nAnswer:", "def total(values):")
METHODS = ("none", "lookup", "draft", "eagle", "cascade")
NO_COMPILER = "no C++ compiler found"


def load(model: str = "default", **options: Any) -> tuple[LLM, list[str]]:
    told: list[str] = []
    return quantspec.load(model, notice=told.append, **options), told


def texts(llm: LLM, temperature: float = 0.0, tokens: int = 24) -> list[tuple[int, ...]]:
    params = SamplingParams(max_new_tokens=tokens, temperature=temperature, seed=3, ignore_eos=True)
    return [completion.token_ids for completion in llm.generate(PROMPTS, params)]  # type: ignore[union-attr]


@pytest.mark.parametrize("activations", ["int8", "fp32"])
def test_text_does_not_depend_on_the_drafter(activations: str) -> None:
    """The quantized family, whose weights, head and (in int8) activations take every path of the kernels."""
    made = {method: load(method=method, activations=activations) for method in METHODS}
    assert all(told == [] for _, told in made.values())
    llms = {method: llm for method, (llm, _) in made.items()}
    assert {llm.exactness for llm in llms.values()} == {"exact"}
    for temperature in (0.0, 0.8):
        plain = texts(llms["none"], temperature)
        assert all(texts(llm, temperature) == plain for llm in llms.values())
    stats = llms["cascade"].generate(PROMPTS[0], SamplingParams(max_new_tokens=24, ignore_eos=True)).stats
    assert (stats.backend, stats.as_dict()["backend"]) == (f"cpu-{activations}",) * 2
    assert stats.acceptance_length > 2


def test_without_a_compiler_one_line_says_that_the_reference_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "usable", lambda: NO_COMPILER)
    llm, told = load()
    assert told == [f"slower kernels run: {NO_COMPILER}"]
    assert (llm.exactness, llm.config.method) == ("exact", "cascade")
    asked, silent = load(backend="reference-exact", method="none")
    assert silent == []
    assert texts(llm) == texts(asked)


def test_what_a_draft_model_cannot_follow_is_told() -> None:
    llm, told = load("default/target-w4", draft_model="default/intermediate", backend="cpu-int8")
    (line,) = told
    assert line.startswith("default/intermediate runs on cpu-fp32: backend cpu-int8 cannot run this model here: ")
    assert texts(llm, tokens=8) == texts(load("default/target-w4", method="none")[0], tokens=8)


def test_a_target_that_cannot_run_so_is_refused() -> None:
    for options in ({"backend": "cpu-int8"}, {"activations": "int8"}):
        with pytest.raises(UsageError, match=r"needs quantized weights|no kernel for dense weights"):
            load("default/target", method="none", **options)
    with pytest.raises(UsageError, match="unknown backend 'cpu-int9'") as caught:
        load(backend="cpu-int9")
    assert "cpu-int8" in (caught.value.hint or "")


def test_no_room_for_packed_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(packed.mmap, "mmap", full)
    with pytest.raises(ResourceError, match="does not fit into memory"):
        load(method="none")


@pytest.mark.parametrize("backend,seen", [("cpu-int8", 1), ("reference-exact", 2)])
def test_torch_keeps_to_one_thread_while_native_kernels_decode(
    monkeypatch: pytest.MonkeyPatch, backend: str, seen: int
) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        llm, _ = load(method="none", backend=backend)
        model, threads = llm._engine.model, []
        forward = model.forward

        def spying(*arguments: Any, **named: Any) -> Any:
            threads.append(torch.get_num_threads())
            return forward(*arguments, **named)

        monkeypatch.setattr(model, "forward", spying)
        for _ in llm.stream(PROMPTS[0], SamplingParams(max_new_tokens=3, ignore_eos=True)):
            assert torch.get_num_threads() == 2
        assert set(threads) == {seen}
    finally:
        torch.set_num_threads(before)


def test_threads_are_the_native_kernels_too() -> None:
    before, count = torch.get_num_threads(), bind("qs_threads", ctypes.c_int, [])
    native = count()
    try:
        for threads in (1, 2):
            llm, _ = load(method="none", threads=threads)
            assert (count(), torch.get_num_threads()) == (threads, threads)
            assert texts(llm, tokens=6) == texts(load(method="none")[0], tokens=6)
    finally:
        library.set_threads(native)
        torch.set_num_threads(before)


FORKED = """
import os, sys, torch, quantspec
backend = sys.argv[1]
torch.set_num_threads(2)
llm = quantspec.load("default", backend=backend, threads=2)
params = quantspec.SamplingParams(max_new_tokens=8)
torch.ones(1_000_000).add_(1)  # torch's threads are there
plain = llm.generate("Question: 1+1?", params).token_ids
child = os.fork()
if child == 0:
    os._exit(0 if llm.generate("Question: 1+1?", params).token_ids == plain else 3)
_, status = os.waitpid(child, 0)
assert torch.get_num_threads() == 2
sys.exit(os.waitstatus_to_exitcode(status))
"""


@pytest.mark.parametrize("backend", ["cpu-int8", "reference-exact"])
def test_a_forked_child_generates_the_same_text(backend: str) -> None:
    """In a process of its own: a child that waits for ever ends with it. 60 s are far more than the two texts take."""
    process = subprocess.Popen([sys.executable, "-c", FORKED, backend], start_new_session=True)
    try:
        assert process.wait(timeout=60) == 0
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def test_a_dense_model_runs_natively(family: dict[str, Path]) -> None:
    llm, told = load(str(family["target"]), method="none")
    assert told == []
    stats = llm.generate("She", SamplingParams(max_new_tokens=4, ignore_eos=True)).stats
    assert (stats.backend, stats.exactness) == ("cpu-fp32", "exact")
