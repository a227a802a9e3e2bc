"""What all requests of one loaded model share, and how it gives way when memory runs out."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import torch

from quantspec.core.drafter import Drafter, NoDrafter
from quantspec.engine.alarm import Alarm
from quantspec.engine.config import HEAD_METHODS, EngineConfig
from quantspec.engine.controller import Lessons
from quantspec.engine.planner import Outlook
from quantspec.engine.stats import TimedVerifier
from quantspec.errors import ResourceError
from quantspec.types import Budget

if TYPE_CHECKING:
    from quantspec.engine.request import Request
    from quantspec.models.base import CausalModel
    from quantspec.models.tokenizer import Tokenizer

_CPU_MESSAGES = ("can't allocate memory", "not enough memory", "CUDA out of memory")
"""What torch says in a plain ``RuntimeError`` where no memory is left."""


def is_out_of_memory(error: BaseException) -> bool:
    """True if a computation failed for want of memory."""
    plain = isinstance(error, RuntimeError) and any(words in str(error) for words in _CPU_MESSAGES)
    return plain or isinstance(error, MemoryError | torch.OutOfMemoryError)


# OpenMP's threads do not live on in a forked child, and torch would wait for them for ever. One thread needs no others;
# native kernels make a pool of their own in a child.
os.register_at_fork(after_in_child=partial(torch.set_num_threads, 1))


@contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """torch on that many threads, and on as many as before afterwards (setting them takes less than a microsecond)."""
    before = torch.get_num_threads()
    if count is None or count == before:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(slots=True, kw_only=True)
class Engine:
    """A target, its drafter, and what a draft may cost. ``config`` has its method resolved; ``tell`` shows one line.

    ``torch_threads`` bounds torch during a step: native kernels have threads of their own, and would fight with
    torch's for the cores. None: as many as torch has. ``outlook`` is what a profile says of the drafter, if one chose
    it: then each step drafts as much as pays.
    """

    config: EngineConfig
    model: CausalModel
    tokenizer: Tokenizer | None
    verifier: TimedVerifier
    drafter: Drafter
    eos_ids: frozenset[int]
    weight_bytes: int
    tell: Callable[[str], None]
    torch_threads: int | None = None
    outlook: Outlook | None = None
    lessons: Lessons = field(init=False, default_factory=Lessons)
    budget: Budget = field(init=False)
    alarm: Alarm = field(init=False, default_factory=Alarm)
    judged: bool = field(init=False, default=False)
    """The alarm was raised: no more need be said of the drafter."""
    _told: set[str] = field(init=False, default_factory=set)

    def __post_init__(self) -> None:
        depth = self.config.tree_depth if self.config.method in HEAD_METHODS else self.config.max_nodes
        self.budget = Budget(self.config.max_nodes, depth)
        self._told.update(self.model.notes)  # by whoever loaded it

    @property
    def max_context(self) -> int:
        """Tokens of prompt and output together."""
        return min(self.model.max_positions, self.config.max_context or self.model.max_positions)

    def notice(self, line: str) -> None:
        """Show a line, once: a drafter that fails does so at every step."""
        if line not in self._told:
            self._told.add(line)
            self.tell(line)

    def step_down(self, error: BaseException, running: Iterable[Request]) -> None:
        """Make the next step smaller: half the draft, then no drafter, then a ``ResourceError``."""
        torch.cuda.empty_cache()
        nodes = self.budget.max_nodes // 2
        if not self.budget.max_nodes:
            raise ResourceError("out of memory", hint="lower max_context, max_batch or prefill_chunk") from error
        if nodes:
            self.notice(f"out of memory: going on with drafts of {nodes} tokens instead of {self.budget.max_nodes}")
        else:
            self.notice(f"out of memory: going on without the drafter {self.drafter.name}")
            for request in running:
                request.leave_drafter()
            self.drafter = NoDrafter()
        self.budget = Budget(nodes, min(nodes, self.budget.max_depth))
