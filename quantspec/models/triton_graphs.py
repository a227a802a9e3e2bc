"""A forward's launches as one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Protocol, TypeVar

import torch

from quantspec.models.base import Output

NO_MEMORY = "no memory to capture CUDA graphs: kernels are launched one by one, which is slower"
NO_GRAPHS = "CUDA graphs cannot be captured here, so kernels are launched one by one, which is slower"

T = TypeVar("T")


class Replay(Protocol):
    def __call__(self) -> Output:
        """Run again on what the inputs hold now. The next replay writes over the result."""


def current(device: torch.device) -> AbstractContextManager[object]:
    """Makes a device the current one, on which Triton launches, wherever the tensors are."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


class Graphs:
    """Captures forwards and drafts on one device, while it is ``usable``; ``failure`` says why it no longer is."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.usable = device.type == "cuda" and torch.cuda.is_available()
        # Results are copied before another graph runs: all of them can use the same memory in turn.
        self._pool = torch.cuda.graph_pool_handle() if self.usable else None
        self._stream = torch.cuda.Stream(device) if self.usable else None
        self.failure = ""

    def capture(self, run: Callable[[], T]) -> Callable[[], T] | None:
        """``run`` must have run before (its kernels are compiled then) and not wait for the device. None: there is no
        memory, or something in it cannot be captured, and there are no graphs from now on."""
        try:
            return self._capture(run)
        except RuntimeError as error:
            if _says(error, "out of memory"):
                self.failure = NO_MEMORY
            elif _says(error, "captur"):  # so do CUDA's errors of captures, and no others
                self.failure = NO_GRAPHS
            else:
                raise
            # Broken off, a capture stays open in torch's allocator, which would refuse to give memory back ever after.
            with suppress(RuntimeError, AttributeError):
                torch._C._cuda_endAllocateToPool(self.device.index, self._pool)  # type: ignore[arg-type]
        self.usable = False
        return None

    def _capture(self, run: Callable[[], T]) -> Callable[[], T]:
        graph = torch.cuda.CUDAGraph()
        with (
            current(self.device),
            # A capture that was broken off leaves its stream the current one.
            torch.cuda.stream(torch.cuda.current_stream(self.device)),
            # The first capture makes the state of torch's generator. Others write to it, which they could not outside
            # of inference mode if it had been made there.
            torch.inference_mode(False),
            torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"),
            torch.inference_mode(),
        ):
            output = run()

        def replay() -> T:
            graph.replay()
            return output

        return replay


def _says(error: BaseException | None, words: str) -> bool:
    """The end of a capture that was broken off raises an error of its own, on top of the one that broke it off."""
    while error is not None:
        if words in str(error) or (words == "out of memory" and isinstance(error, torch.OutOfMemoryError)):
            return True
        error = error.__context__
    return False
