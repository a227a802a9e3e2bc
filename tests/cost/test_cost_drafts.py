"""Traces and costs of drafters as the real engine runs them. No time is asserted, only what follows from all times."""

from __future__ import annotations

from functools import cache

import pytest

from quantspec.calibrate.cost.curve import Forwards
from quantspec.calibrate.cost.drafts import Plain, measure_drafter, measure_plain, widest, widest_nodes
from quantspec.calibrate.cost.watch import watch
from quantspec.calibrate.cost.workbench import Workbench
from quantspec.core.verify import Verifier
from quantspec.drafters.lookup import PromptLookup
from quantspec.engine.build import build
from quantspec.engine.config import EngineConfig
from quantspec.engine.costs import PLAIN, Candidate, CostCurve, Setting
from quantspec.models.resolve import FAMILY
from quantspec.types import Budget

TARGET, DRAFT, HEAD, INNER = (
    str(FAMILY / name) for name in ("target-w4", "intermediate-w4", "eagle-target", "eagle-intermediate")
)
QUESTIONS = (
    "Question: A farmer has 12 hens and each lays 2 eggs a day. How many eggs are there after a week?\nAnswer:",
    "Question: Tom reads 15 pages a day. How long does he need for a book of 300 pages?\nAnswer:",
)
NEW_TOKENS = 40
PLAINLY = Plain(CostCurve((64,), (1, 2), ((1e-9, 2e-9),)), 0.0)
"""Of a target whose forwards are as good as free, so that all of a step is the drafter's."""


@pytest.fixture(scope="module")
def bench() -> Workbench:
    return Workbench(build(EngineConfig(model=TARGET, method="none", threads=1), lambda line: None))


@pytest.fixture(scope="module")
def prompts(bench: Workbench) -> list[list[int]]:
    assert bench.plain.tokenizer
    return [bench.plain.tokenizer.encode(each) for each in QUESTIONS]


def setting(method: str, nodes: int = 8, **parts: str) -> Setting:
    return Setting(method, parts, widest(method, nodes, 4, 48))


def test_chains_have_room_in_short_texts() -> None:
    """Else no step would be whole, and there would be no trace."""
    assert widest("lookup", 63, 4, 48)["num_speculative_tokens"] == 16
    assert widest("lookup", 63, 4, 16)["num_speculative_tokens"] == 5
    assert widest("eagle", 63, 4, 16)["num_speculative_tokens"] == 63
    assert widest("draft", 8, 4, 48)["num_speculative_tokens"] == 8


@cache
def curve(bench: Workbench) -> CostCurve:
    """Of the intermediate."""
    model = bench.draft_model(setting("cascade", draft_model=DRAFT, head=INNER))
    forwards = Forwards(Verifier(model, stage="intermediate"), (32,), (1, 2, 4, 16), 1, 0)
    forwards.run(0.1)
    return forwards.curve()


def measured(bench: Workbench, one: Setting, prompts: list[list[int]]) -> Candidate:
    inside = curve(bench) if one.method == "cascade" else None
    return measure_drafter(bench, one, prompts, NEW_TOKENS, PLAINLY, inside, 60.0)


@pytest.mark.parametrize(
    "one",
    [
        setting("eagle", head=HEAD),
        setting("peagle", head=str(FAMILY / "peagle-target")),
        setting("draft", draft_model=DRAFT),
        setting("cascade", draft_model=DRAFT, head=INNER),
    ],
    ids=lambda one: one.method,
)
def test_a_trace_is_what_the_target_took(bench: Workbench, prompts: list[list[int]], one: Setting) -> None:
    found = measured(bench, one, prompts)
    assert found.failure is None
    assert (found.method, dict(found.parts), dict(found.options)) == (one.method, dict(one.parts), dict(one.options))
    assert found.trace
    nodes = one.options["num_speculative_tokens"]
    lengths = [found.trace.length(Budget(n, n)) for n in range(nodes + 1)]
    assert lengths[0] == 1.0
    assert lengths == sorted(lengths)  # what is drafted beyond can only add
    assert lengths[-1] > 1.3  # of a head or model that was trained for this target
    assert all(0 < score <= 1 for step in found.trace.steps for score in step.scores)
    for step in found.trace.steps:  # what was accepted is one path
        deep = [depth for depth, yes in zip(step.depths, step.accepted, strict=True) if yes]
        assert sorted(deep) == list(range(1, len(deep) + 1))
    cost = found.draft
    inside = found.inner.draft if found.inner else cost
    assert inside.at(3, 3) > 0
    assert (found.inner is not None) == (one.method == "cascade")
    if found.inner:
        assert found.inner.trace
        assert found.inner.trace.length(Budget(12, 6)) > 1.3
    assert Candidate.from_dict(found.as_dict()) == found


def test_the_watched_text_is_that_of_the_engine(bench: Workbench, prompts: list[list[int]]) -> None:
    """Whatever each draft was allowed to be."""
    engine = bench.engine(setting("eagle", head=HEAD))
    plain = watch(bench.plain, prompts[0], NEW_TOKENS)
    budgets = iter([Budget(n % 6, 3) for n in range(NEW_TOKENS)])
    watched = watch(engine, prompts[0], NEW_TOKENS, budgets)
    assert sum(step.tokens for step in watched) == sum(step.tokens for step in plain)
    assert [step.context for step in watched][1:] == [
        len(prompts[0]) + sum(step.tokens for step in watched[:i]) for i in range(1, len(watched))
    ]
    assert all(len(step.draft) <= step.budget.max_nodes for step in watched)
    assert not watched[0].draft  # the target streams its first token before a drafter reads the prompt
    assert not watched[-1].whole
    assert measure_plain(bench, prompts, 8) > 0


def test_a_drafter_that_fails_says_so(
    bench: Workbench, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def fail(self: object, *arguments: object) -> None:
        calls.append(1)
        raise RuntimeError("out of\norder")

    monkeypatch.setattr(PromptLookup, "propose", fail)
    found = measured(bench, setting("lookup"), prompts)
    assert "out of" in str(found.failure)
    assert "lookup failed" in str(found.failure)
    assert found.trace is None
    monkeypatch.setattr(PromptLookup, "open", fail)
    assert measured(bench, setting("lookup"), prompts).failure


def test_a_head_of_another_model_says_so(bench: Workbench, prompts: list[list[int]]) -> None:
    found = measured(bench, setting("eagle", head=INNER), prompts)
    assert found.failure
    assert "\n" not in found.failure
    assert measured(bench, setting("eagle", head="nowhere/at/all"), prompts).failure


def test_how_wide_a_draft_may_be() -> None:
    """As long as its verification is worth a few plain steps, and at least 8 nodes."""
    widths = tuple(range(1, 65))
    steep = CostCurve((64,), widths, (tuple(float(n) for n in widths),))
    bent = CostCurve((64,), widths, (tuple(max(1.0, n / 4) for n in widths),))
    flat = CostCurve((64,), widths, (tuple(1.0 for _ in widths),))
    assert [widest_nodes(each) for each in (steep, bent, flat)] == [8, 23, 63]


def test_plain_decoding_needs_no_part(bench: Workbench) -> None:
    engine = bench.engine(PLAIN)
    assert bench.failure(engine, PLAIN) is None
    assert engine.model is bench.plain.model
