"""The probes run and give figures that can be; what they measure is the machine's affair."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from quantspec.kernels.cpu import build, library, probes

pytestmark = pytest.mark.skipif(library.usable() is not None, reason=str(library.usable()))


def test_every_way_to_read_is_tried_and_the_best_comes_first() -> None:
    before = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    readings = probes.read_bandwidth(3, nbytes=2**20, rounds=1)  # 3: also more threads than this machine may have
    tried = {(one.page_bytes, one.prefetch, one.threads) for one in readings}
    ways = {
        (page, prefetch, threads) for page in probes.page_sizes() for prefetch in probes.PREFETCH for threads in (1, 3)
    }
    assert tried == ways
    assert len(readings) == len(ways)
    assert readings[0].gbps == max(one.gbps for one in readings)
    assert all(0 < one.gbps < 100_000 for one in readings)
    if before is not None:
        assert os.sched_getaffinity(0) == before  # only the probe's own threads are bound to cores


def test_rates() -> None:
    assert 0 < probes.tile_macs(1, group_size=32, rounds=1) < 1e15
    peak = probes.peak_macs(1, rounds=1)
    assert (peak is None) == (build.cpu_level() == "portable")
    assert peak is None or 1e9 < peak < 1e15


@pytest.mark.parametrize(
    "text, size", [("32768K\n", 2**25), ("8M", 2**23), ("", probes.DEFAULT_L3), ("huge", probes.DEFAULT_L3)]
)
def test_cache_size(text: str, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "index3").mkdir()
    (tmp_path / "index3" / "size").write_text(text)
    monkeypatch.setattr(probes, "_CACHES", tmp_path)
    assert probes.l3_bytes() == size


def test_cache_size_where_linux_tells_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "_CACHES", tmp_path)
    assert probes.l3_bytes() == probes.DEFAULT_L3


@pytest.mark.parametrize("text, sizes", [("always [madvise] never", 2), ("always madvise [never]", 1), (None, 1)])
def test_huge_pages_are_tried_where_the_system_gives_them(
    text: str | None, sizes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if text is not None:
        (tmp_path / "enabled").write_text(text)
    monkeypatch.setattr(probes, "_HUGE_PAGES", tmp_path / "enabled")
    assert len(probes.page_sizes()) == sizes
