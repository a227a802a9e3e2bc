"""The benchmark's side of ``protocol``: processes that are started, asked, and ended when they hang."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, Literal

from quantspec.benchmarks.peers.protocol import Answer, Ask
from quantspec.errors import one_line

_CLOSING_SECONDS = 5.0
_SPIN = "GOMP_SPINCOUNT"
"""How long OpenMP's workers spin before they sleep. Beside two busy processes transformers falls from 36 tokens/s
to 1 by libgomp's default, so that short spinning is the kinder setting for it too."""
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A column of the comparison.

    ``module`` is the worker that ``python -m`` runs, ``options`` what it loads (JSON), ``ask`` what it is told besides
    with each question. Contenders of equal module and options share one process. ``error``: why it is not there at all.
    """

    name: str
    kind: Literal["ours", "peer"] = "peer"
    module: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    ask: Mapping[str, Any] = field(default_factory=dict)
    error: str = ""

    @property
    def process_key(self) -> str:
        return json.dumps([self.module, self.options], sort_keys=True)


class PeerError(Exception):
    """What a process answered, or why it did not; one line. ``fatal``: it is gone."""

    def __init__(self, line: str, *, fatal: bool) -> None:
        super().__init__(one_line(line))
        self.fatal = fatal


class PeerProcess:
    """A worker in a process group of its own, so that Ctrl-C reaches it only through its parent."""

    def __init__(self, contender: Contender, threads: int) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed by _end
        environment = {_SPIN: "1000", **os.environ, **dict.fromkeys(_THREADS, str(threads))}
        environment["TOKENIZERS_PARALLELISM"] = "false"
        self._process = subprocess.Popen(
            [sys.executable, "-m", contender.module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=environment,
            start_new_session=True,
        )
        self._options, self._unread = contender.options, b""

    def load(self, limit: float) -> dict[str, Any]:
        """What the worker says of itself. Raises ``PeerError``."""
        ready = self._exchange({"load": dict(self._options)}, limit).get("ready")
        if not isinstance(ready, dict):
            raise self._gone("speaks another protocol")
        return ready

    def ask(self, ask: Ask, limit: float) -> Answer:
        """Its answer within ``limit`` seconds. Raises ``PeerError``."""
        question = {"tokens": ask.tokens, "text": ask.text, "max_new_tokens": ask.max_new_tokens, "extra": ask.extra}
        try:
            return Answer.from_dict(self._exchange({"ask": question}, limit)["answer"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise self._gone("speaks another protocol") from error

    def close(self) -> None:
        """End it: by the end of its input, or by force."""
        with suppress(OSError, subprocess.TimeoutExpired):
            if self._process.stdin is not None:
                self._process.stdin.close()
            self._process.wait(_CLOSING_SECONDS)
        self._end()

    def _exchange(self, message: Mapping[str, Any], limit: float) -> dict[str, Any]:
        assert self._process.stdin is not None, "a pipe"
        try:
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()
        except OSError as error:
            raise self._gone(self._how_it_ended()) from error
        line = self._line(monotonic() + limit)
        if line is None:
            raise self._gone(f"gave no answer within {limit:.0f} s")
        try:
            reply = json.loads(line)
        except ValueError as error:
            raise self._gone(self._how_it_ended() if not line else "speaks another protocol") from error
        if not isinstance(reply, dict):
            raise self._gone("speaks another protocol")
        if "error" in reply:
            raise PeerError(str(reply["error"]), fatal=False)
        return reply

    def _line(self, deadline: float) -> bytes | None:
        """The next line; empty where its output ended, None past the deadline."""
        assert self._process.stdout is not None, "a pipe"
        descriptor = self._process.stdout.fileno()
        while b"\n" not in self._unread:
            left = deadline - monotonic()
            if left <= 0 or not select.select([descriptor], [], [], left)[0]:
                return None
            piece = os.read(descriptor, 1 << 16)
            if not piece:
                return b""
            self._unread += piece
        line, _, self._unread = self._unread.partition(b"\n")
        return line

    def _how_it_ended(self) -> str:
        try:
            code = self._process.wait(_CLOSING_SECONDS)
        except subprocess.TimeoutExpired:
            return "closed its output"
        how = f"crashed with {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        self._errors.seek(0)
        lines = self._errors.read()[-10_000:].decode(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return f"{how}: {last}" if last else how

    def _gone(self, why: str) -> PeerError:
        self._end()
        return PeerError(why, fatal=True)

    def _end(self) -> None:
        """The whole group: a worker may have started a server."""
        if self._errors.closed:
            return
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with suppress(OSError):  # what was not yet written to one that is gone
                if pipe is not None:
                    pipe.close()
        self._errors.close()
