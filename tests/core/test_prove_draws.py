"""What a device that draws must show before its first token, and what happens where it draws wrong."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from table_model import TableModel

from quantspec.core.prove_draws import draws_agree
from quantspec.core.verify import Verifier
from quantspec.engine import build
from quantspec.models.base import Cache, Drawing, Output
from quantspec.types import Batch, Tap

from .test_on_device import DrawingTable, host_device

__all__ = ["host_device"]
pytestmark = [pytest.mark.usefixtures("host_device"), pytest.mark.filterwarnings("ignore::RuntimeWarning")]


class Faulty(DrawingTable):
    """Its device's ``fault`` changes what is asked of it, or the table that it hands out."""

    def __init__(self, fault: Callable[[Batch, Drawing, Any], Output]) -> None:
        super().__init__(vocab_size=40)
        self._fault = fault

    def draw(self, batch: Batch, caches: Sequence[Cache], taps: Sequence[Tap], drawing: Drawing) -> Output:
        return self._fault(batch, drawing, lambda *asked: super(Faulty, self).draw(asked[0], caches, taps, asked[1]))


def no_noise(batch: Batch, drawing: Drawing, draw: Any) -> Output:
    return draw(batch, replace(drawing, draws=[replace(each, key=None) for each in drawing.draws]))


def not_grafted(batch: Batch, drawing: Drawing, draw: Any) -> Output:
    """The stand-ins are scored in place of the draft."""
    return draw(batch, replace(drawing, pending={}))


def unwarmed(batch: Batch, drawing: Drawing, draw: Any) -> Output:
    return draw(batch, replace(drawing, draws=[replace(each, temperature=1.0) for each in drawing.draws]))


def one_row_late(batch: Batch, drawing: Drawing, draw: Any) -> Output:
    output = draw(batch, drawing)
    return replace(output, draws=output.draws.roll(1, 0))


def broken(batch: Batch, drawing: Drawing, draw: Any) -> Output:
    raise RuntimeError("ptxas died\nof old age")


def test_a_device_that_draws_right() -> None:
    assert draws_agree(DrawingTable(vocab_size=40))


@pytest.mark.parametrize("fault", [no_noise, not_grafted, unwarmed, one_row_late])
def test_a_device_that_draws_wrong(fault: Callable[..., Output]) -> None:
    assert not draws_agree(Faulty(fault))


@pytest.mark.parametrize(
    "fault,words", [(no_noise, "its device draws others than it should"), (broken, "RuntimeError: ptxas died")]
)
def test_the_host_draws_in_its_place(fault: Callable[..., Output], words: str) -> None:
    told: list[str] = []
    verifier = Verifier(Faulty(fault))
    build._prove_draws(verifier, told.append)
    assert told == [f"the CPU draws the tokens of table: {words}"]
    assert not verifier._draws


def test_models_and_rules_that_do_not_draw_are_not_asked() -> None:
    told: list[str] = []
    for verifier in (Verifier(TableModel()), Verifier(Faulty(broken), rule="ratio")):
        build._prove_draws(verifier, told.append)
    assert told == []
    right = Verifier(DrawingTable(vocab_size=40))
    build._prove_draws(right, told.append)
    assert right._draws
    assert told == []
