"""How quantspec was called: what commands and the error printer may ask about it."""

from __future__ import annotations

import shlex
from dataclasses import dataclass


@dataclass
class Invocation:
    """One command line."""

    arguments: tuple[str, ...] = ()
    debug: bool = False

    @property
    def command(self) -> str:
        """The command line, ready to be pasted into a shell."""
        return shlex.join(("quantspec", *self.arguments))
