"""Errors as users see them: an exit code and one line, ``error: ... hint: ...``."""

from __future__ import annotations

import errno

import click

from quantspec.cli.signals import Terminated
from quantspec.errors import QuantSpecError

_NO_ROOM = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission denied",
    errno.EPERM: "not permitted",
}


def explain(error: BaseException) -> tuple[int, str]:
    """The exit code and the line for stderr."""
    code, message, hint = _explain(error)
    # A message may quote another library's, which may span lines.
    line = " ".join(f"error: {message}".split()).rstrip(".")
    return code, f"{line}. hint: {' '.join(hint.split())}" if hint else line


def _explain(error: BaseException) -> tuple[int, str, str | None]:
    if isinstance(error, QuantSpecError):
        return error.exit_code, str(error), error.hint
    if isinstance(error, click.ClickException):
        return 2, *_usage(error)
    if isinstance(error, Terminated):
        return 143, "terminated", None
    if isinstance(error, KeyboardInterrupt | click.Abort):
        return 130, "interrupted", None
    if _out_of_memory(error):
        return 4, "out of memory", "use a smaller model, a shorter context (--max-context) or fewer samples"
    if isinstance(error, OSError) and error.errno in _NO_ROOM:
        place = f": {error.filename}" if error.filename else ""
        return 4, _NO_ROOM[error.errno] + place, "choose another folder, or make room"
    if isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError):
        return 3, f"{error.strerror}: {error.filename}", None
    return 1, f"{type(error).__name__}: {error}", "this is a bug in quantspec; --debug shows where, please report it"


def _usage(error: click.ClickException) -> tuple[str, str | None]:
    message, context = error.format_message(), getattr(error, "ctx", None)
    if isinstance(error, click.NoSuchOption) and context is not None:
        known = [name for parameter in context.command.params for name in (*parameter.opts, *parameter.secondary_opts)]
        return f"no such option {error.option_name}", _nearest(error.option_name, known, context)
    if isinstance(error, click.exceptions.NoSuchCommand) and context is not None:
        known = context.command.list_commands(context)
        return f"no such command {error.command_name!r}", _nearest(error.command_name, known, context)
    return message[:1].lower() + message[1:], _see_help(context)


def _nearest(word: str, known: list[str], context: click.Context) -> str | None:
    from difflib import get_close_matches

    near = get_close_matches(word, known, n=1)
    return f"did you mean {near[0]}?" if near else _see_help(context)


def _see_help(context: click.Context | None) -> str | None:
    return f"see {context.command_path} --help" if context is not None else None


def _out_of_memory(error: BaseException) -> bool:
    # torch is not imported here: its CUDA error goes by name, and its CPU allocator raises a plain RuntimeError.
    by_name = type(error).__name__ == "OutOfMemoryError"
    return isinstance(error, MemoryError) or by_name or "can't allocate memory" in str(error)
