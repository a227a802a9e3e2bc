"""How fast any way to decode would be on any machine: costs of the one, acceptance of the other, and each strategy's
best setting at each batch.

    quantspec bench simulate --machine a100 --machine h200 --batch 1,4,16

Cascades are planned from the inside out: of an intermediate and what is below it, the level above sees nothing but
tokens and their seconds, so the way by which the intermediate alone would be fastest is the way inside.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from quantspec.benchmarks.simulate_config import SimulateBench
from quantspec.benchmarks.simulate_machines import Pair, load_machine, load_pair, machines
from quantspec.benchmarks.simulate_rounds import Cascade, Direct, Verified
from quantspec.benchmarks.simulate_stacks import Head, Model, Stack, elsewhere, packaged, profiled
from quantspec.engine.costs import Profile
from quantspec.engine.records import Record
from quantspec.errors import UsageError

Options = Mapping[str, int]
_NODES = (*range(1, 33), 35, 39, 40, 43, 47, 48, 51, 55, 56, 59, 60, 63)
_LONGEST = 24
PAIR = "llama-3"


@dataclass(frozen=True)
class Row(Record):
    """One prediction. ``tokens`` of a sequence in a step, ``rows`` of a sequence in the target's forward (both means);
    seconds of a step of the whole batch, of which ``draft_seconds`` before the target's forward; ``speedup`` over plain
    decoding of the same batch."""

    machine: str
    strategy: str
    options: Mapping[str, int]
    batch: int
    tokens: float
    rows: float
    seconds: float
    draft_seconds: float
    tokens_per_second: float
    speedup: float


@dataclass(frozen=True)
class Report(Record):
    """All predictions. ``notes``: what could not run there."""

    context: int
    target: str
    format: str
    acceptance: str
    rows: tuple[Row, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Planned:
    """A way to decode and its expectation."""

    options: Options
    verified: Verified


def run(config: SimulateBench) -> Report:
    """Raises ``UsageError`` for a name that is not known, ``ModelError`` for a profile that cannot be read."""
    rows, notes, wanted = list[Row](), dict[str, None](), [parse_strategy(text) for text in config.strategies]
    for name in config.machine:
        stacks = _stacks(config, name)
        _check_names(wanted, stacks)
        notes.update((stack.trouble, None) for stack in stacks if stack.trouble)
        for batch in config.batch:
            plain = build(stacks[0], "none", {}, config.context)
            speed = plain.tokens_per_second(batch)
            if not wanted or any(method == "none" for method, _ in wanted):
                rows.append(_row(stacks[0].machine, "none", Planned({}, plain), batch, speed))
            for stack in stacks:
                for method, fixed in wanted or [(method, {}) for method in stack.methods]:
                    if method in stack.methods and method != "none":
                        planned = best(stack, method, config.context, batch, fixed)
                        rows.append(_row(stack.machine, method, planned, batch, speed))
    own = any(name not in machines() for name in config.machine)
    acceptance = config.acceptance or ("the machine's own" if own else PAIR)
    return Report(config.context, config.target, config.format, acceptance, tuple(rows), tuple(notes))


def _stacks(config: SimulateBench, name: str) -> list[Stack]:
    costs = load_machine(name) if name in machines() or not Path(name).is_file() else Profile.load(name)
    asked = config.acceptance
    if isinstance(costs, Profile):
        if asked is not None:
            raise UsageError("--acceptance is for packaged machines", hint="a profile has its own")
        return profiled(costs, Path(name).stem)
    accepting = Profile.load(asked) if asked and Path(asked).is_file() else load_pair(asked or PAIR)
    if isinstance(accepting, Pair):
        return [packaged(costs, accepting, config.target, config.format)]
    return elsewhere(accepting, costs, config.target, config.format)


def _check_names(wanted: list[tuple[str, dict[str, int]]], stacks: list[Stack]) -> None:
    known = dict.fromkeys(method for stack in stacks for method in stack.methods)
    for method, fixed in wanted:
        if method not in known:
            raise UsageError(f"no strategy {method!r} here", hint=f"there are {', '.join(known)}")
        options = _options_of(method, stacks)
        unknown = [key for key in fixed if key not in options]
        if unknown:
            hint = f"known: {', '.join(options)}" if options else f"leave out {unknown[0]}"
            raise UsageError(f"{method} has no option {unknown[0]!r}", hint=hint)


def _options_of(method: str, stacks: list[Stack]) -> tuple[str, ...]:
    """What can be fixed of a strategy."""
    stack = next(stack for stack in stacks if method in stack.methods)
    levels = _levels(stack, method)
    if levels == 1:
        head = stack.models[0].head
        return ("num_speculative_tokens", "tree_depth")[: 2 if head is None or head.tree else 1]
    if method == "draft":
        return ("num_speculative_tokens",)
    cascade = ("num_speculative_tokens", "min_draft", "tree_nodes", "tree_depth")
    inner = ("inner_min_draft", "inner_num_speculative_tokens")
    return {0: (), 2: cascade, 3: (*cascade, *inner)}[levels]


def parse_strategy(text: str) -> tuple[str, dict[str, int]]:
    """``eagle``, or ``eagle:tree_depth=6:num_speculative_tokens=60``. Raises ``UsageError``."""
    method, *pairs = text.split(":")
    fixed = {}
    for pair in pairs:
        key, _, number = pair.partition("=")
        if not number.isdigit() or not int(number):
            raise UsageError(f"{pair!r} is not KEY=NUMBER", hint="as in eagle:num_speculative_tokens=60")
        fixed[key] = int(number)
    return method, fixed


def build(stack: Stack, method: str, options: Options, context: int) -> Verified:
    """A way to decode. Options are those of ``EngineConfig``; ``inner_`` ones of the cascade inside ``cascade3``."""
    models, levels = stack.models, _levels(stack, method)
    if levels == 0:
        drafting: Direct | Cascade = Direct()
    elif levels == 1:
        drafting = _direct(models[0].head, options["num_speculative_tokens"], options.get("tree_depth"))
    else:
        at = levels - 1
        inner = _on(models[at], _innermost(models[at], options), context)
        for model in models[at - 1 : 0 : -1]:
            below = (options["inner_min_draft"], options["inner_num_speculative_tokens"])
            inner = _on(model, Cascade(inner, model.agreement, *below, model.besides), context)
        target, chain = models[0], options["num_speculative_tokens"]
        drafting = Cascade(inner, target.agreement, options.get("min_draft", chain), chain, target.besides)
    return _on(models[0], drafting, context)


def _on(model: Model, drafting: Direct | Cascade, context: int) -> Verified:
    return Verified(model.curve, drafting, context, model.overhead)


def _levels(stack: Stack, method: str) -> int:
    """How many models' rounds there are: a draft model's chain, too, is a cascade, with nothing inside."""
    if method == "draft":
        return min(len(stack.models), 2)
    return {"none": 0, "cascade": 2, "cascade3": 3}.get(method, 1)


def _innermost(model: Model, options: Options) -> Direct:
    if model.head is None or "tree_nodes" not in options:
        return Direct()
    return _direct(model.head, options["tree_nodes"], options.get("tree_depth"))


def _direct(head: Head | None, nodes: int, levels: int | None) -> Direct:
    assert head, "a method without its drafter"
    return Direct(head.expected(nodes, levels or nodes), head.time, head.reads_features)


def best(stack: Stack, method: str, context: int, batch: int = 1, fixed: Options | None = None) -> Planned:
    """The fastest setting of a strategy, with the options that are ``fixed``."""
    found = {tuple(options.items()): options for options in settings(stack, method, context, batch, fixed or {})}
    plans = (Planned(options, build(stack, method, options, context)) for options in found.values())
    return max(plans, key=lambda planned: planned.verified.tokens_per_second(batch))


def settings(stack: Stack, method: str, context: int, batch: int, fixed: Options) -> Iterator[Options]:
    """The settings to choose from."""
    levels, most = _levels(stack, method), fixed.get("num_speculative_tokens")
    if levels == 1:
        head = stack.models[0].head
        assert head, "a method without its drafter"
        yield from ({**options, **fixed} for options in _shapes(head))
        return
    if method == "draft":
        yield from ({"num_speculative_tokens": k} for k in ([most] if most else range(1, _LONGEST + 1)))
        return
    inside = _inside(stack, levels, context, batch, fixed)
    edges = [edge // batch - 1 for edge in stack.models[0].curve.edges(context) if edge // batch > 1]
    for goal in [fixed["min_draft"]] if "min_draft" in fixed else range(1, _LONGEST + 1):
        deep = goal + inside.get("inner_num_speculative_tokens", inside.get("tree_depth", 0))
        for chain in [most] if most else sorted({goal, deep, *[edge for edge in edges if edge >= goal][:1]}):
            yield {"min_draft": goal, "num_speculative_tokens": chain, **inside}


def _inside(stack: Stack, levels: int, context: int, batch: int, fixed: Options) -> dict[str, int]:
    """The best way to run the intermediate by itself, in the names it has inside a cascade."""
    below = Stack(stack.machine, (), stack.models[1:])
    if levels == 3:
        names = {"inner_min_draft": "min_draft", "inner_num_speculative_tokens": "num_speculative_tokens"}
        kept = {names.get(key, key): n for key, n in fixed.items() if key in (*names, "tree_nodes", "tree_depth")}
        found = best(below, "cascade", context, batch, kept).options
        return {f"inner_{key}" if key in names.values() else key: n for key, n in found.items()}
    if below.models[0].head is None:
        return {}
    names = {"tree_nodes": "num_speculative_tokens", "tree_depth": "tree_depth"}
    kept = {names[key]: n for key, n in fixed.items() if key in names}
    found = best(below, "eagle", context, batch, kept).options
    return {"tree_nodes": found["num_speculative_tokens"], "tree_depth": found["tree_depth"]}


def _shapes(head: Head) -> Iterator[dict[str, int]]:
    for levels in range(1, head.levels + 1):
        if head.tree:
            for nodes in _NODES:
                if levels <= nodes <= head.nodes:
                    yield {"num_speculative_tokens": nodes, "tree_depth": levels}
        else:
            yield {"num_speculative_tokens": levels}


def _row(machine: str, method: str, planned: Planned, batch: int, plain: float) -> Row:
    verified = planned.verified
    speed, drafting = verified.tokens_per_second(batch), verified.drafter.seconds(batch)
    rows = sum(share * (nodes + 1) for (_, nodes), share in verified.drafter.expected.sizes.items())
    seconds = verified.seconds(batch)
    return Row(
        machine, method, dict(planned.options), batch, verified.tokens, rows, seconds, drafting, speed, speed / plain
    )
