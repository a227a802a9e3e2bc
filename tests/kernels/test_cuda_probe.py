"""The probe for wgmma against mma.sync: that it compiles, and how it judges stand-ins for what a GPU alone runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from quantspec.errors import Unavailable, VerificationError
from quantspec.kernels.cuda import build, probe
from quantspec.kernels.cuda.build import Target


def test_probe_compiles_for_hopper_alone(tmp_path: Path) -> None:
    try:
        build.find_compiler()
    except Unavailable as error:
        pytest.skip(str(error))
    built = build.build_probe(Target((9, 0), 227 << 10), cache=tmp_path)
    assert built.path.read_bytes().startswith(b"\x7fELF")
    with pytest.raises(Unavailable, match=r"compute capability 9\.0 alone, not on sm_89"):
        build.build_probe(Target((8, 9), 99 << 10), cache=tmp_path)


@pytest.fixture
def instructions(monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """Both instructions give the exact sums, rounded, times a factor of each."""
    factors = {"mma": torch.ones(64, 64), "wgmma": torch.ones(64, 64)}

    def product(instruction: str, a: Tensor, b: Tensor, device: int) -> Tensor:
        return (a.double() @ b.double().T).float() * factors[instruction]

    monkeypatch.setattr(probe, "product", product)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return factors


def test_equal_sums_agree(instructions: dict[str, Tensor]) -> None:
    assert probe.agree()


def test_one_bit_of_one_sum_is_seen(instructions: dict[str, Tensor]) -> None:
    instructions["wgmma"][5, 63] += 2**-23
    found = probe.differences()
    assert list(found) == ["float16 codes", "float16 numbers", "bfloat16 codes", "bfloat16 numbers"]
    assert all(0 < share <= 1 / 64**2 for share in found.values())
    assert not probe.agree()


@pytest.mark.parametrize("instruction", ["mma", "wgmma"])
@pytest.mark.parametrize("factor", [1.01, float("nan")])
def test_a_wrong_product_says_nothing(instructions: dict[str, Tensor], instruction: str, factor: float) -> None:
    instructions[instruction][:] = factor
    with pytest.raises(VerificationError, match="the probe says nothing"):
        probe.agree()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_device() -> None:
    with pytest.raises(Unavailable, match="no CUDA device"):
        probe.agree()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_on_this_gpu() -> None:
    try:
        found = probe.differences()
    except Unavailable as error:
        pytest.skip(str(error))
    assert all(0 <= share <= 1 for share in found.values())
