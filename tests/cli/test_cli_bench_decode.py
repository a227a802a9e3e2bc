"""``quantspec bench decode`` on tiny models: what it reports adds up, and misuse is one line. No timing is asserted."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from quantspec.benchmarks import random_model
from quantspec.benchmarks.decode import Decoding, Steps, Work
from quantspec.benchmarks.kernels import set_threads
from quantspec.benchmarks.random_model import random_decoder
from quantspec.benchmarks.shapes import SHAPES, ModelShape, parse_shape
from quantspec.kernels.cpu import library, probes
from quantspec.kernels.cpu.forward import PARTS
from quantspec.types import Batch

native = pytest.mark.skipif(library.usable() is not None, reason=str(library.usable()))
SMALL = ModelShape(hidden=64, inner=96, layers=2, heads=2, kv_heads=1, head_dim=32, vocab=100)
OPTIONS = ("--context", 5, "--tokens", 3, "--rounds", 1, "--widths", "2,7", "--threads", 1)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Small buffers, and threads afterwards as they were."""
    monkeypatch.setattr(probes, "l3_bytes", lambda: 2**14)
    monkeypatch.setattr(probes, "LEAST_BYTES", 2**20)
    before = torch.get_num_threads()
    yield
    set_threads(0, before)


@native
@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("activations", ["int8", "fp32"])
def test_a_random_model(call: Any, activations: str) -> None:
    shape = "1b,hidden=64,inner=96,layers=2,heads=2,kv_heads=1,head_dim=32,vocab=100"
    result = call(
        "bench", "decode", "--shape", shape, *OPTIONS, "--activations", activations, "--group-size", 32, "--json"
    )
    assert result.code == 0, result.err
    report = json.loads(result.out)
    assert (report["backend"], report["mode"]) == (f"cpu-{activations}", activations)
    assert report["shape"] == vars(SMALL)
    assert [row["n"] for row in report["rows"]] == [1, 2, 7]
    assert all((row["K"], row["N"], row["group_size"]) == (None, None, 32) for row in report["rows"])
    assert report["tokens_per_second"] > 0
    # Keys and values of 5 tokens: 2 layers, 1 head, 32 numbers of 4 bytes, twice.
    assert report["part_bytes"]["attention"] == 5 * 2 * 2 * 32 * 4
    assert sum(report["part_bytes"].values()) == report["bytes_per_step"]
    assert report["gbps"] * report["ms_per_step"] * 1e6 == pytest.approx(report["bytes_per_step"])
    for record, ms in ((report, report["ms_per_step"]), *((row, row["ms"]) for row in report["rows"])):
        assert record["parts_ms"].keys() == {*PARTS, "other"}
        assert all(part >= 0 for part in record["parts_ms"].values())
        assert sum(record["parts_ms"].values()) == pytest.approx(ms)
    alone = min(row["ms"] for row in report["rows"] if row["n"] == 1)
    assert [row["v"] for row in report["rows"]] == pytest.approx([row["ms"] / alone for row in report["rows"]])


@native
@pytest.mark.usefixtures("quick")
def test_a_model_and_its_tables(call: Any, tiny: Path) -> None:
    result = call("bench", "decode", "--model", tiny, *OPTIONS)
    assert result.code == 0, result.err
    assert "tokens/s on cpu-fp32 with 5 tokens in the cache" in result.out
    assert {line.split("|")[1].strip() for line in result.out.splitlines() if line.startswith("|")} >= {*PARTS, "7"}


@native
@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name, backend, group", [("default", "cpu-int8", 128), ("default/target", "cpu-fp32", None)])
def test_default_is_the_quantized_target(call: Any, name: str, backend: str, group: int | None) -> None:
    result = call("bench", "decode", "--model", name, *OPTIONS, "--json")
    assert result.code == 0, result.err
    report = json.loads(result.out)
    assert report["backend"] == backend
    assert {row["group_size"] for row in report["rows"]} == {group}


@native
@pytest.mark.usefixtures("quick")
def test_a_model_that_is_not_there_is_said_before_anything_is_measured(call: Any) -> None:
    result = call("bench", "decode", "--model", "nowhere")
    assert (result.code, result.out) == (3, "")
    assert "no model folder at nowhere" in result.error
    assert "measuring" not in result.err


@native
def test_decoding_leaves_the_context_as_it_was() -> None:
    model = random_decoder(SMALL, 32, integer=True, seed=0)
    decoding = Decoding(model, context=4, more=3, widest=2, seed=0)
    before = decoding.cache.kv[:, :, :4].clone()
    steps, spent = decoding.decode(3)
    assert len(steps.seconds) == len(steps.parts) == 3
    assert spent >= sum(steps.seconds)
    assert decoding.cache.length == 4
    assert {n: len(found.seconds) > 0 for n, found in decoding.curve([1, 2], 1, 0).items()} == {1: True, 2: True}
    assert torch.equal(decoding.cache.kv[:, :, :4], before)


