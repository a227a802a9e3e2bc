"""The planner: how fast each way to decode would be by what a profile knows, and which one to take.

A node is worth a row iff its probability exceeds what the row costs in tokens, which is the rate ``rho`` (tokens per
second) times its seconds; and ``rho`` is the rate that follows. Iterated, this is Dinkelbach's method for the best
ratio of tokens to seconds, and it ends at the optimal stopping rule for chains, trees and lookups alike; speculating
nothing is one of its answers. Where time is a staircase, whole tiles are bought or none of their rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import cycle, pairwise
from statistics import fmean

from quantspec.engine.costs import PLAIN, Candidate, CostCurve, DraftCost, Inner, Profile, Setting, Step, Trace
from quantspec.types import Budget


@dataclass(frozen=True, slots=True)
class Speed:
    """What one step gives and takes: ``tokens`` of each sequence, ``seconds`` of all of them."""

    tokens: float
    seconds: float
    batch: int = 1

    @property
    def rate(self) -> float:
        """Tokens per second of all sequences together."""
        return self.batch * self.tokens / self.seconds


@dataclass(frozen=True, slots=True)
class Costs:
    """What a step costs at one context and batch. ``verify[k]``: seconds of a forward with k draft nodes of each
    sequence, ``draft`` of each sequence's draft."""

    verify: list[float]
    draft: DraftCost
    overhead: float
    batch: int = 1

    @classmethod
    def of(
        cls, target: CostCurve, draft: DraftCost, overhead: float, nodes: int, context: int, batch: int = 1
    ) -> Costs:
        """For drafts of up to ``nodes`` nodes."""
        return cls(target.table(nodes + 1, context, batch), draft, overhead, batch)

    @property
    def plain(self) -> Speed:
        """Of plain decoding."""
        return Speed(1.0, self.step(0, 0), self.batch)

    def step(self, nodes: int, levels: int) -> float:
        """Seconds of one step in which every sequence drafts that much."""
        return self.verify[nodes] + self.overhead + self.batch * self.draft.at(levels, nodes)

    def budget(self, rho: float, nodes: int, depth: int, trust: float = 1.0) -> Budget:
        """The prices at ``rho`` tokens per second, for scores of which ``trust`` come true. ``nodes`` at most."""
        rows = self.verify[: nodes + 1]
        prices = [
            rho * ((after - before) / self.batch + self.draft.per_node) / trust for before, after in pairwise(rows)
        ]
        return Budget(nodes, depth, prices=tuple(prices), level_price=rho * self.draft.per_level / trust)


def dinkelbach(policy: Callable[[float], Speed], start: float) -> float:
    """The best rate: ``policy(rho)`` is the speed of what gains most tokens over ``rho`` times its seconds."""
    rho = start
    while (found := policy(rho).rate) > rho * (1 + 1e-6):
        rho = found
    return rho


def predict(profile: Profile, setting: Setting, context: int | None = None, batch: int = 1) -> Speed:
    """The speed of a setting as it is, at one context (None: those of its traces), drafters' reading of the prompt left
    out. Its drafter must have been measured."""
    candidate = profile.candidate(setting)
    if setting.method == PLAIN.method:
        return Costs.of(profile.target, DraftCost(), profile.overhead, 0, _context(profile, context), batch).plain
    assert candidate, "a setting of a drafter that was not measured"
    return speed_of(profile.target, profile.overhead, candidate, setting.options, context, batch)


def speed_of(
    target: CostCurve,
    overhead: float,
    candidate: Candidate,
    options: Mapping[str, int],
    context: int | None = None,
    batch: int = 1,
) -> Speed:
    """The speed of a candidate with these options, of which those not given are its own."""
    assert candidate.trace, "measured"
    options = {**candidate.options, **options}
    at = _mean_context(candidate.trace) if context is None else context
    nodes = options["num_speculative_tokens"]
    costs = Costs.of(target, candidate.draft, overhead, nodes, at, batch)
    if candidate.inner:
        return _cascade(costs, candidate.trace, candidate.inner, options, at)
    return _steps(costs, candidate.trace, Budget(nodes, options.get("tree_depth", nodes)))


def _steps(costs: Costs, trace: Trace, budget: Budget) -> Speed:
    """Mean over the steps of a trace, each cut to the budget."""
    tokens = seconds = 0.0
    for step in trace.steps:
        levels = _levels(step, budget)
        kept = step.kept(Budget(budget.max_nodes, levels, budget.min_score, budget.prices))
        tokens += 1 + sum(step.accepted[node] for node in kept)
        seconds += costs.step(len(kept), levels)
    count = max(len(trace.steps), 1)
    return Speed(tokens / count, seconds / count, costs.batch)


