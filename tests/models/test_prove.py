"""What a model must show on its device before its first token: right products, right kernels, rows that keep their
bits. Each fault that a device could have is put in, and must be found."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from table_model import TableModel
from torch import Tensor

from quantspec.errors import Unavailable
from quantspec.models import prove
from quantspec.models.base import Cache, Output
from quantspec.models.prove import check_product, rows_agree
from quantspec.numerics.affine import QuantizedWeight, dequantize, quantize
from quantspec.numerics.scheme import Scheme
from quantspec.types import Batch, Tap

CPU = torch.device("cpu")
FORMATS = (torch.bfloat16, torch.float16, torch.float32)
Multiply = Callable[[Tensor], Tensor]


def random_weight(n: int = 200, k: int = 256) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(1)
    return quantize(torch.randn(n, k, generator=generator) + 0.1, Scheme(4, 64, symmetric=False))


def product(weight: QuantizedWeight, bias: Tensor | None, x: Tensor) -> Tensor:
    """As a good kernel gives it: fp32 sums, one rounding at the end."""
    y = x.float() @ dequantize(weight).T
    return (y if bias is None else y + bias).to(x.dtype)


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize("out", [None, torch.float32])
def test_right_products(dtype: torch.dtype, out: torch.dtype | None) -> None:
    weight, bias = random_weight(), torch.linspace(-1, 1, 200)

    def linear(x: Tensor) -> Tensor:
        return product(weight, bias, x.to(out or x.dtype) if out else x)

    check_product(linear, weight, bias, CPU, dtype)
    dense = dequantize(weight).to(dtype)
    check_product(lambda x: (x.float() @ dense.float().T).to(dtype), dense, None, CPU, dtype)


def _swapped(weight: QuantizedWeight) -> QuantizedWeight:
    """Two neighbouring inputs in each other's place, in every row."""
    codes = weight.codes.clone()
    codes[:, [6, 7]] = codes[:, [7, 6]]
    return QuantizedWeight(codes, weight.scale, weight.zero_point, weight.scheme)


def _other_group(weight: QuantizedWeight) -> QuantizedWeight:
    return QuantizedWeight(weight.codes, weight.scale.roll(1, 1), weight.zero_point, weight.scheme)


def _last_rows_missing(y: Tensor) -> Tensor:
    y[:, -3:] = 0
    return y


def _nan(y: Tensor) -> Tensor:
    y[64, 5] = float("nan")  # of no row that is compared
    return y


def _splits_lost(y: Tensor) -> Tensor:
    y[64:] *= 0.5
    return y


BIAS = torch.linspace(-1, 1, 200)
FAULTS: dict[str, Callable[[QuantizedWeight, Tensor], Tensor]] = {
    "a code in another's place": lambda weight, x: product(_swapped(weight), BIAS, x),
    "another group's scale": lambda weight, x: product(_other_group(weight), BIAS, x),
    "no bias": lambda weight, x: product(weight, None, x),
    "a last tile left out": lambda weight, x: _last_rows_missing(product(weight, BIAS, x)),
    "a NaN": lambda weight, x: _nan(product(weight, BIAS, x)),
    "half a sum past 64 rows": lambda weight, x: _splits_lost(product(weight, BIAS, x)),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_wrong_products(fault: str, dtype: torch.dtype) -> None:
    weight = random_weight()
    with pytest.raises(Unavailable, match=r"its product with a weight \[200, 256\] is wrong"):
        check_product(lambda x: FAULTS[fault](weight, x), weight, BIAS, CPU, dtype)


class Device(TableModel):
    """A model whose rows ``fault`` changes: it gets the batch, the caches' length and the logits."""

    def __init__(self, fault: Callable[[Batch, Tensor], Tensor], **options: Any) -> None:
        super().__init__(**options)
        self._fault = fault

    def forward(self, batch: Batch, caches: Sequence[Cache], taps: Sequence[Tap] = ()) -> Output:
        return Output(self._fault(batch, super().forward(batch, caches, taps).logits))


def slightly(logits: Tensor, wrong: bool) -> Tensor:
    """One row in its last bit."""
    if wrong:
        logits[0] = torch.nextafter(logits[0], torch.tensor(torch.inf))
    return logits


def is_tree(batch: Batch) -> bool:
    return list(batch.parents) != list(range(-1, len(batch.tokens) - 1))


class AfterTree:
    """What follows the commit of a tree is read from the wrong place."""

    seen = False

    def __call__(self, batch: Batch, logits: Tensor) -> Tensor:
        was, self.seen = self.seen, self.seen or is_tree(batch)
        return slightly(logits, was)


@pytest.mark.parametrize("max_positions", [4096, 40])
def test_rows_that_agree(max_positions: int) -> None:
    assert rows_agree(Device(lambda _, logits: logits, max_positions=max_positions))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "fault",
    [
        *(lambda batch, logits, n=n: slightly(logits, len(batch.tokens) == n) for n in prove.WIDTHS),
        lambda batch, logits: slightly(logits, len(batch.tokens) == 1),
        lambda batch, logits: slightly(logits, len(batch.tokens) > 64),
        lambda batch, logits: slightly(logits[1:], is_tree(batch)) if is_tree(batch) else logits,
        AfterTree(),
    ],
    ids=[*map(str, prove.WIDTHS), "one row", "a long prompt", "a tree", "after a tree"],
)
def test_rows_that_differ(fault: Callable[[Batch, Tensor], Tensor]) -> None:
    assert not rows_agree(Device(fault))  # type: ignore[arg-type]


def test_logits_that_are_not_finite() -> None:
    with pytest.raises(Unavailable, match="its logits are not finite"):
        rows_agree(Device(lambda _, logits: logits / 0))  # type: ignore[arg-type]


class Graphed(Device):
    """A model whose capture fails, ``again`` even without graphs."""

    def __init__(self, again: bool) -> None:
        self.graphs, self.config, self.device, self.dtype, self.kv_format = True, None, CPU, torch.float32, None
        super().__init__(lambda _, logits: logits)
        self._again = again

    def leave_graphs(self) -> bool:
        used, self.graphs = self.graphs, False
        return used

    def forward(self, batch: Batch, caches: Sequence[Cache], taps: Sequence[Tap] = ()) -> Output:
        if self.graphs or self._again:
            raise RuntimeError("operation not permitted when stream is capturing\nmore words")
        return super().forward(batch, caches, taps)


def test_no_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prove, "check_kernels", lambda *_: None)
    model: Any = Graphed(again=False)
    prove.prove(model)
    assert model.row_invariant
    assert model.notes == (f"table: {prove.NO_GRAPHS} (operation not permitted when stream is capturing)",)
    with pytest.raises(RuntimeError, match="capturing"):
        prove.prove(Graphed(again=True))  # type: ignore[arg-type]


def test_a_model_whose_rows_differ_stays_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prove, "check_kernels", lambda *_: None)
    model: Any = Graphed(again=False)
    model.graphs, model._fault = False, lambda batch, logits: slightly(logits, len(batch.tokens) == 1)
    prove.prove(model)
    assert not model.row_invariant
    assert model.notes == (f"table: {prove.ROWS_DIFFER}",)


def test_rows_that_happen_to_agree_are_no_promise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prove, "check_kernels", lambda *_: None)
    model: Any = Graphed(again=False)
    model.graphs, model.row_invariant = False, False
    prove.prove(model)
    assert not model.row_invariant
