"""llama.cpp's server as a contender, by a program that answers as that server does."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path
from time import monotonic, sleep

import pytest

from quantspec.benchmarks.peers import llama_cpp
from quantspec.benchmarks.peers.process import PeerError, PeerProcess
from quantspec.benchmarks.peers.protocol import Ask
from quantspec.errors import ModelError
from quantspec.models.gguf.reader import is_gguf
from quantspec.models.resolve import resolve

SERVER = """#!{python}
import json, os, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
if "--version" in sys.argv:
    sys.exit(print("version: 4748 (abc)\\nbuilt with cc 12", file=sys.stderr))
port, model = int(sys.argv[sys.argv.index("--port") + 1]), sys.argv[sys.argv.index("-m") + 1]
if {how!r} == "no start":
    sys.exit("the model is damaged")
print("system_info: n_threads = 2 | CPU : AVX2 = 1 | AVX512 = 0 |", flush=True)
open({trace!r}, "w").write(f"{{os.getpid()}} {{os.path.getsize(model)}}")
class Handler(BaseHTTPRequestHandler):
    asked = 0
    def say(self, code, found):
        self.send_response(code)
        self.end_headers()
        self.wfile.write(json.dumps(found).encode())
    def do_GET(self):
        Handler.asked += 1
        loading = {{"error": {{"message": "Loading model", "type": "unavailable_error"}}}}
        self.say(*((503, loading) if Handler.asked == 1 else (200, {{"status": "ok"}})))
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if {how!r} == "crash":
            print("GGML_ASSERT failed", flush=True)
            os.abort()
        if {how!r} == "refuse":
            return self.say(400, {{"error": {{"message": "the prompt is too long", "type": "invalid_request_error"}}}})
        tokens = [each + 1 for each in body["prompt"]][: body["n_predict"]]
        self.say(200, {{"tokens": tokens, "timings": {{"prompt_ms": 20.0, "predicted_ms": 30.0}}}})
    def log_message(self, *args):
        pass
HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + bytes(60))
    return path


def _server(folder: Path, how: str = "") -> Path:
    path = folder / "llama-server"
    path.write_text(SERVER.format(python=sys.executable, how=how, trace=str(folder / "trace")))
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def _process(model: Path, server: Path) -> PeerProcess:
    return PeerProcess(llama_cpp.contender(model, 64, 2, server), 1)


def test_without_a_server_the_column_says_so(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert llama_cpp.contender(model, 64, 2).error == "not installed: llama-server is not on the PATH"
    assert "cannot be run" in llama_cpp.contender(model, 64, 2, tmp_path / "other").error


def test_it_answers_in_tokens_and_with_its_own_seconds(model: Path, tmp_path: Path) -> None:
    process = _process(model, _server(tmp_path))
    ready = process.load(60)
    assert ready["describe"] == "llama.cpp 4748 (abc), built with cc 12"
    assert ready["flags"] == "-c 64 -np 1 -t 2 -tb 2 --no-webui; AVX2"
    answer = process.ask(Ask(tokens=(5, 6, 7), text="", max_new_tokens=2, extra={}), 60)
    assert answer.tokens == (6, 7)
    assert answer.seconds == pytest.approx(0.05)
    assert answer.first_token_seconds == pytest.approx(0.02)
    assert answer.peak_memory_bytes is None or answer.peak_memory_bytes > 0  # systems without /proc do not tell
    server = int((tmp_path / "trace").read_text().split()[0])
    process.close()
    assert _ends(server)


@pytest.mark.parametrize(("how", "said"), [("crash", "GGML_ASSERT failed"), ("refuse", "the prompt is too long")])
def test_what_goes_wrong_is_told_in_one_line(model: Path, tmp_path: Path, how: str, said: str) -> None:
    process = _process(model, _server(tmp_path, how))
    process.load(60)
    with pytest.raises(PeerError, match=said):
        process.ask(Ask(tokens=(5,), text="", max_new_tokens=2, extra={}), 60)
    process.close()


def test_a_server_that_does_not_start_says_why(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="exit code 1: the model is damaged"):
        llama_cpp.Server(_server(tmp_path, "no start"), model, 64, 1)


def test_a_folder_is_exported_with_integers_kept_and_the_file_is_gone_once_loaded(tmp_path: Path) -> None:
    folder = resolve("default/target-w4")
    process = _process(folder, _server(tmp_path))
    notes = process.load(120)["notes"]
    assert any("rounded to Q8_0" in note for note in notes)  # the dense vocabulary, as the kernels here round it
    assert int((tmp_path / "trace").read_text().split()[1]) > 4_000_000
    process.close()
    file, _ = llama_cpp._export(folder, tmp_path / "model.gguf")
    assert is_gguf(file)


def _ends(process: int) -> bool:
    deadline = monotonic() + 20
    while monotonic() < deadline:
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return True
        sleep(0.05)
    return False
