"""The adapter to gptqmodel's Marlin kernels, against a stand-in that has the package's interface and reads its format.

The package itself needs a GPU and nvcc: `benchmarks/gpu.py` runs it where they are.
"""

import pytest
import torch
from gptqmodel_stand_in import StandIn, install

from quantspec.errors import Unavailable, UsageError
from quantspec.kernels import gptqmodel
from quantspec.kernels.gptqmodel import MarlinLinear
from quantspec.numerics.affine import dequantize, quantize
from quantspec.numerics.scheme import Scheme

CPU = torch.device("cpu")


@pytest.fixture
def package(monkeypatch):
    return install(monkeypatch)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "bits, group_size, n, k, biased",
    [(4, 128, 64, 256, False), (4, 32, 128, 64, True), (8, 64, 192, 128, True), (4, -1, 64, 384, False)],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_product_is_that_of_the_weight(package, bits, group_size, n, k, biased, dtype):
    weight = quantize(random(n, k), Scheme(bits, group_size, True, "bfloat16"))
    bias = random(n, seed=1) if biased else None
    x = random(5, k, seed=2).to(dtype)
    y = MarlinLinear(weight, bias, CPU, dtype)(x)
    exact = x.double() @ dequantize(weight).double().T + (0 if bias is None else bias.double())
    # One rounding of the output to the type and one of the bias; bfloat16 scales of this size are exact in float16.
    step = {torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    room = step * (exact.abs() + (0 if bias is None else bias.abs()))
    assert y.dtype == dtype
    assert ((y.double() - exact).abs() <= room * 1.001).all()


def test_rows_that_its_kernels_could_not_read_are_copied(package):
    linear = MarlinLinear(quantize(random(64, 128), Scheme(4, 128)), None, CPU, torch.float16)
    x = random(4, 400).half()
    for rows in (x[:, 1:129], x[:, :128], x[::2, 4:132], random(128, 3).half().t()):
        torch.testing.assert_close(linear(rows), linear(rows.clone()), atol=0, rtol=0)


@pytest.mark.parametrize(
    "scheme, shape, dtype, reason",
    [
        (Scheme(4, 128), (64, 128), torch.float32, "do not compute in torch.float32"),
        (Scheme(3, 128), (64, 128), torch.float16, "have no 3-bit weights"),
        (Scheme(4, 128, symmetric=False), (64, 128), torch.float16, "have no zero points"),
        (Scheme(4, 256), (64, 256), torch.float16, "have no groups of 256"),
        (Scheme(4, 32), (64, 64), torch.float16, r"cannot cut a weight \[64, 64\]"),
        (Scheme(4, 128), (128, 192), torch.float16, r"cannot cut a weight \[128, 192\]"),
    ],
)
def test_what_its_kernels_do_not_hold_is_refused(scheme, shape, dtype, reason):
    with pytest.raises(UsageError, match=reason):
        MarlinLinear(quantize(random(*shape), scheme), None, CPU, dtype)


def test_kernels_that_cannot_be_had_are_one_line(package, monkeypatch):
    weight = quantize(random(64, 128), Scheme(4, 128))

    def fail(self):
        raise ModuleNotFoundError("Marlin kernels are not properly installed. Error: nvcc\nmore")

    monkeypatch.setattr(StandIn, "post_init", fail)
    with pytest.raises(Unavailable, match=r"^gptqmodel's Marlin kernels cannot be had: Marlin .* nvcc$"):
        MarlinLinear(weight, None, CPU, torch.float16)
    monkeypatch.delattr(package, "MarlinLinear")
    with pytest.raises(Unavailable, match="has no attribute 'MarlinLinear'"):
        MarlinLinear(weight, None, CPU, torch.float16)


@pytest.mark.parametrize(
    "found, reason",
    [
        ("7.0.0", None),
        ("7.7.0.dev1", None),
        ("10.1", None),
        ("6.0.3", "gptqmodel 7.0 or newer is needed, and 6.0.3 is installed"),
    ],
)
def test_versions_of_the_package(monkeypatch, found, reason):
    monkeypatch.setattr("quantspec.kernels.packages.version", lambda name: found)
    assert gptqmodel.missing() == reason
