"""``--help`` must be instant: no subcommand's help imports torch, numpy, rich or transformers."""

from __future__ import annotations

import json
import os
import subprocess
import sys

HEAVY = ("torch", "numpy", "rich", "transformers", "tokenizers", "safetensors", "jinja2", "huggingface_hub")

# One process walks all commands: a start of Python for each would cost more than the rest of this file's tests.
WALK = f"""
import contextlib, io, json, sys
import click
from quantspec.cli.main import cli, run

def walk(group, path):
    yield path
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if isinstance(command, click.Group):
            yield from walk(command, [*path, name])
        else:
            yield [*path, name]

report = {{}}
for path in list(walk(cli, [])):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = run([*path, "--help"])
    heavy = [name for name in {HEAVY!r} if name in sys.modules]
    report[" ".join(path)] = [code, out.getvalue().startswith("Usage:"), heavy]
print(json.dumps(report))
"""


def python(source: str) -> str:
    env = {**os.environ, "PYTHONSAFEPATH": "1"}
    return subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True, env=env).stdout


def test_no_help_imports_a_heavy_package() -> None:
    report = json.loads(python(WALK))
    assert {"", "quantize", "generate", "demo", "doctor", "train lm"} <= report.keys()
    assert {path: found for path, found in report.items() if found != [0, True, []]} == {}


def test_importing_the_package_is_light() -> None:
    source = f"import sys, quantspec, quantspec.errors; print([name for name in {HEAVY!r} if name in sys.modules])"
    assert python(source).strip() == "[]"