def _levels(step: Step, budget: Budget) -> int:
    """How many levels are grown: one more as long as it promises its price, if it keeps as much as the one before."""
    masses = [1.0, *[0.0] * max(step.depths, default=0)]
    for score, depth in zip(step.scores, step.depths, strict=True):
        masses[depth] += score
    most = min(len(masses) - 1, budget.max_depth)
    price = budget.level_price
    return next((n for n in range(1, most) if masses[n] ** 2 <= price * masses[n - 1]), most)


def _cascade(costs: Costs, trace: Trace, inner: Inner, options: Mapping[str, int], context: int) -> Speed:
    """A walk over the inner and the outer trace side by side: rounds of the intermediate until ``min_draft`` tokens
    stand, then the target. What is past a draft that is accepted whole is kept."""
    room, goal = options["num_speculative_tokens"], min(options["min_draft"], options["num_speculative_tokens"])
    gains, seconds_of_round = _rounds(inner, options, context, costs.batch)
    gain = cycle(gains)
    tokens = seconds = 0.0
    have = 0
    for step in trace.steps:
        while have < goal:
            have += next(gain)
            seconds += seconds_of_round
        length = min(have, room, max(step.depths, default=0))
        kept = step.kept(Budget(room, length))
        accepted = sum(step.accepted[node] for node in kept)
        tokens += 1 + accepted
        seconds += costs.step(len(kept), 0)
        have = max(have - length - 1, 0) if accepted == length else 0
    count = max(len(trace.steps), 1)
    return Speed(tokens / count, seconds / count, costs.batch)


def _rounds(inner: Inner, options: Mapping[str, int], context: int, batch: int) -> tuple[list[int], float]:
    """Tokens of each inner step of the trace, and the mean seconds of one."""
    budget = Budget(options.get("tree_nodes", 0), options.get("tree_depth", 0))
    costs = Costs.of(inner.target, inner.draft, 0.0, budget.max_nodes, context, batch)
    if not inner.trace or not inner.trace.steps:
        return [1], costs.step(0, 0)
    return [step.tokens(budget) for step in inner.trace.steps], _steps(costs, inner.trace, budget).seconds


@dataclass(frozen=True, slots=True)
class Plan:
    """A setting, its ``speed`` as it is, and the ``rate`` in tokens per second where the width follows each draft's
    scores."""

    setting: Setting
    speed: Speed
    rate: float


def rank(profile: Profile, context: int | None = None, batch: int = 1) -> list[Plan]:
    """The best setting of every candidate that could be measured, and plain decoding; the fastest first."""
    plain = predict(profile, PLAIN, context, batch)
    plans = [Plan(PLAIN, plain, plain.rate)]
    for candidate in profile.candidates:
        if candidate.trace and candidate.trace.steps and not candidate.failure:
            plans.append(best_setting(profile.target, profile.overhead, candidate, context, batch))
    return sorted(plans, key=lambda plan: -plan.rate)


def best_setting(
    target: CostCurve, overhead: float, candidate: Candidate, context: int | None = None, batch: int = 1
) -> Plan:
    """The candidate's best setting: trees as wide as an edge of the target's curve, chains of any length."""
    assert candidate.trace, "measured"
    at = _mean_context(candidate.trace) if context is None else context
    nodes = candidate.options["num_speculative_tokens"]
    costs = Costs.of(target, candidate.draft, overhead, nodes, at, batch)
    if candidate.inner:
        found = list(_cascades(costs, candidate, target, at))
    else:
        found = list(_widths(costs, candidate, edges(target, at, nodes, batch)))
    options, speed = max(found, key=lambda each: each[1].rate)
    setting = Setting(candidate.method, candidate.parts, options)
    if candidate.inner:
        return Plan(setting, speed, speed.rate)
    depth, trust = candidate.options.get("tree_depth", nodes), trust_of(candidate.trace)
    trace = candidate.trace

    def adapted(rho: float) -> Speed:
        return _steps(costs, trace, costs.budget(rho, nodes, depth, trust))

    return Plan(setting, speed, max(speed.rate, dinkelbach(adapted, costs.plain.rate)))


