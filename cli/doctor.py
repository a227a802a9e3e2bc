"""``quantspec doctor``: what this machine and this environment can do, and why not what they cannot."""

from __future__ import annotations

import json
import platform
import shlex
import warnings
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import click

from quantspec import __version__
from quantspec.cli.machine import cores, cpu_flags, processor
from quantspec.cli.render import note, table
from quantspec.errors import QuantSpecError

REQUIRED = ("torch", "transformers", "safetensors", "tokenizers", "huggingface_hub", "numpy")
OPTIONAL = {
    "bitsandbytes": ("bitsandbytes", "pip install 'quantspec[bnb]'"),
    "accelerate": ("accelerate", "pip install 'quantspec[bnb]'"),
    "optimum": ("optimum", "pip install 'quantspec[interop]'"),
    "compressed-tensors": ("compressed_tensors", "pip install 'quantspec[interop]'"),
    "gguf": ("gguf", "pip install 'quantspec[interop]'"),
    "gptqmodel": ("gptqmodel", "the successor of auto-gptq; wants a newer torch, in an environment of its own"),
    "auto-gptq": ("auto_gptq", "archived; does not import under transformers 5"),
    "marlin-kernels": ("marlin_kernels", "cannot be built from its source package"),
    "triton": ("triton", "comes with torch for CUDA"),
}
"""Distribution: the module it installs, and what to know where it is missing."""


@click.command
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def doctor(as_json: bool) -> None:
    """Report versions, the processor, kernel backends and optional packages: usable, or the reason why not."""
    report = {
        "versions": _versions(),
        "machine": _machine(),
        "native kernels": _native(),
        "kernel backends": _backends(),
        "optional packages": {name: _state(name, module, remark) for name, (module, remark) in OPTIONAL.items()},
    }
    if as_json:
        click.echo(json.dumps(report))
        return
    for title, lines in report.items():
        table(title, ("", "state"), list(lines.items()), figures=False)


def _versions() -> dict[str, str]:
    return {
        "quantspec": __version__,
        "python": platform.python_version(),
        **{name: _version(name) for name in REQUIRED},
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "missing"


def _machine() -> dict[str, Any]:
    import torch

    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor(),
        "cores": cores(),
        "cpu flags": " ".join(cpu_flags()) or "none known",
        "torch cpu capability": torch.backends.cpu.get_cpu_capability()
        + (", AMX" if "amx_int8" in cpu_flags() else ""),
        "gpus": ", ".join(gpus) or "none",
    }


def _native() -> dict[str, str]:
    """How the CPU kernels are made here."""
    from quantspec.kernels.cpu import build, library

    try:
        compiler = shlex.join(build.find_compiler())
    except QuantSpecError as error:
        compiler = str(error)
    library.announce(note)
    reason = library.usable()
    return {
        "state": "usable" if reason is None else f"not usable: {reason}",
        "instruction set": build.cpu_level(),
        "compiler": compiler,
        "cache": library.notice() or str(build.default_cache()),
    }


def _backends() -> dict[str, str]:
    from quantspec.kernels import dispatch

    return dispatch.table()


def _state(name: str, module: str, remark: str) -> str:
    found = _version(name)
    if found == "missing":
        return f"not installed ({remark})"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import_module(module)
    except Exception as error:  # whatever a foreign package raises, the answer is that it cannot be used
        return f"{found}, not usable: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return f"{found}, usable"
