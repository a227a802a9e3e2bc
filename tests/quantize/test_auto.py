"""``--method auto``: measured, within its budget, said, and chosen once."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count

import pytest
import torch

from quantspec.calibrate.quantize import auto
from quantspec.calibrate.quantize.config import Event, MethodOptions, QuantizeConfig, Trial
from quantspec.calibrate.quantize.pipeline import LayerPipeline
from quantspec.calibrate.quantize.plan import Plan
from quantspec.calibrate.quantize.report import REPORT, read_report
from quantspec.calibrate.quantize.run import run
from quantspec.calibrate.quantize.stream import StreamedModel
from quantspec.errors import UsageError
from quantspec.models.tensors import TensorStore

QUICK = MethodOptions(learn_steps=40)
Configure = Callable[..., QuantizeConfig]
Choice = tuple[str, dict[str, Trial], list[str]]


@pytest.fixture
def stopped_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing takes any time."""
    monkeypatch.setattr(auto, "_now", lambda: 0.0)


def same_weights(one: QuantizeConfig, other: QuantizeConfig) -> bool:
    first, second = TensorStore(one.out), TensorStore(other.out)
    return set(first) == set(second) and all(torch.equal(first.get(name), second.get(name)) for name in first)


@pytest.mark.usefixtures("stopped_clock")
def test_takes_the_method_of_the_least_divergence(configure: Configure) -> None:
    config, events = configure("auto", method="auto", options=QUICK, bits=3), list[Event]()
    report = run(config, events.append)
    by_kl = sorted(report.tried, key=lambda one: one.kl or 0.0)
    assert [one.method for one in report.tried] == list(auto.CANDIDATES)
    assert all(one.kl and one.layers == 3 and one.refusal is None for one in report.tried)
    chosen = report.settings["method"]
    assert chosen == by_kl[0].method
    assert chosen in ("gptq", "learned")  # they win by far on text that can be predicted
    said = [event.message for event in events if event.message.startswith("auto:")]
    assert len(said) == len(auto.CANDIDATES) + 1
    assert said[-1] == f"auto: taking {chosen}"
    assert said[:-1] == [f"auto: {one.method}, {one.outcome}" for one in report.tried]
    assert read_report(config.out / REPORT)[1].tried == report.tried
    named = configure("named", method=chosen, options=QUICK, bits=3)
    run(named)
    assert same_weights(config, named)


@pytest.mark.usefixtures("stopped_clock")
def test_measures_on_rows_that_no_method_saw(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configure(method="auto", options=QUICK)
    model = StreamedModel(config.model, "cpu")
    ids, seen = torch.randint(3, 64, (10, 16), generator=torch.Generator().manual_seed(4)), list[torch.Tensor]()
    quantize = LayerPipeline.quantize

    def spy(self, layer, index, store, hidden):  # type: ignore[no-untyped-def]
        if index == 0 and hidden is not None:
            seen.append(hidden.clone())
        return quantize(self, layer, index, store, hidden)

    monkeypatch.setattr(LayerPipeline, "quantize", spy)
    auto.choose(config, Plan.of(config, model), model, ids, config.out.with_name("choice.json"), lambda message: None)
    assert [len(hidden) for hidden in seen] == [6, 6, 6, 6]  # four rows of the ten are kept apart
    assert all(torch.equal(hidden, model.embed(ids[4:])) for hidden in seen)


@pytest.mark.usefixtures("stopped_clock")
def test_a_resumed_run_does_not_choose_anew(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configure("cut", method="auto", options=QUICK, bits=3)

    def stop(event: Event) -> None:
        if event.result is not None and event.result.name.startswith("model.layers.1."):
            raise KeyboardInterrupt

    with pytest.raises(BaseException, match="interrupted"):
        run(config, stop)
    whole = configure("whole", method="auto", options=QUICK, bits=3)
    run(whole)
    monkeypatch.setattr(auto, "_try_all", lambda *args: pytest.fail("chosen anew"))
    report = run(replace(config, time_budget=0.001))
    assert len(report.tried) == len(auto.CANDIDATES)
    assert same_weights(config, whole)
    assert not list(config.out.glob(".*choice*"))


def clock_of(*steps: float) -> Iterator[float]:
    """Times that move on by one of ``steps`` at each look, by the last for ever."""
    now = 0.0
    for number in count():
        yield now
        now += steps[min(number, len(steps) - 1)]


def tried(configure: Configure, monkeypatch: pytest.MonkeyPatch, clock: Iterator[float], time_budget: float) -> Choice:
    config = configure(method="auto", options=QUICK, time_budget=time_budget)
    model, said = StreamedModel(config.model, "cpu"), list[str]()
    monkeypatch.setattr(auto, "_now", lambda: next(clock))
    ids = torch.randint(3, 64, (10, 16), generator=torch.Generator().manual_seed(4))
    method, found = auto.choose(
        config, Plan.of(config, model), model, ids, config.out.with_name("choice.json"), said.append
    )
    return method, {one.method: one for one in found}, said


def test_no_time_to_measure(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    # A minute a look: the first candidate alone uses up a third of two minutes, and could not finish the model.
    method, found, said = tried(configure, monkeypatch, clock_of(60.0), time_budget=2)
    assert method == "rtn"
    assert all(one.kl is None for one in found.values())
    assert "would take about 3.0 minutes" in str(found["rtn"].refusal)
    assert found["learned"].refusal == "no time to try it"
    assert "unmeasured" in said[-1]


def test_a_sample_of_layers_where_time_is_short(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    # A second a look. 20 minutes hold all layers. A third of 2.6 is 52 s: the first layer takes 19, exact forwards 27,
    # and a layer of all five methods 5.
    method, found, _ = tried(configure, monkeypatch, clock_of(1.0), time_budget=20)
    assert {one.layers for one in found.values()} == {3}
    assert method == min(found.values(), key=lambda one: one.kl or 0.0).method
    (configure().out.with_name("choice.json")).unlink()
    _, found, _ = tried(configure, monkeypatch, clock_of(1.0), time_budget=2.6)
    assert {one.layers for one in found.values()} == {2}
    assert all(one.kl for one in found.values())


@pytest.mark.usefixtures("stopped_clock")
def test_what_cannot_be_is_said(configure: Configure) -> None:
    config = configure(method="auto", options=QUICK)
    model, file = StreamedModel(config.model, "cpu"), config.out.with_name("choice.json")
    ids = torch.full((2, 16), 5)
    smooth = replace(config, options=replace(QUICK, smooth=0.5))
    _, found = auto.choose(smooth, Plan.of(smooth, model), model, ids, file, lambda message: None)
    assert [one.method for one in found if one.refusal] == ["awq"]
    assert json.loads(file.read_text())["tried"][2]["refusal"].startswith("--smooth and AWQ")
    file.unlink()
    with pytest.raises(UsageError, match="two rows"):
        auto.choose(config, Plan.of(config, model), model, ids[:1], file, lambda message: None)
    with pytest.raises(UsageError, match="time_budget"):
        replace(config, time_budget=0)


def test_spread_takes_the_first_and_all() -> None:
    assert auto._spread(16, 4) == {0, 4, 8, 12}
    assert auto._spread(3, 9) == {0, 1, 2}
    assert auto._spread(5, 1) == {0}
