"""llama.cpp as a contender: its own server, on the model's GGUF export; a worker of ``protocol``.

Prompts go to the server as token ids, texts come back as such, and seconds are the server's own, without HTTP. The same
integers as here, in its own numerics: its activations are rounded in blocks of 32, so that texts may differ.
"""

from __future__ import annotations

import atexit
import json
import os
import re
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from time import monotonic, sleep
from typing import Any

from quantspec.benchmarks.peers.process import Contender
from quantspec.benchmarks.peers.protocol import Answer, Answerer, Ask, peak_memory, serve
from quantspec.errors import ModelError, Unavailable
from quantspec.models.gguf.reader import is_gguf

NAME, SERVER = "llama.cpp", "llama-server"
_START_SECONDS, _ENDING_SECONDS = 600.0, 5.0
_GREEDY = {"temperature": 0.0, "top_k": 1, "samplers": ["top_k"]}


def contender(model: Path, context: int, threads: int, server: Path | None = None) -> Contender:
    """The column of a model folder or GGUF file; without a server (named, or on the PATH) it says so."""
    found = shutil.which(SERVER if server is None else str(server))
    if found is None:
        where = "is not on the PATH" if server is None else f"cannot be run: {server}"
        return Contender(name=NAME, error=f"not installed: {SERVER} {where}")
    options = {"model": str(model), "context": context, "threads": threads, "server": found}
    return Contender(name=NAME, module=__name__, options=options)


def load(options: Mapping[str, Any]) -> tuple[Mapping[str, Any], Answerer]:
    """Export the model, if it is not GGUF already, and start a server on it. Raises ``ModelError``, ``Unavailable``."""
    binary, model = Path(options["server"]), Path(options["model"])
    with tempfile.TemporaryDirectory(prefix="quantspec-gguf-") as scratch:
        notes: list[str] = []
        if not is_gguf(model):
            model, notes = _export(model, Path(scratch) / "model.gguf")
        # The file may go once it is loaded: the server has it open or mapped.
        server = Server(binary, model, options["context"], options["threads"])
    atexit.register(server.close)
    flags = f"{server.flags}; {server.features}".rstrip("; ")
    return {"describe": f"llama.cpp {version(binary)}", "flags": flags, "notes": notes}, server.answer


def version(binary: Path) -> str:
    """As the server itself says it, with the compiler that built it."""
    try:
        ran = subprocess.run([binary, "--version"], capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"{binary} cannot be run: {error}") from error
    lines = [line.strip() for line in f"{ran.stderr}\n{ran.stdout}".splitlines()]
    said = [line for line in lines if line.startswith(("version:", "built with"))]
    return ", ".join(line.removeprefix("version:").strip() for line in said) or "of unknown version"


def _export(folder: Path, file: Path) -> tuple[Path, list[str]]:
    """The model as a GGUF file: integers as they are, and, as here, a dense vocabulary beside them in 8 bits."""
    from quantspec.calibrate.export.gguf import export_gguf
    from quantspec.calibrate.export.gguf_config import GGUFOptions
    from quantspec.calibrate.export.source import Source
    from quantspec.calibrate.quantize.stream import EMBEDDING
    from quantspec.models.tensors import TensorStore

    eight = Source.open(folder).config.quantization is not None and EMBEDDING in TensorStore(folder)
    report = export_gguf(folder, file, GGUFOptions(vocabulary="q8_0" if eight else "auto"))
    return file, report.notes


class Server:
    """A llama-server on this machine's own interface, ready when made. Raises ``ModelError`` when it does not start."""

    def __init__(self, binary: Path, model: Path, context: int, threads: int) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        flags = ["-c", str(context), "-np", "1", "-t", str(threads), "-tb", str(threads), "--no-webui"]
        self.flags = " ".join(flags)
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the server
        place = ["--host", "127.0.0.1", "--port", str(self._port)]
        self._process = subprocess.Popen(
            [binary, "-m", model, *flags, *place], stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log
        )
        try:
            self._wait()
        except BaseException:
            self.close()
            raise

    @property
    def features(self) -> str:
        """What it was built with, as it says itself, such as ``AVX2 FMA OPENMP``."""
        lines = [line for line in self._said() if line.startswith("system_info:")]
        return " ".join(re.findall(r"(\w+) = 1 \|", lines[-1])) if lines else ""

    def answer(self, ask: Ask) -> Answer:
        """Generate greedily. Raises ``ModelError`` when the server fails or is gone."""
        wanted = {"prompt": ask.tokens, "n_predict": ask.max_new_tokens, "cache_prompt": False, "return_tokens": True}
        found = self._request("POST", "/completion", {**wanted, **_GREEDY})
        try:
            times, tokens = found["timings"], tuple(map(int, found["tokens"]))
            first = times["prompt_ms"] / 1000
            return Answer(
                tokens=tokens,
                seconds=first + times["predicted_ms"] / 1000,
                first_token_seconds=first,
                peak_memory_bytes=peak_memory(self._process.pid),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(f"{SERVER} answered without tokens or timings", hint="take a newer one") from error

    def close(self) -> None:
        """End it; a second time does nothing."""
        self._process.kill()
        self._process.wait()
        self._log.close()

    def _wait(self) -> None:
        deadline = monotonic() + _START_SECONDS
        while monotonic() < deadline:
            try:
                if self._request("GET", "/health").get("status") == "ok":
                    return
            except (ConnectionRefusedError, ConnectionResetError):  # does not listen yet
                pass
            sleep(0.1)
        raise ModelError(f"{SERVER} did not load the model within {_START_SECONDS:.0f} s")

    def _request(self, verb: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """A reply's JSON object. Raises ``ModelError``; ``ConnectionRefusedError`` while it starts."""
        connection = HTTPConnection("127.0.0.1", self._port)
        try:
            connection.request(verb, path, None if body is None else json.dumps(body))
            found = json.loads(connection.getresponse().read())
        except (OSError, HTTPException, ValueError) as error:
            if verb == "GET" and isinstance(error, ConnectionError) and self._process.poll() is None:
                raise  # it may not listen yet
            raise ModelError(self._how_it_ended()) from error
        finally:
            connection.close()
        failure = found.get("error")
        if failure and failure.get("type") != "unavailable_error":  # which it is while it loads
            raise ModelError(f"{SERVER}: {failure.get('message', failure)}")
        return dict(found)

    def _how_it_ended(self) -> str:
        with suppress(subprocess.TimeoutExpired):  # its end may be told a little after its connection's
            self._process.wait(_ENDING_SECONDS)
        code = self._process.poll()
        last = next((line for line in reversed(self._said()) if line), "")
        how = "gave no sound answer" if code is None else f"ended with exit code {code}"
        return f"{SERVER} {how}: {last}" if last else f"{SERVER} {how}"

    def _said(self) -> list[str]:
        descriptor = self._log.fileno()
        said = os.pread(descriptor, os.fstat(descriptor).st_size, 0)  # a seek would move where the server writes
        return [line.strip() for line in said.decode(errors="replace").splitlines()]


if __name__ == "__main__":
    serve(load)
