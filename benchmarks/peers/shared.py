"""Several methods of this package around one target: a worker that loads it once, where a copy for each would not fit.

Trees and cascades of equal parts and settings share a drafter too, and differ in how much of its draft is verified.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import quantspec
from quantspec.benchmarks.generate_rows import PLAIN
from quantspec.benchmarks.peers import ours
from quantspec.benchmarks.peers.process import Contender
from quantspec.benchmarks.peers.protocol import Answer, Answerer, Ask, serve
from quantspec.engine.build import build, equip
from quantspec.engine.config import HEAD_METHODS, EngineConfig
from quantspec.engine.engine import Engine
from quantspec.engine.llm import LLM
from quantspec.errors import ModelError
from quantspec.types import SamplingParams


def sharing(contenders: list[Contender]) -> list[Contender]:
    """The same methods of one target as contenders that share a process; ``PLAIN`` is among them."""
    options = {"methods": {one.name: dict(one.options) for one in contenders if not one.error}}
    return [
        one if one.error else replace(one, module=__name__, options=options, ask={"method": one.name})
        for one in contenders
    ]


def load(options: Mapping[str, Any]) -> tuple[dict[str, Any], Answerer]:
    """``methods``: by name the options of ``quantspec.load``; ``curve``: as in ``ours``, of plain decoding alone."""
    methods = options["methods"]
    if "curve" in options:
        return ours.load({**methods[PLAIN], "curve": options["curve"]})
    notes: list[str] = []
    target = build(EngineConfig(**methods[PLAIN]), notes.append)
    built: dict[EngineConfig, Engine] = {}
    llms = {name: LLM(_engine(EngineConfig(**each), target, built, notes.append)) for name, each in methods.items()}
    for llm in llms.values():
        llm.generate("Question:", SamplingParams(max_new_tokens=8, seed=0))  # pays for caches and what is compiled

    def answer(ask: Ask) -> Answer:
        return ours.generate(llms[ask.extra["method"]], ask)

    described = {"version": quantspec.__version__, "exactness": LLM(target).exactness, "notes": notes}
    return {**described, "describe": "all methods around one target, in one process"}, answer


def _engine(
    config: EngineConfig, target: Engine, built: dict[EngineConfig, Engine], notice: Callable[[str], None]
) -> Engine:
    """An engine around the target, with the drafter of one in ``built`` that differs in the nodes alone."""
    if config.method == PLAIN:
        return replace(target)
    shares = config.method in (*HEAD_METHODS, "cascade")  # others are made for a number of tokens
    drafter = replace(config, num_speculative_tokens=None) if shares else config
    if drafter not in built:
        assert target.tokenizer is not None, "a folder has one"
        built[drafter] = equip(drafter, target.model, target.tokenizer, notice)
        if built[drafter].config.method != config.method:
            raise ModelError(f"the drafter of method {config.method} does not fit into memory")
    return replace(built[drafter], config=config)


if __name__ == "__main__":
    serve(load)