def edges(target: CostCurve, context: int, nodes: int, batch: int = 1) -> list[int]:
    """Numbers of draft nodes, up to ``nodes``, after which a forward's time rises; ``nodes`` where it is flat."""
    widths = {edge // batch - 1 for edge in target.edges(context)}
    return sorted(width for width in widths if 0 < width <= nodes) or [nodes]


def _widths(costs: Costs, candidate: Candidate, ends: list[int]) -> Iterator[tuple[dict[str, int], Speed]]:
    """Trees: any depth, and as many nodes as pay or are free. Chains: any length."""
    assert candidate.trace, "measured"
    tree, nodes = "tree_depth" in candidate.options, candidate.options["num_speculative_tokens"]
    for depth in range(1, candidate.options.get("tree_depth", nodes) + 1):
        speeds = _sweep(costs, candidate.trace, depth, nodes)
        for width in ends if tree else [depth]:
            chosen = {"num_speculative_tokens": width, **({"tree_depth": depth} if tree else {})}
            yield {**candidate.options, **chosen}, speeds[width]


def _sweep(costs: Costs, trace: Trace, depth: int, nodes: int) -> list[Speed]:
    """The speed with 0, 1, ... ``nodes`` nodes of that depth at most."""
    there, hits, drafting = [0] * (nodes + 1), [0] * (nodes + 1), 0.0
    for step in trace.steps:
        drafting += costs.batch * costs.draft.at(min(depth, max(step.depths, default=0)), 0)
        for number, node in enumerate(step.kept(Budget(nodes, depth)), 1):
            there[number] += 1
            hits[number] += step.accepted[node]
    count, speeds = len(trace.steps), list[Speed]()
    tokens, seconds = float(count), count * costs.step(0, 0) + drafting
    for number in range(nodes + 1):
        if number:
            row = costs.verify[number] - costs.verify[number - 1] + costs.batch * costs.draft.per_node
            tokens, seconds = tokens + hits[number], seconds + there[number] * row
        speeds.append(Speed(tokens / count, seconds / count, costs.batch))
    return speeds


def _cascades(
    costs: Costs, candidate: Candidate, target: CostCurve, context: int
) -> Iterator[tuple[dict[str, int], Speed]]:
    """The intermediate's own best tree, with every ``min_draft``."""
    assert candidate.trace, "measured"
    assert candidate.inner, "a cascade"
    options, inner = dict(candidate.options), candidate.inner
    if inner.trace and inner.trace.steps and options.get("tree_nodes"):
        inside = {**options, "num_speculative_tokens": options["tree_nodes"]}
        level = Candidate("inner", {}, inside, inner.draft, inner.trace)
        best = best_setting(inner.target, 0.0, level, context, costs.batch).setting.options
        options |= {"tree_nodes": best["num_speculative_tokens"], "tree_depth": best["tree_depth"]}
    room = options["num_speculative_tokens"]
    ends = edges(target, context, room, costs.batch)
    for goal in range(1, min(options["min_draft"], room) + 1):
        for width in {next((end for end in ends if end >= goal), room), room}:
            chosen = {**options, "min_draft": goal, "num_speculative_tokens": width}
            yield chosen, _cascade(costs, candidate.trace, inner, chosen, context)


def draft_cost(candidate: Candidate, options: Mapping[str, int], context: int) -> DraftCost:
    """What a draft costs, a cascade's inner rounds spread over the tokens that they give."""
    if not candidate.inner:
        return candidate.draft
    gains, seconds = _rounds(candidate.inner, {**candidate.options, **options}, context, 1)
    return replace(candidate.draft, per_level=candidate.draft.per_level + seconds / fmean(gains))


def trust_of(trace: Trace) -> float:
    """How many nodes were accepted for each that the scores promised; not 0, by which prices are divided."""
    promised = sum(sum(step.scores) for step in trace.steps)
    return max(sum(sum(step.accepted) for step in trace.steps) / promised, 0.01) if promised else 1.0


@dataclass(frozen=True, slots=True)
class Outlook:
    """What a profile says of the drafter that runs.

    ``speed`` is that of its setting, ``acceptance`` by position, ``trust`` the nodes accepted for each that scores
    promise; ``nodes`` and ``depth`` bound a draft. With ``steady`` every draft has room for ``nodes``: a device has
    graphs of that size.
    """

    target: CostCurve
    overhead: float
    draft: DraftCost
    speed: Speed
    acceptance: tuple[float, ...]
    trust: float
    nodes: int
    depth: int
    steady: bool = False


def outlook(profile: Profile, steady: bool = False) -> Outlook | None:
    """What the profile says of the drafter it chose; None for plain decoding. ``steady``: its drafts keep the width of
    the setting."""
    setting, candidate = profile.chosen, profile.candidate(profile.chosen)
    if not candidate or not candidate.trace or not candidate.trace.steps:
        return None
    trace, widest = candidate.trace, setting.options if steady else {}
    options = {**candidate.options, **widest}
    nodes = options["num_speculative_tokens"]
    return Outlook(
        profile.target,
        profile.overhead,
        draft_cost(candidate, setting.options, _mean_context(trace)),
        predict(profile, setting),
        trace.acceptance_by_position(),
        trust_of(trace),
        nodes,
        nodes if candidate.inner else options.get("tree_depth", nodes),
        steady,
    )


def _mean_context(trace: Trace) -> int:
    return round(fmean([step.context for step in trace.steps])) if trace.steps else 0


def _context(profile: Profile, context: int | None) -> int:
    """That of the first trace where none is asked for."""
    if context is not None:
        return context
    traces = (each.trace for each in profile.candidates if each.trace)
    return next((_mean_context(trace) for trace in traces), profile.target.contexts[0])
