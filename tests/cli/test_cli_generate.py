"""``quantspec generate`` on a tiny random model: what it prints, where, and in which form."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
from pathlib import Path

import pytest

from quantspec.cli.render import StageColors
from quantspec.types import Chunk

PROMPT = "Question: a baker has 24 rolls"
REQUIRED_STATS = {"new_tokens", "target_forwards", "acceptance_length", "tokens_per_second", "stages", "exactness"}


def as_json(call, *arguments: object) -> dict:
    result = call("generate", PROMPT, "--json", "-n", 24, *arguments)
    assert result.code == 0, result.err
    return json.loads(result.out)


def test_json_has_the_documented_form(call, tiny: Path) -> None:
    record = as_json(call, "--model", tiny, "--method", "none", "--ignore-eos")
    assert record.keys() == {"text", "token_ids", "finish_reason", "seed", "stats"}
    assert record["stats"].keys() >= REQUIRED_STATS
    stats = record["stats"]
    assert (stats["new_tokens"], stats["target_forwards"], stats["acceptance_length"]) == (24, 23, 1.0)
    assert stats["stages"] == {"target": 24}
    assert (record["finish_reason"], stats["exactness"]) == ("length", "exact")
    assert len(record["token_ids"]) == 24


def test_kernels_by_name(call, tiny: Path) -> None:
    options = ("--model", tiny, "--method", "none", "--ignore-eos")
    native = as_json(call, *options)
    assert (
        native["stats"]["backend"] == as_json(call, *options, "--activations", "fp32")["stats"]["backend"] == "cpu-fp32"
    )
    reference = as_json(call, *options, "--backend", "reference-fast")["stats"]
    assert (reference["backend"], reference["exactness"]) == ("reference-fast", "exact_to_rounding")
    result = call("generate", PROMPT, *options, "--activations", "int8")
    assert (result.code, result.out) == (2, "")
    assert "no kernel for dense weights with int8 activations on cpu. hint: cpu-int8 needs " in result.error


@pytest.mark.parametrize("sampling", [(), ("--temperature", 1.2, "--top-p", 0.9, "--repetition-penalty", 1.1)])
def test_all_methods_print_the_same_text(call, tiny: Path, drafter: Path, sampling: tuple[object, ...]) -> None:
    plain = as_json(call, "--model", tiny, "--method", "none", "--seed", 5, *sampling)
    lookup = as_json(call, "--model", tiny, "--method", "lookup", "--seed", 5, *sampling)
    drafted = as_json(call, "--model", tiny, "--draft-model", drafter, "--seed", 5, *sampling)
    config = '{"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2}'
    ngram = as_json(call, "--model", tiny, "--speculative-config", config, "--seed", 5, *sampling)
    assert plain["token_ids"] == lookup["token_ids"] == drafted["token_ids"] == ngram["token_ids"]
    assert plain["text"] == lookup["text"] == drafted["text"] == ngram["text"]
    assert [each["stats"]["method"] for each in (plain, lookup, drafted, ngram)] == [
        "none",
        "lookup",
        "draft",
        "lookup",
    ]


def test_samples_are_a_list(call, tiny: Path) -> None:
    options = ("--model", tiny, "--method", "none", "--temperature", 1.5, "--seed", 3)
    records = as_json(call, *options, "--num-samples", 3)
    assert len(records) == 3
    assert records[0] == as_json(call, *options) | {"stats": records[0]["stats"]}
    assert len({record["text"] for record in records}) > 1


def test_logprobs(call, tiny: Path) -> None:
    record = as_json(call, "--model", tiny, "--method", "none", "--logprobs", 2)
    first = record["logprobs"][0]
    assert first["token_id"] == record["token_ids"][0] == first["top"][0][0]
    # The greedy token is the most likely one, and its log-probability is read from the same row.
    assert first["logprob"] == first["top"][0][1]
    assert len(record["logprobs"]) == len(record["token_ids"])


def test_text_goes_to_stdout_and_figures_to_stderr_without_ansi(call, tiny: Path) -> None:
    options = ("--model", tiny, "--method", "lookup", "-n", 16, "--ignore-eos")
    record = as_json(call, *options)
    result = call("generate", PROMPT, *options, "--show-stages")
    assert result.code == 0
    assert result.out == record["text"] + "\n"
    assert "\x1b" not in result.out + result.err
    lines = result.err.splitlines()
    assert "acceptance length" in lines[-2]
    assert ", exact, seed " in lines[-2]
    assert lines[-1].startswith("tokens by stage: ")


@pytest.mark.parametrize("source", ["file", "stdin", "dash"])
def test_prompt_sources(call, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    options = ("--model", tiny, "--method", "none", "-n", 8, "--json")
    expected = json.loads(call("generate", PROMPT, *options).out)["token_ids"]
    path = tmp_path / "prompt.txt"
    path.write_text(PROMPT)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(PROMPT.encode())))
    given = {"file": ("--prompt-file", path), "stdin": (), "dash": ("-",)}[source]
    assert json.loads(call("generate", *given, *options).out)["token_ids"] == expected


@pytest.mark.parametrize("which, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_text_after_the_token_in_work(
    call, tiny: Path, monkeypatch: pytest.MonkeyPatch, which: signal.Signals, code: int
) -> None:
    from quantspec.engine.llm import Generation

    step = Generation.__next__

    def interrupted(self: Generation) -> Chunk:
        chunk = step(self)
        if chunk.tokens and self.completions[0].stats.new_tokens == 3:
            os.kill(os.getpid(), which)
        return chunk

    monkeypatch.setattr(Generation, "__next__", interrupted)
    result = call("generate", PROMPT, "--model", tiny, "--method", "none", "--ignore-eos", "--json")
    assert result.code == code
    assert "the text is not whole" in result.error
    record = json.loads(result.out)
    assert (record["finish_reason"], len(record["token_ids"])) == ("cancelled", 3)


class _Words:
    """A tokenizer whose tokens are the characters of a text; token 0 completes nothing."""

    def stream(self) -> _Words:
        return self

    def push(self, token: int) -> str:
        return chr(token) if token else ""


def test_stage_colors_follow_the_released_text() -> None:
    painter = StageColors(_Words())  # type: ignore[arg-type]
    ids = [ord(letter) for letter in "abc"]
    # "c" is held back with the first chunk and released with the second.
    first = painter(Chunk((ids[0], ids[1], ids[2]), ("eagle", "eagle", "target"), text="ab"))
    second = painter(Chunk((ord("d"), 0), ("intermediate", "target"), text="cd"))
    assert first == "\x1b[32ma\x1b[0m\x1b[32mb\x1b[0m"
    assert second == "c\x1b[36md\x1b[0m"


def test_a_cache_of_few_bits(call, tiny: Path) -> None:
    options = ("--model", tiny, "--method", "none", "--ignore-eos", "--temp", 0)
    plain, small = (as_json(call, *options, "--kv-cache-dtype", dtype)["stats"] for dtype in ("auto", "int8"))
    assert (plain["kv_cache_dtype"], small["kv_cache_dtype"]) == ("auto", "int8")
    assert 0 < small["kv_cache_bytes"] < 0.3 * plain["kv_cache_bytes"]
    said = call("generate", PROMPT, *options, "-n", 2, "--kv-cache-dtype", "int8").err
    assert "note: " in said
    assert "no calibrated key factors" in said
    refused = call("generate", PROMPT, *options, "--kv-cache-dtype", "int4")
    assert refused.code == 2
    assert "hint: quantize it with --kv-cache-dtype int4" in refused.error
    unknown = call("generate", PROMPT, *options, "--kv-cache-dtype", "fp8")
    assert unknown.code == 2
    assert "auto" in unknown.error
