"""A forward's launches as one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

import torch

from quantspec.models.base import Output

NO_MEMORY = "no memory to capture CUDA graphs: kernels are launched one by one, which is slower"


T = TypeVar("T")


class Replay(Protocol):
    def __call__(self) -> Output:
        """Run again on what the inputs hold now. The next replay writes over the result."""


class Graphs:
    """Captures forwards and drafts on one device, while it is ``usable``."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.usable = device.type == "cuda" and torch.cuda.is_available()
        # Results are copied before another graph runs: all of them can use the same memory in turn.
        self._pool = torch.cuda.graph_pool_handle() if self.usable else None

    def capture(self, run: Callable[[], T]) -> Callable[[], T] | None:
        """``run`` must have run before (its kernels are compiled then) and not wait for the device. None: there is no
        memory, and there are no graphs from now on."""
        try:
            return self._capture(run)
        except RuntimeError as error:
            if not _out_of_memory(error):
                raise
        self.usable = False
        return None

    def _capture(self, run: Callable[[], T]) -> Callable[[], T]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device), torch.cuda.graph(graph, pool=self._pool):
            output = run()

        def replay() -> T:
            graph.replay()
            return output

        return replay


def _out_of_memory(error: BaseException | None) -> bool:
    """The end of a capture that was broken off raises an error of its own, on top of the one that broke it off."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error):
            return True
        error = error.__context__
    return False
