"""Ctrl-C and SIGTERM: commands that can stop cleanly ask ``Stop``; elsewhere both end the process at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Self

from quantspec.errors import Interrupted


class Terminated(BaseException):
    """SIGTERM, as ``KeyboardInterrupt`` is SIGINT."""


@contextmanager
def terminable() -> Iterator[None]:
    """Turn SIGTERM into ``Terminated``, so that ``finally`` blocks run and temporary files go."""

    def terminate(signum: int, frame: FrameType | None) -> None:
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return
    previous = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextmanager
def resumable(command: str) -> Iterator[None]:
    """However the block is interrupted, say that ``command``, given again, goes on from what is finished."""
    try:
        yield
    except (Interrupted, KeyboardInterrupt, Terminated) as error:
        stopped = Interrupted("interrupted; what is finished is kept", hint=f"go on with: {command}")
        if isinstance(error, Terminated):
            stopped.exit_code = 143
        raise stopped from error


class Stop:
    """Asks running work to stop where it is safe.

    The first signal makes ``stop()`` true and calls ``then``; a second one ends the work at once. ``code`` is the exit
    code that the signal asks for.
    """

    def __init__(self, message: str, then: Callable[[], None] | None = None) -> None:
        self._message, self._then = message, then
        self.code = 0

    def __call__(self) -> bool:
        return self.code != 0

    def __enter__(self) -> Self:
        self._previous = {}
        if threading.current_thread() is threading.main_thread():
            self._previous = {which: signal.signal(which, self._on) for which in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception: object) -> None:
        for which, handler in self._previous.items():
            signal.signal(which, handler)

    def _on(self, signum: int, frame: FrameType | None) -> None:
        if self.code:
            raise KeyboardInterrupt if signum == signal.SIGINT else Terminated
        self.code = 128 + signum
        # Not print: a handler may run inside a write to the same buffered stream.
        os.write(2, f"\n{self._message}\n".encode())
        if self._then is not None:
            self._then()
