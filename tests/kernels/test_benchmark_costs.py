"""Benchmarks of what int8 activations cost and of the kernel beside other work: their figures, without their times."""

from __future__ import annotations

import json
import os
from math import exp, log
from time import sleep

import pytest

from quantspec.benchmarks import activations, contention
from quantspec.kernels.cpu import library

needs_kernels = pytest.mark.skipif(library.usable() is not None, reason=str(library.usable()))


def test_perplexities_are_held_against_the_first_model() -> None:
    base = {"loss": [log(2), log(8)], "kl": [0.0, 0.0], "top1": [1.0, 1.0]}
    other = {"loss": [log(2) + 0.1, log(8) + 0.1], "kl": [0.02, 0.04], "top1": [0.5, 1.0]}
    found = activations.report({"cpu-fp32": base, "other": other})
    assert found["cpu-fp32"]["perplexity"] == pytest.approx(4)  # the geometric mean
    assert found["cpu-fp32"]["ratio_95"] == (1, 1)
    assert found["other"]["ratio"] == pytest.approx(exp(0.1))
    # Rows that lose the same leave no doubt, however much they differ from one another.
    assert found["other"]["ratio_95"] == pytest.approx((exp(0.1), exp(0.1)))
    assert (found["other"]["kl"], found["other"]["top1_agreement"]) == pytest.approx((0.03, 0.75))


@needs_kernels
def test_the_cost_of_int8_is_parted(capsys: pytest.CaptureFixture[str]) -> None:
    activations.main(["--rows", "2", "--seq-len", "48"])
    found = json.loads(capsys.readouterr().out)
    assert found["tokens"] == 2 * 47
    models = found["models"]
    assert list(models)[:2] == ["cpu-fp32", "cpu-int8"]
    costs = [models[name]["kl"] for name in models if name != "cpu-fp32"]
    assert models["cpu-fp32"]["kl"] == 0.0 < min(costs)
    assert len(set(costs)) == 5  # the mixtures are models of their own
    assert models["4-bit head of a GPU alone"]["kl"] == max(costs)


def test_ratios_are_to_the_idle_machine() -> None:
    times = {
        ("idle", 1): [[0.001, 0.001, 0.004], [0.002]],
        ("busy", 1): [[0.003, 0.003, 0.003], [0.003]],
        ("threads", 1): [[0.002] * 8],
    }
    rows = {row["condition"]: row for row in contention.figures(times)}
    idle, busy = rows["idle"], rows["busy"]
    assert (idle["ms"], idle["ms_mean"], idle["ms_min"], idle["ms_quietest"]) == pytest.approx((1.5, 2, 1, 1))
    assert (busy["ratio"], busy["ratio_mean"], busy["ratio_quietest"]) == pytest.approx((2, 1.5, 3))
    assert rows["threads"]["calls_per_second"] == pytest.approx(contention.THREADS / 0.002)


def test_bursts_here_in_threads_and_in_a_child() -> None:
    parents: list[int] = []

    def call() -> None:
        parents.append(os.getpid())
        sleep(0.001)

    assert len(contention.burst(call, 0.0)) == 1
    assert len(contention.at_once([call] * 3, 0.0)) == 3
    before = len(parents)
    times = contention.in_child(lambda: contention.forked(call, 0.0))
    assert len(times) == 2
    assert len(parents) == before  # those calls were the child's


def test_busy_processes_end_with_their_block() -> None:
    with contention.busy(2) as processes:
        assert [process.poll() for process in processes] == [None, None]
    assert None not in [process.returncode for process in processes]
