"""The entry point: lazy subcommands, and one place that owns exit codes, signals and broken pipes.

Exit codes: 0 ok, 1 a bug of ours, 2 usage, 3 bad model or data, 4 out of memory or disk, 5 verification failed, 130 and
143 interrupted. Click's own ``main`` differs (Ctrl-C gives 1, usage errors span lines) and is not used.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module

import click

from quantspec import __version__
from quantspec.cli.failures import explain
from quantspec.cli.invocation import Invocation
from quantspec.cli.signals import terminable

COMMANDS = {
    "quantize": "Quantize a model's weights to 4 bits.",
    "generate": "Generate text with a drafter, or without one.",
    "export": "Write a model for vLLM, SGLang, transformers, GPTQModel, AutoAWQ or llama.cpp.",
    "eval": "Measure a model on text and tasks, alone or against its parent.",
    "check": "Look for defects in a model, and print how to serve it.",
    "tune": "Measure what speculation gives on this machine, and choose how to decode.",
    "bench": "Measure the kernels, or a whole model, on this machine.",
    "train": "Train the default family, or a part of it.",
    "demo": "Quantize the default target, generate with and without drafters, compare.",
    "doctor": "Say what this machine can run, and why not the rest.",
}
"""Command ``name`` is the function ``name`` of ``quantspec.cli.name``."""


class LazyGroup(click.Group):
    """Subcommands are imported when they are asked for; the list of them, with help texts, needs no import."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        return with_debug(getattr(import_module(f"quantspec.cli.{cmd_name}"), cmd_name))

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


def debug_option() -> click.Option:
    def switch_on(ctx: click.Context, _: click.Parameter, value: bool) -> None:
        if value:
            ctx.find_object(Invocation).debug = True  # type: ignore[union-attr]

    return click.Option(
        ["--debug"], is_flag=True, expose_value=False, is_eager=True, callback=switch_on, help="Show tracebacks."
    )


def with_debug(command: click.Command) -> click.Command:
    """Let ``--debug`` stand behind any subcommand too."""
    if not any(parameter.name == "debug" for parameter in command.params):
        command.params.append(debug_option())
    if isinstance(command, click.Group):
        for name in command.list_commands(click.Context(command)):
            with_debug(command.commands[name])
    return command


cli = LazyGroup(
    "quantspec",
    help="Quantize a language model to 4 bits, then generate fast by speculation.",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
    params=[debug_option()],
    no_args_is_help=True,
)
cli = click.version_option(__version__, prog_name="quantspec")(cli)


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command line (default: this process's) and return its exit code. Raises nothing."""
    # Spinning OpenMP workers steal the cores from each other; libgomp reads this once, when torch loads it.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    invocation = Invocation(tuple(sys.argv[1:] if arguments is None else arguments))
    try:
        with terminable():
            _invoke(invocation)
            sys.stdout.flush()
        return 0
    except BrokenPipeError:
        # The reader has what it wanted. Python flushes stdout once more at exit, which must not fail either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except BaseException as error:
        if invocation.debug:
            import traceback

            traceback.print_exc()
        code, line = explain(error)
        click.echo(line, err=True)
        return code


def _invoke(invocation: Invocation) -> None:
    try:
        with cli.make_context("quantspec", list(invocation.arguments), obj=invocation) as context:
            cli.invoke(context)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
    except click.exceptions.Exit:
        pass  # --help and --version end this way


if __name__ == "__main__":
    sys.exit(run())
