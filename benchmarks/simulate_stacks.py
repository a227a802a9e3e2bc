"""Models above each other, each with what its forwards cost and what its drafts give: from a packaged machine and pair,
from a profile of ``quantspec tune``, or with the acceptance of the one at the costs of the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import pairwise

from quantspec.benchmarks.shapes import SHAPES
from quantspec.benchmarks.simulate_machines import BYTES, Machine, Pair
from quantspec.benchmarks.simulate_rounds import FREE, DraftTime, Expected, replay, tree
from quantspec.drafters.config import EagleOptions
from quantspec.engine.config import HEAD_METHODS
from quantspec.engine.costs import Candidate, CostCurve, DraftCost, Profile, Trace
from quantspec.errors import UsageError

TREE_TOP_K = 10
"""EAGLE-2's, which the packaged pairs are fitted to."""


@dataclass(frozen=True)
class Head:
    """What drafts for a model directly. ``expected`` of so many nodes and levels, up to ``nodes`` and ``levels``, which
    are the same where it is no ``tree``."""

    expected: Callable[[int, int], Expected]
    time: DraftTime
    nodes: int
    levels: int
    tree: bool = True
    reads_features: bool = True


@dataclass(frozen=True)
class Model:
    """A level of a stack. ``agreement``: how often it accepts the tokens of the model below, by position; ``besides``:
    what a draft of that one costs outside its rounds; ``overhead``: seconds of a round outside forwards and drafts."""

    curve: CostCurve
    head: Head | None
    agreement: Sequence[float] = ()
    besides: DraftCost = FREE
    overhead: float = 0.0


@dataclass(frozen=True)
class Stack:
    """The target, its intermediate, that one's, ... and by which ``methods`` they can go."""

    machine: str
    methods: tuple[str, ...]
    models: tuple[Model, ...]
    trouble: str = ""
    """Why it, or a drafter of it, could not run there; empty if it could."""


def packaged(machine: Machine, pair: Pair, target: str, format: str) -> Stack:
    """Raises ``UsageError``: the pair does not know such a target."""
    names = list(pair.heads)
    if target not in names:
        raise UsageError(f"{pair.name} has no target {target!r}", hint=f"it has {', '.join(names)}")
    names = names[names.index(target) :]
    models = []
    for name, below in pairwise([*names, ""]):
        shape, ranks = SHAPES[name], pair.heads[name]
        time = head_time(machine.head(shape), TREE_TOP_K)
        head = Head(partial(_tree, ranks), time, nodes=63, levels=8)
        agreement = pair.agreement.get(f"{name}/{below}", ())
        models.append(Model(machine.model(shape, format), head, agreement, overhead=machine.round_us * 1e-6))
    methods = ("none", "eagle", *("draft", "cascade")[: 2 * (len(models) > 1)], *("cascade3",)[: len(models) > 2])
    return Stack(machine.name, methods, tuple(models), _memory(machine, target, format))


@lru_cache(maxsize=4096)
def _tree(ranks: tuple[tuple[float, ...], ...], nodes: int, levels: int) -> Expected:
    return tree(ranks, nodes, levels, TREE_TOP_K)


def _memory(machine: Machine, target: str, format: str) -> str:
    shape = SHAPES[target]
    vocabulary = shape.vocab * shape.hidden * 2.0 * (1 if shape.tied else 2)
    needed = (shape.layers * shape.layer_weights * BYTES[format] + vocabulary) / 1e9
    if needed <= machine.memory_gb:
        return ""
    return f"{target} in {format} takes {needed:.0f} GB, and {machine.title} has {machine.memory_gb:.0f}"


def head_time(curve: CostCurve, top_k: int) -> DraftTime:
    """Of a tree: one row first, then ``top_k`` on each further level, of all sequences in one forward."""

    def seconds(levels: int, nodes: int, batch: int) -> float:
        near = curve.contexts[0]
        return curve.at(batch, near) + (levels - 1) * curve.at(top_k * batch, near) if levels else 0.0

    return seconds


