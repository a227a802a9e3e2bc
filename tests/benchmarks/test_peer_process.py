"""Processes that answer, fail, crash, hang and talk nonsense."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from quantspec.benchmarks.peers.process import Contender, PeerError, PeerProcess
from quantspec.benchmarks.peers.protocol import Answer, Ask, peak_memory

ASK = Ask(tokens=(1, 2), text="", max_new_tokens=4, extra={})
LIMIT = 60.0
Start = Callable[[str], PeerProcess]


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
    started: list[PeerProcess] = []

    def begin(method: str, module: str = "stub_engine") -> PeerProcess:
        started.append(PeerProcess(Contender(name=method, module=module, options={"method": method}), threads=1))
        return started[-1]

    yield begin
    for process in started:
        process.close()


def test_question_and_answer(start: Start) -> None:
    process = start("none")
    assert process.load(LIMIT)["describe"] == "none"
    answer = process.ask(ASK, LIMIT)
    assert answer == process.ask(ASK, LIMIT)
    assert (answer.tokens, answer.accepted) == ((5, 12, 19, 26), (3,))
    process.close()
    process.close()
    with pytest.raises(PeerError):
        process.ask(ASK, LIMIT)


def test_an_error_leaves_the_process_alive(start: Start) -> None:
    process = start("raise")
    process.load(LIMIT)
    process.ask(ASK, LIMIT)
    with pytest.raises(PeerError, match=r"^ValueError: no luck$") as caught:
        process.ask(ASK, LIMIT)
    assert not caught.value.fatal
    assert process.ask(ASK, LIMIT).tokens


def test_a_crash_says_its_last_words(start: Start) -> None:
    process = start("crash")
    process.load(LIMIT)
    process.ask(ASK, LIMIT)
    with pytest.raises(PeerError, match=r"^crashed with SIGSEGV: last words$") as caught:
        process.ask(ASK, LIMIT)
    assert caught.value.fatal


def test_who_hangs_is_ended(start: Start) -> None:
    process = start("hang")
    process.load(LIMIT)
    with pytest.raises(PeerError, match=r"^gave no answer within 0 s$") as caught:
        process.ask(ASK, 0.2)
    assert caught.value.fatal
    assert process._process.poll() is not None


def test_nonsense_is_seen(start: Any) -> None:
    process = start("garbage")
    process.load(LIMIT)
    with pytest.raises(PeerError, match="another protocol"):
        process.ask(ASK, LIMIT)
    with pytest.raises(PeerError, match="RuntimeError: no weights"):
        start("unloadable").load(LIMIT)
    with pytest.raises(PeerError, match=r"exit code 1: .*No module named"):
        start("none", module="no_such_module").load(LIMIT)
    with pytest.raises(PeerError, match="another protocol"):
        start("none", module="this").load(LIMIT)  # which prints a poem


def test_what_is_no_answer() -> None:
    for damage in ({}, {"tokens": [1], "seconds": 0}, {"tokens": ["x"], "seconds": 1.0}, {"tokens": 3, "seconds": 1.0}):
        with pytest.raises((KeyError, TypeError, ValueError)):
            Answer.from_dict(damage)


def test_peak_memory_is_of_the_process() -> None:
    mine = peak_memory()
    assert mine is None or 10**7 < mine < 10**11
    assert peak_memory("no such process") is None
