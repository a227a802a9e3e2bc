"""Ctrl-C while layers are quantized: the first one lets the layer in work finish, the second stops at once."""

from __future__ import annotations

import shlex
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields

from quantspec.calibrate.quantize.config import QuantizeConfig


@contextmanager
def deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Within the block, the first SIGINT only makes the yielded function return True."""
    asked = False

    def on_interrupt(signum: int, frame: object) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield lambda: asked
        return
    previous = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, previous)


def resume_command(config: QuantizeConfig) -> str:
    """The command line of a run: its folders, and the options that differ from their defaults."""
    words = ["quantspec", "quantize", str(config.model), "--out", str(config.out)]
    for option in fields(config)[2:]:
        value, flag = getattr(config, option.name), "--" + option.name.replace("_", "-")
        if value == option.default or option.name == "resume":
            continue
        if option.name == "symmetric":
            words.append("--asymmetric")
        elif option.name == "ignore":
            words += [word for pattern in value for word in (flag, pattern)]
        else:
            words += [flag, str(value)]
    return shlex.join(words)
