"""Compiling the CUDA kernels, where there is a compiler; and what is said where something is missing."""

from __future__ import annotations

import ctypes
import re
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from quantspec.errors import Unavailable, UsageError
from quantspec.kernels.build_cache import run
from quantspec.kernels.cuda import build, driver, library, linear
from quantspec.kernels.cuda.build import Target
from quantspec.kernels.cuda.packed import PackedWeight, Params, pack
from quantspec.kernels.cuda.tile_format import TileFormat
from quantspec.numerics.affine import quantize
from quantspec.numerics.scheme import Scheme

TARGETS = [Target((8, 0), 163 << 10), Target((8, 9), 99 << 10), Target((9, 0), 227 << 10)]
"""Shared memory per block as NVIDIA's programming guide lists it."""


@pytest.fixture
def compiler() -> list[str]:
    try:
        return build.find_compiler()
    except Unavailable as error:
        pytest.skip(str(error))


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An nvcc of the PATH that writes its arguments into the file it should make."""
    path = tmp_path / "bin" / "nvcc"
    path.parent.mkdir()
    path.write_text('#!/bin/sh\n[ "$1" = --version ] && echo fake && exit\nfor last; do :; done\necho "$@" > "$last"\n')
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{path.parent}:/usr/bin:/bin")
    return path


W4, W8_HEAD, LARGEST = TileFormat(), TileFormat(8, 64, False, 4), TileFormat(4, 32, True, 4)
"""The usual formats of layers and of an LM head, and the one that needs most registers and memory."""


@pytest.mark.parametrize(
    "target, tile",
    [(TARGETS[0], W4), (TARGETS[1], LARGEST), (TARGETS[2], W4), (TARGETS[2], W8_HEAD)],
    ids=lambda value: value.arch if isinstance(value, Target) else str(value),
)
def test_compiles_without_spills(target: Target, tile: TileFormat, compiler: list[str], tmp_path: Path) -> None:
    out = tmp_path / "kernels.cubin"
    more = ["--ptxas-options=-v"] if str(build.NVRTC) in compiler else ["-cubin", "--ptxas-options=-v"]
    log = run([*compiler, *build.options(target, tile, more), str(build.SOURCES / "quantspec_cuda.cu"), "-o", str(out)])
    assert out.read_bytes().startswith(b"\x7fELF")
    kernels = re.findall(rf"Compiling entry function '(\w+)' for '{target.arch}'", log)
    assert sorted(kernels) == sorted(library.KERNELS)
    kept = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    assert kept == [("0", "0", "0")] * len(kernels)
    assert "warning" not in log


def test_arch_names() -> None:
    assert [target.arch for target in TARGETS] == ["sm_80", "sm_89", "sm_90a"]
    assert Target((12, 0), 99 << 10).arch == "sm_120"


def test_cubin_is_made_once_for_each_target_and_format(fake: Path, tmp_path: Path) -> None:
    told: list[str] = []
    first = build.build(TARGETS[0], W4, cache=tmp_path / "cache", tell=told.append)
    assert build.build(TARGETS[0], W4, cache=tmp_path / "cache", tell=told.append) == first
    assert told == ["compiling the CUDA kernels for w4g128s16 with nvcc: once, under 30 seconds"]
    assert first.path.read_text().split()[:8] == [
        "-cubin", "-std=c++17", "-arch=sm_80", "-DQS_MEMORY=166912", "-DQS_BITS=4", "-DQS_GROUP=128", "-DQS_ZEROS=0",
        "-DQS_SCALE_BYTES=2",
    ]  # fmt: skip
    others = [build.build(TARGETS[i], tile, cache=tmp_path / "cache") for i, tile in [(2, W4), (0, LARGEST)]]
    assert len({first.path, *(other.path for other in others)}) == 3


def test_device_that_is_too_old(fake: Path) -> None:
    with pytest.raises(Unavailable, match=r"need compute capability 8\.0, not 7\.5"):
        build.build(Target((7, 5), 64 << 10), W4)


def test_compiler_is_looked_for_in_order(fake: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packages = tmp_path / "nvidia" / "cu13"
    for file in ("bin/nvcc", "nvvm/bin/cicc", "lib/libnvrtc.so.13", "lib/libnvrtc-builtins.so.13.0"):
        (packages / file).parent.mkdir(parents=True, exist_ok=True)
        (packages / file).touch()
    spec = SimpleNamespace(submodule_search_locations=[str(packages.parent)])
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: spec)
    assert build.find_compiler("nvcc -O1") == [str(fake), "-O1"]
    assert build.find_compiler() == [str(fake)]
    fake.unlink()
    assert build.find_compiler() == [str(packages / "bin" / "nvcc")]
    (packages / "nvvm" / "bin" / "cicc").unlink()  # nvcc's package alone cannot compile
    assert build.find_compiler() == [sys.executable, str(build.NVRTC), str(packages / "lib" / "libnvrtc.so.13")]
    (packages / "lib" / "libnvrtc.so.13").unlink()
    with pytest.raises(Unavailable, match=r"no CUDA compiler found \(nvcc, NVRTC\)"):
        build.find_compiler()
    with pytest.raises(Unavailable, match=r"no CUDA compiler found \(/opt/nvcc\)"):
        build.find_compiler("/opt/nvcc")


def test_nvrtc_that_fails_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "libnvrtc.so.13"
    broken.write_text("no library")
    monkeypatch.setattr(build, "find_compiler", lambda _: [sys.executable, str(build.NVRTC), str(broken)])
    with pytest.raises(Unavailable) as caught:
        build.build(TARGETS[0], W4, cache=tmp_path / "cache")
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("NVRTC failed")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_device_is_one_line() -> None:
    assert library.usable() == "there is no CUDA device that torch can use"


class FakeDriver:
    """Stands for libcuda: every call succeeds, and launches are kept."""

    def __init__(self, fails: str = "") -> None:
        self.fails, self.modules = fails, 0
        self.launches: list[tuple[Any, Params]] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: 200 if name == self.fails else 0

    def cuModuleLoadData(self, module: Any, data: bytes) -> int:
        self.modules += 1
        return 200 if self.fails == "cuModuleLoadData" else 0

    def cuGetErrorString(self, status: ctypes.c_int, text: Any) -> int:
        text._obj.value = b"device kernel image is invalid"
        return 0

    def cuLaunchKernelEx(self, config: Any, function: Any, arguments: Any, extra: None) -> int:
        c = config._obj
        attributes = [(c.attributes[i].id, c.attributes[i].value) for i in range(c.attribute_count)]
        launched = SimpleNamespace(
            grid=[*c.grid], block=[*c.block], memory=c.shared_memory, stream=c.stream, attributes=attributes
        )
        self.launches.append((launched, Params.from_buffer_copy(Params.from_address(arguments[0]))))
        return 0


@pytest.fixture
def loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[library.Library, FakeDriver]:
    fake_driver = FakeDriver()
    monkeypatch.setattr(driver, "library", lambda: fake_driver)
    (tmp_path / "kernels.cubin").write_bytes(b"cubin")
    monkeypatch.setattr(library, "build", lambda *_, **__: build.Built(tmp_path / "kernels.cubin"))
    return library.Library(Target((9, 0), 1000), 3), fake_driver


def test_cubin_that_the_driver_refuses(
    loaded: tuple[library.Library, FakeDriver], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "library", lambda: FakeDriver("cuModuleLoadData"))
    with pytest.raises(Unavailable, match="cannot load the CUDA kernels: device kernel image is invalid") as caught:
        loaded[0].prepare(W4)
    assert "older" in (caught.value.hint or "")


def test_each_format_is_loaded_once(loaded: tuple[library.Library, FakeDriver]) -> None:
    for tile in (W4, W8_HEAD, W4):
        loaded[0].prepare(tile)
    assert loaded[1].modules == 2


def test_launch_structs_are_the_drivers() -> None:
    """Sizes and places of CUlaunchConfig and CUlaunchAttribute as cuda.h has them on 64-bit machines."""
    assert ctypes.sizeof(driver.LaunchConfig) == 56
    assert (driver.LaunchConfig.stream.offset, driver.LaunchConfig.attributes.offset) == (32, 40)
    assert (ctypes.sizeof(driver._Attribute), driver._Attribute.value.offset) == (72, 8)


def weight() -> PackedWeight:
    return pack(quantize(torch.randn(300, 256, generator=torch.Generator().manual_seed(0)), Scheme(dtype="float16")))


@pytest.fixture
def layer(loaded: tuple[library.Library, FakeDriver], monkeypatch: pytest.MonkeyPatch) -> linear.CudaLinear:
    """A layer whose tensors are on the CPU, which nothing will read."""
    monkeypatch.setattr(linear, "load", lambda device: loaded[0])
    monkeypatch.setattr(linear, "_index", lambda device: 0)
    stream = SimpleNamespace(cuda_stream=77, synchronize=lambda: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    return linear.CudaLinear(weight(), linear.Workspace(torch.device("cpu")))


def test_launch(layer: linear.CudaLinear, loaded: tuple[library.Library, FakeDriver]) -> None:
    x = torch.zeros(11, 256, dtype=torch.bfloat16)
    assert layer(x).dtype == torch.bfloat16
    assert layer(x, torch.float32).shape == (11, 300)
    (launched, params), (_, second) = loaded[1].launches
    # Four tiles on three multiprocessors: two have to take two anyway.
    assert (launched.grid, launched.block, launched.memory) == ([2, 1, 1], [256, 1, 1], 1000)
    assert launched.stream == 77
    assert (params.n, params.rows, params.cols, params.row_blocks, params.k_tiles) == (11, 300, 256, 2, 2)
    assert (params.x, params.x_stride, params.y_stride) == (x.data_ptr(), 256, 300)
    assert (params.bias, params.bfloat_scales, params.float_y, second.float_y) == (None, 0, 0, 1)


def test_programmatic_launches_can_be_switched_off(
    layer: linear.CudaLinear, loaded: tuple[library.Library, FakeDriver]
) -> None:
    x = torch.zeros(1, 256, dtype=torch.float16)
    for on in (True, False):
        loaded[0].programmatic = on
        layer(x)
    assert [launched.attributes for launched, _ in loaded[1].launches] == [[(6, 1)], []]
    assert library.Library(Target((9, 0), 1000), 3).programmatic
    assert not library.Library(Target((8, 9), 1000), 3).programmatic


def test_inputs_that_cannot_be_copied_16_bytes_at_a_time_are_moved(
    layer: linear.CudaLinear, loaded: tuple[library.Library, FakeDriver]
) -> None:
    wide = torch.zeros(4, 264, dtype=torch.float16)
    for x, moved in [(wide[:, 8:], False), (wide[:, 1:257], True), (torch.zeros(256, 4).half().T, True)]:
        layer(x)
        params = loaded[1].launches[-1][1]
        assert (params.x != x.data_ptr()) == moved
        assert params.x % 16 == 0
        assert params.x_stride % 8 == 0


def test_rows_of_odd_length_are_filled_up_with_zeros() -> None:
    x = torch.arange(1, 7, dtype=torch.float16).view(2, 3)
    copied = linear._copied(x)
    assert copied.tolist() == [[1, 2, 3, 0, 0, 0, 0, 0], [4, 5, 6, 0, 0, 0, 0, 0]]
    assert linear._copyable(copied)
    assert not linear._copyable(copied[:, :3])


def test_wrong_inputs(layer: linear.CudaLinear) -> None:
    assert layer(torch.zeros(0, 256, dtype=torch.float16)).shape == (0, 300)
    for x in (torch.zeros(2, 128).half(), torch.zeros(2, 256), torch.zeros(256).half()):
        with pytest.raises(UsageError, match=r"needs rows \[n, 256\] of float16 or bfloat16"):
            layer(x)
    with pytest.raises(UsageError, match="64 rows at a time, not 65"):
        layer(torch.zeros(65, 256).half())


@pytest.mark.parametrize(
    "tiles, blocks", [(1, 1), (131, 131), (132, 132), (133, 67), (512, 128), (3584, 128), (16032, 132)]
)
def test_blocks_are_no_more_than_shorten_the_longest_run(tiles: int, blocks: int) -> None:
    assert linear.blocks_for(tiles, 132) == blocks


@pytest.mark.parametrize("n, width", [(1, 8), (8, 8), (9, 16), (16, 16), (17, 32), (33, 48), (49, 64), (64, 64)])
def test_narrowest_kernel_is_taken(n: int, width: int) -> None:
    assert library.kernel_name(torch.float16, n) == f"qs_half_n{width}"
