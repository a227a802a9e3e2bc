"""Backends are chosen by what they declare, and refusals say why."""

from __future__ import annotations

import subprocess
import sys

import pytest

from quantspec.errors import UsageError
from quantspec.kernels.dispatch import BACKENDS, Request, choose, table


def test_fastest_that_serves() -> None:
    assert choose(Request()).name == "reference-fast"
    assert choose(Request(row_invariant=True)).name == "reference-exact"
    assert choose(Request(bits=3, group_size=40)).name == "reference-fast"


@pytest.mark.parametrize(
    "request_,reason",
    [
        (Request(device="meta"), "does not run on meta"),
        (Request(dtype="float16"), "does not compute in float16"),
        (Request(bits=9), "has no 9-bit weights"),
    ],
)
def test_refusals_carry_reasons(request_: Request, reason: str) -> None:
    with pytest.raises(UsageError, match="no kernel for") as caught:
        choose(request_)
    assert (caught.value.hint or "").count(reason) == len(BACKENDS)


def test_limits_that_a_backend_declares() -> None:
    import dataclasses

    narrow = dataclasses.replace(BACKENDS[0], group_sizes=(128,))
    assert narrow.refusal(Request(bits=4, group_size=64)) == "has no groups of 64"
    assert narrow.refusal(Request(bits=16)) is None
    assert narrow.refusal(Request(row_invariant=True)) == "its rows change with the width of a forward"


def test_table_has_a_line_for_each() -> None:
    lines = table()
    assert list(lines) == [backend.name for backend in BACKENDS]
    assert all("2 to 8 and 16 bits" in line and "cpu" in line for line in lines.values())


def test_no_torch_at_import() -> None:
    code = "import sys, quantspec.kernels.dispatch, quantspec.models.config; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