@native
@pytest.mark.parametrize("level, times", [("avx2", 2), ("avx512", 2), ("avx512vnni", 1)])
def test_work_counts_an_8_bit_weight_by_its_instructions(level: str, times: int) -> None:
    work = Work.of(random_decoder(SMALL, 32, integer=True, seed=0), context=1, level=level)
    layer = 64 * (2 + 2) * 32 + 64 * 64 + 64 * 3 * 96  # q, k, v; o; gate, up, down
    assert work.macs == 2 * layer + times * 100 * 64
    dense = Work.of(random_decoder(SMALL, 32, integer=False, seed=0), context=1, level=level)
    assert dense.macs == 2 * layer + 100 * 64
    assert dense.weight_bytes["head"] == 128 * 64 * 2  # bf16, rows filled up to panels of 32


@native
def test_random_weights_keep_the_activations_in_range() -> None:
    """Neither overflow nor vanishing numbers, which would run at another speed."""
    shape = parse_shape("1b,hidden=128,inner=256,layers=4,heads=4,kv_heads=2,vocab=200")
    model = random_decoder(shape, 64, integer=True, seed=1)
    decoding = Decoding(model, context=8, more=1, widest=1, seed=0)
    out = model.forward(Batch.chain([3], 8), [decoding.cache], taps=[3])
    assert 0.1 < out.taps[3].std() < 100
    assert 0.1 < out.logits.std() < 10


def test_parts_are_those_of_the_fastest_step() -> None:
    steps = Steps([2.0, 1.0], [[0.25] * len(PARTS), [0.125] * len(PARTS)])
    assert steps.parts_ms() == dict.fromkeys(PARTS, 125.0) | {"other": 250.0}


def test_shapes() -> None:
    assert parse_shape("8B") == SHAPES["8b"]
    assert parse_shape("1b,layers=2,tied=0") == ModelShape(2048, 8192, 2, 32, 8, 64, 128256, tied=False)
    assert parse_shape("layers=3") == parse_shape("1b,layers=3")
    # Llama 3.2 1B and 3.1 8B have 1.24 and 8.03 billion parameters, norms included.
    weights = {name: shape.layers * shape.layer_weights + shape.vocab * shape.hidden for name, shape in SHAPES.items()}
    assert weights["1b"] == pytest.approx(1.236e9, rel=1e-3)
    assert weights["8b"] + SHAPES["8b"].vocab * 4096 == pytest.approx(8.03e9, rel=1e-3)


@pytest.mark.parametrize(
    "options, complaint",
    [
        (("--shape", "3b"), "'3b' is no part of a model's shape"),
        (("--shape", "1b,width=3"), "'width=3' is no part of a model's shape"),
        (("--shape", "1b,layers=two"), "'layers=two' is no part"),
        (("--shape", "heads=3,kv_heads=2"), "there is no model of shape 'heads=3,kv_heads=2'"),
        (("--shape", "layers=0"), "there is no model of shape 'layers=0'"),
        (("--model", "default", "--shape", "1b"), "--model and --shape exclude each other"),
        (("--model", "default", "--group-size", "64"), "--group-size is for random weights"),
        (("--widths", "0"), "widths are numbers of rows from 1 to 4096, not 0"),
        (("--context", "0"), "context and tokens must be at least 1"),
        (("--group-size", "33"), "the group size must be a multiple of 32, not 33"),
        (("--activations", "int4"), "'int4' is not one of"),
    ],
)
def test_misuse_is_one_line_before_anything_is_measured(call: Any, options: tuple[str, ...], complaint: str) -> None:
    result = call("bench", "decode", *options)
    assert (result.code, result.out) == (2, "")
    assert complaint in result.error
    assert "measuring" not in result.err


@native
@pytest.mark.usefixtures("quick")
def test_a_context_that_the_model_has_no_positions_for(call: Any, tiny: Path) -> None:
    result = call("bench", "decode", "--model", tiny, "--context", 200, "--tokens", 1, "--widths", 1, "--threads", 1)
    assert (result.code, result.out) == (2, "")
    assert "201 tokens are more than the model's 128 positions" in result.error


@native
@pytest.mark.usefixtures("quick")
def test_a_shape_that_memory_does_not_hold(call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random_model, "available_memory", lambda: 10**9)
    result = call("bench", "decode", "--shape", "8b", "--threads", 1)
    assert (result.code, result.out) == (4, "")
    assert "GB of memory, and 1.0 are free. hint: take a smaller shape" in result.error


def test_available_memory() -> None:
    free = random_model.available_memory()
    assert free is None or free > 2**20