def profiled(profile: Profile, name: str) -> list[Stack]:
    """One stack for each drafter that was measured, plain decoding with each."""
    measured = [each for each in profile.candidates if each.trace and each.trace.steps and not each.failure]
    stacks = [stack_of(profile, each, name) for each in measured]
    return stacks or [Stack(name, ("none",), (Model(profile.target, None, overhead=profile.overhead),))]


def stack_of(profile: Profile, candidate: Candidate, name: str) -> Stack:
    """Of one drafter that was measured."""
    assert candidate.trace, "measured"
    methods = ("none", candidate.method)
    if candidate.inner is None:
        head = traced(candidate, candidate.trace, candidate.draft)
        return Stack(name, methods, (Model(profile.target, head, overhead=profile.overhead),))
    inside = candidate.inner
    nodes, levels = candidate.options.get("tree_nodes", 0), candidate.options.get("tree_depth", 0)
    inner_head = None
    if inside.trace and inside.trace.steps and nodes:
        expected = lru_cache(partial(replay, inside.trace))
        inner_head = Head(expected, _times(inside.draft), nodes, levels, reads_features="device" in profile.machine)
    agreement = candidate.trace.acceptance_by_position() or (0.0,)
    target = Model(profile.target, None, agreement, candidate.draft, profile.overhead)
    return Stack(name, methods, (target, Model(inside.target, inner_head)))


def traced(candidate: Candidate, trace: Trace, cost: DraftCost) -> Head:
    """What was measured, at any narrower setting."""
    nodes = candidate.options["num_speculative_tokens"]
    heads = candidate.method in HEAD_METHODS
    levels = candidate.options.get("tree_depth", EagleOptions().depth) if heads else nodes
    return Head(lru_cache(partial(replay, trace)), _times(cost), nodes, levels, tree=heads, reads_features=heads)


def _times(cost: DraftCost) -> DraftTime:
    return lambda levels, nodes, batch: batch * cost.at(levels, nodes)


def elsewhere(profile: Profile, machine: Machine, target: str, format: str) -> list[Stack]:
    """What was accepted here, at what it would cost there. Models are of the packaged shapes, heads EAGLE's. A drafter
    for whose models there are no shapes leaves plain decoding, and a line. Raises ``UsageError``: no such target."""
    names = list(SHAPES)[::-1]
    if target not in names:
        raise UsageError(f"no shape {target!r} is known", hint=f"known: {', '.join(names)}")
    shapes = [SHAPES[name] for name in names[names.index(target) :]]
    curves = [machine.model(shape, format) for shape in shapes]
    times = [head_time(machine.head(shape), TREE_TOP_K) for shape in shapes]
    free: DraftTime = lambda levels, nodes, batch: 0.0  # noqa: E731
    found = []
    for stack in profiled(profile, machine.name):
        models = []
        if len(stack.models) > len(shapes) or (stack.methods[-1] == "draft" and len(shapes) < 2):
            missing = f"{stack.methods[-1]} drafts with a smaller model than {target}, and no such shape is known"
            plain = Model(curves[0], None, overhead=machine.round_us * 1e-6)
            found.append(Stack(machine.name, ("none",), (plain,), missing))
            continue
        for model, curve, time in zip(stack.models, curves, times, strict=False):
            head = model.head
            if head is not None:
                own = free if stack.methods[-1] == "lookup" else time
                if stack.methods[-1] == "draft":
                    own = _chain_time(curves[1])
                elif stack.methods[-1] == "peagle":
                    own = _one_forward(machine.head(shapes[0]))
                head = replace(head, time=own)
            overhead = machine.round_us * 1e-6
            models.append(replace(model, curve=curve, head=head, besides=FREE, overhead=overhead))
        found.append(Stack(machine.name, stack.methods, tuple(models), _memory(machine, target, format)))
    return found


def _chain_time(curve: CostCurve) -> DraftTime:
    return lambda levels, nodes, batch: levels * curve.at(batch, curve.contexts[0])


def _one_forward(curve: CostCurve) -> DraftTime:
    """Of a head without a path network, as the published ones are."""
    return lambda levels, nodes, batch: curve.at(levels * batch, curve.contexts[0])
