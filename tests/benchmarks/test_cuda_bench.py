"""``bench kernels`` and ``bench decode`` on CUDA: their JSON, without a device and without meaning of the figures."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from quantspec.benchmarks import cuda_contenders, cuda_decode, cuda_kernels, cuda_model, cuda_timing
from quantspec.benchmarks.config import DecodeBench, KernelBench
from quantspec.benchmarks.cuda_contenders import CudaContender, CudaField
from quantspec.benchmarks.cuda_kernels import Accelerator
from quantspec.benchmarks.kernels import Measured
from quantspec.benchmarks.shapes import SHAPES, ModelShape
from quantspec.errors import Unavailable, UsageError
from quantspec.kernels.cpu.forward import PARTS

SMALL = ModelShape(hidden=32, inner=64, layers=1, heads=1, kv_heads=1, head_dim=32, vocab=60)
ROW_KEYS = {"backend", "mode", "K", "N", "group_size", "n", "ms", "v", "gbps", "bandwidth_fraction", "bound_ms"}
pretended = [pytest.mark.usefixtures("pretended_cuda"), pytest.mark.filterwarnings("ignore::RuntimeWarning")]


def without_cuda_kernels(field: CudaField) -> CudaContender:
    raise Unavailable("no CUDA compiler found")


@pytest.mark.usefixtures("pretended_cuda")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CudaField, "_cuda", without_cuda_kernels)
    config = KernelBench(shapes=((128, 96), (64, 33)), widths=(5,), group_size=32, device="cuda", rounds=1)
    report = json.loads(json.dumps(cuda_kernels.run(config)))
    assert all(row.keys() >= ROW_KEYS for row in report["rows"])
    measured = {(row["backend"], row["K"], row["N"], row["n"]) for row in report["rows"]}
    names = ("triton", "torch-bf16")
    assert measured == {(name, *shape, n) for name in names for shape in ((128, 96), (64, 33)) for n in (1, 5)}
    assert report["left_out"]["cuda"] == "no CUDA compiler found"
    assert report["left_out"].keys() >= {"cuda", "bnb-nf4", "gptqmodel-marlin"} - set(cuda_contenders_installed())
    assert {row["mode"] for row in report["rows"]} == {"w4a16", "dense"}
    assert report["read_bandwidth_gbps"] == report["read_bandwidths"][0]["gbps"] > 0
    assert "triton" in {each["reader"] for each in report["read_bandwidths"]}
    assert (report["device_name"], report["threads"]) == ("some GPU", None)


def cuda_contenders_installed() -> list[str]:
    packages = {"gptqmodel-marlin": "gptqmodel", "bnb-nf4": "bitsandbytes"}
    return [name for name, package in packages.items() if cuda_contenders.find_spec(package)]


@pytest.mark.usefixtures("pretended_cuda")
def test_kernels_asked_for_by_name_must_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CudaField, "_cuda", without_cuda_kernels)
    config = KernelBench(shapes=((64, 32),), widths=(1,), group_size=32, device="cuda", rounds=1, backends=("cuda",))
    with pytest.raises(Unavailable, match="no CUDA compiler"):
        cuda_kernels.run(config)


def test_the_bound_of_a_device_is_that_of_all_products() -> None:
    machine = Accelerator(4e12, peak_macs=400e12)
    # 40 MB at 4 TB/s take 10 us, 16 rows of 80 M multiply-adds at 400 T/s 3.2 us, 64 rows 12.8 us.
    rows = Measured("cuda", "w4a16", (8192, 9766), 128, 40_000_000, 80_000_000, {1: [2e-5], 64: [4e-5]}).rows(machine)
    assert [row["bound_ms"] for row in rows] == pytest.approx([0.010, 0.0128])
    assert rows[0]["bandwidth_fraction"] == pytest.approx(0.5)


def test_copies_leave_nothing_in_the_cache() -> None:
    assert cuda_timing.copies_of(8_650_752) * 8_650_752 >= 240 << 20
    assert cuda_timing.copies_of(500 << 20) == 1


def test_foreign_failures_are_one_line() -> None:
    assert cuda_contenders.reason(RuntimeError("no kernel\nwith a trace")) == "RuntimeError: no kernel"
    assert cuda_contenders.reason(KeyError()) == "KeyError: "


def test_random_weights_use_every_code() -> None:
    for bits in (4, 8):
        weight = cuda_contenders.random_weight(256, 256, bits, torch.bfloat16, torch.device("cpu"), symmetric=False)
        assert weight.codes.unique().tolist() == list(range(-(2 ** (bits - 1)), 2 ** (bits - 1)))
        assert (weight.scheme.dtype, weight.scale.dtype) == ("bfloat16", torch.bfloat16)
        assert weight.zero_point is not None
        rows = (
            torch.randn(64, 256, dtype=torch.float64)
            @ cuda_contenders.dequantize(
                cuda_contenders.random_weight(256, 256, bits, torch.bfloat16, torch.device("cpu"))
            )
            .double()
            .T
        )
        assert 0.8 < rows.std() < 1.3  # uniform scales from half to one and a half: sqrt(1 + 1/12)


@pytest.mark.usefixtures("pretended_cuda")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_decode() -> None:
    config = DecodeBench(
        shape=SMALL, device="cuda", kernels="triton", group_size=32, context=5, tokens=1, widths=(1,), rounds=1
    )
    report: dict[str, Any] = json.loads(json.dumps(cuda_decode.run(config)))
    assert (report["backend"], report["mode"], report["shape"]) == ("triton", "w4a16", vars(SMALL))
    assert [row["n"] for row in report["rows"]] == [1]
    assert all(row.keys() >= ROW_KEYS for row in report["rows"])
    assert report["tokens_per_second"] > 0
    # Keys and values of 5 tokens: 1 layer, 1 head, 32 numbers of 2 bytes, twice.
    assert report["part_bytes"]["attention"] == 5 * 2 * 32 * 2
    assert sum(report["part_bytes"].values()) == report["bytes_per_step"]
    for record, ms in ((report, report["ms_per_step"]), *((row, row["ms"]) for row in report["rows"])):
        assert record["parts_ms"].keys() == {*PARTS, "other"}
        assert sum(record["parts_ms"].values()) == pytest.approx(ms)
        assert record["graph_ms"] > 0


def test_bytes_of_a_step() -> None:
    """3.6 GB of W4 layers, half a GB of LM head in 8 bits: what a step of Llama 3.1 8B reads."""
    config = cuda_model.model_config(SHAPES["8b"])
    found = cuda_model.part_bytes(config, 4, 128, 8)
    assert sum(found[part] for part in ("qkv", "o", "mlp")) == pytest.approx(3.6e9, rel=0.01)
    assert found["head"] == 128256 * 4096 + 128256 * 32 * 2
    dense = cuda_model.part_bytes(config, 16, -1, 16)
    assert sum(dense.values()) == 2 * (32 * SHAPES["8b"].layer_weights + 128256 * 4096)


@pytest.mark.parametrize(
    "options, complaint",
    [
        ({"threads": 2}, "--threads is for the CPU"),
        ({"widths": (65,)}, "at most 64 rows, not 65"),
        ({"backends": ("cpu-int8",)}, "unknown backend 'cpu-int8' on cuda"),
    ],
)
def test_options_that_cuda_has_not(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        KernelBench(device="cuda", **options)


@pytest.mark.parametrize(
    "options, complaint",
    [
        ({"device": "cuda", "activations": "int8"}, "--activations is for the CPU"),
        ({"device": "cuda", "head_bits": 5}, "4 or 8 bits, not 5"),
        ({"device": "cpu", "kernels": "cuda"}, "--kernels and --head-bits are for CUDA"),
    ],
)
def test_options_of_the_other_device(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        DecodeBench(**options)
