"""Drafters as they are on this machine: what a draft costs, and what the target takes of the widest ones.

Every drafter writes the same prompts with the real engine. Two steps of three draft as widely as may ever pay and make
its trace; the third drafts less, so that fixed costs can be told from those of a level and of a node.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from time import perf_counter

from quantspec.calibrate.cost.fit import fit, quick
from quantspec.calibrate.cost.inner import InnerVerifier
from quantspec.calibrate.cost.watch import Watched, watch
from quantspec.calibrate.cost.workbench import Workbench
from quantspec.drafters.cascade import Cascade
from quantspec.engine.config import HEAD_METHODS
from quantspec.engine.costs import Candidate, CostCurve, DraftCost, Inner, Setting, Trace
from quantspec.engine.engine import Engine
from quantspec.errors import QuantSpecError
from quantspec.types import Budget

_WORTH = 6.0
"""A draft whose verification takes longer than so many plain steps does not pay: hardly more tokens come of any."""
_NODES = (8, 63)
_LONGEST = {"lookup": 16, "draft": 10, "cascade": 16}
_DEPTH = 8
_INNER = {"min_draft": 10, "tree_nodes": 12, "tree_depth": 6}
_AFTER = 2
"""Steps unlike the others: the first reads the prompt, and in the second the drafter does."""
_LEAST_PROMPTS = 2

Prompts = Sequence[Sequence[int]]


def widest_nodes(target: CostCurve) -> int:
    """How many nodes a draft may have and still pay, if all goes well."""
    least, most = _NODES
    context = target.contexts[0]
    return max((n for n in range(least, most + 1) if target.relative(n + 1, context) <= _WORTH), default=least)


def widest(method: str, nodes: int, top_k: int, new_tokens: int) -> Mapping[str, int]:
    """The options with which a drafter's trace is taken, on texts of ``new_tokens``: a chain has room in most steps."""
    if method not in HEAD_METHODS:
        nodes = min(nodes, _LONGEST.get(method, nodes), max(new_tokens // 3, 1))
    options = {"num_speculative_tokens": nodes}
    if method in HEAD_METHODS:
        options |= {"tree_depth": _DEPTH, "tree_top_k": top_k}
    if method == "cascade":
        options |= _INNER | {"tree_top_k": top_k}
    return options


@dataclass(frozen=True, slots=True)
class Plain:
    """The target without a drafter: its forwards, and the seconds of a step outside them."""

    target: CostCurve
    overhead: float

    def more(self, step: Watched) -> float:
        """Seconds that a step took beyond its forward's and a plain step's. The forward is as the curve has it: on a
        device a forward that is timed waits for the draft before it."""
        return step.seconds - self.overhead - self.target.at(len(step.draft) + 1, step.context)


def measure_plain(bench: Workbench, prompts: Prompts, new_tokens: int) -> float:
    """Seconds of a plain step outside its forward."""
    steps = [step for prompt in prompts for step in watch(bench.plain, prompt, new_tokens)[1:]]
    return quick([step.seconds - step.verify for step in steps])


def measure_drafter(
    bench: Workbench, setting: Setting, prompts: Prompts, new_tokens: int, plain: Plain, inner_curve: CostCurve | None,
    seconds: float,
) -> Candidate:  # fmt: skip
    """A drafter, with the ``setting`` of its widest drafts, on as many prompts as ``seconds`` allow. Of a cascade,
    ``inner_curve`` is its intermediate's. One that fails says so in its ``failure``."""
    try:
        engine = bench.engine(setting)
        runs, inner, failure = _watch_all(bench, engine, setting, prompts, new_tokens, seconds)
    except QuantSpecError as error:
        return failed(setting, str(error))
    except Exception as error:  # of a drafter that nobody has seen yet
        return failed(setting, f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")
    if failure:
        return failed(setting, failure)
    steps = [step for run in runs for step in run[_AFTER:]]
    trace = Trace(tuple(step.record() for step in steps if step.whole and step.budget == engine.budget))
    if inner is None:
        cost = fit((_levels(step), len(step.draft), plain.more(step)) for step in steps if len(step.draft))
        return _candidate(setting, _with_prefill(cost, runs, plain), trace)
    assert inner_curve is not None, "a cascade's intermediate was measured before"
    return _cascade(setting, runs, inner, trace, plain, inner_curve)


def failed(setting: Setting, why: str) -> Candidate:
    """A drafter that could not be measured."""
    return Candidate(setting.method, setting.parts, setting.options, DraftCost(), failure=why)


def _candidate(setting: Setting, cost: DraftCost, trace: Trace, inner: Inner | None = None) -> Candidate:
    failure = None if trace.steps else "it wrote nothing long enough to be measured"
    return Candidate(setting.method, setting.parts, setting.options, cost, trace, inner, failure)


def _watch_all(
    bench: Workbench, engine: Engine, setting: Setting, prompts: Prompts, new_tokens: int, seconds: float
) -> tuple[list[list[Watched]], InnerVerifier | None, str | None]:
    """The runs, what was seen inside a cascade, and why there are no more of them."""
    inner: InnerVerifier | None = None
    budgets: Iterator[Budget] | None = _budgets(engine.budget)
    if setting.method == "cascade":
        assert isinstance(engine.drafter, Cascade), "the method's drafter"
        config, budgets = engine.config, None
        inner = InnerVerifier(engine.drafter, _budgets(Budget(config.tree_nodes, config.tree_depth)))
    began, runs = perf_counter(), list[list[Watched]]()
    for prompt in prompts:
        runs.append(watch(engine, prompt, new_tokens, budgets, inner.begin if inner else _nothing))
        failure = bench.failure(engine, setting)
        if failure:
            return runs, inner, failure
        if perf_counter() - began > seconds and len(runs) >= _LEAST_PROMPTS:
            break
    return runs, inner, None


def _nothing() -> None:
    pass


def _budgets(wide: Budget) -> Iterator[Budget]:
    """The widest twice, then a narrower one, of growing depth."""
    narrow = [Budget(min(2 * depth, wide.max_nodes), min(depth, wide.max_depth)) for depth in (1, 2, 4)]
    return cycle([each for one in narrow for each in (wide, wide, one)])


def _levels(step: Watched) -> int:
    return max(step.draft.depths(), default=0)


def _with_prefill(cost: DraftCost, runs: Sequence[Sequence[Watched]], plain: Plain) -> DraftCost:
    """With what the first draft took beyond an ordinary one, over the tokens that it read."""
    firsts = [run[1] for run in runs if len(run) > _AFTER and len(run[1].draft)]
    extra = [
        (plain.more(step) - cost.at(_levels(step), len(step.draft))) / step.context for step in firsts
    ]  # fmt: skip
    return DraftCost(max(quick(extra), 0.0) if extra else 0.0, cost.fixed, cost.per_level, cost.per_node)


def _cascade(
    setting: Setting, runs: Sequence[Sequence[Watched]], inner: InnerVerifier, trace: Trace, plain: Plain,
    curve: CostCurve,
) -> Candidate:  # fmt: skip
    rounds, rest, firsts = [], [], []
    at = 0
    for run in runs:
        of_run = inner.steps[at : at + len(run)]
        at += len(run)
        for number, (step, inside) in enumerate(zip(run, of_run, strict=True)):
            if not inside:
                continue
            spent = sum(each.draft + each.verify for each in inside)
            if number < _AFTER:
                firsts.append((spent, step.context))
            else:
                rounds += inside
                rest.append(max(plain.more(step) - spent, 0.0))
    cost = fit(each.sample(curve) for each in rounds if each.record.scores)
    level = Inner(curve, cost, Trace(tuple(each.record for each in rounds if each.wide)))
    prefill = quick([spent / context for spent, context in firsts]) if firsts else 0.0
    return _candidate(setting, DraftCost(prefill, quick(rest) if rest else 0.0), trace, level)
