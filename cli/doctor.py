"""``quantspec doctor``: what this machine and this environment can do, and why not what they cannot."""

from __future__ import annotations

import json
import platform
import shlex
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from io import StringIO
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
    "lm_eval": ("lm_eval", "pip install 'quantspec[lm-eval]'"),
    "gptqmodel": ("gptqmodel", "for the backend gptqmodel-marlin; wants a newer torch, in an environment of its own"),
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
        "CUDA kernels": _cuda(),
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

    gpus = [_gpu(torch.cuda.get_device_properties(index)) for index in range(torch.cuda.device_count())]
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor(),
        "cores": cores(),
        "cpu flags": " ".join(cpu_flags()) or "none known",
        "torch cpu capability": torch.backends.cpu.get_cpu_capability()
        + (", AMX" if "amx_int8" in cpu_flags() else ""),
        "gpus": ", ".join(gpus) or "none",
        "torch's CUDA": torch.version.cuda or "none: this torch is built for CPUs",
    }


def _gpu(device: Any) -> str:
    return f"{device.name} (compute capability {device.major}.{device.minor}, {device.total_memory / 2**30:.0f} GiB)"


def _native() -> dict[str, str]:
    """How the CPU kernels are made here."""
    from quantspec.kernels.cpu import build, library

    library.announce(note)
    return {
        "state": _usable(library.usable()),
        "instruction set": build.cpu_level(),
        "compiler": _command(build.find_compiler),
        "cache": library.notice() or str(build.default_cache()),
    }


def _cuda() -> dict[str, str]:
    """How the GPU's kernels are made here. What they compute is checked as a model is loaded."""
    from quantspec.kernels.build_cache import default_cache
    from quantspec.kernels.cuda import build, library

    library.announce(note)
    return {
        "state": _usable(library.usable()),
        "compiler": _command(build.find_compiler),
        "cache": str(default_cache()),
    }


def _usable(reason: str | None) -> str:
    return "usable" if reason is None else f"not usable: {reason}"


def _command(find: Callable[[], list[str]]) -> str:
    try:
        return shlex.join(find())
    except QuantSpecError as error:
        return str(error)


def _backends() -> dict[str, str]:
    from quantspec.kernels import dispatch

    return dispatch.table()


def _state(name: str, module: str, remark: str) -> str:
    found = _version(name)
    if found == "missing":
        return f"not installed ({remark})"
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()):  # gptqmodel prints a banner
            warnings.simplefilter("ignore")
            import_module(module)
    except Exception as error:  # whatever a foreign package raises, the answer is that it cannot be used
        return f"{found}, not usable: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return f"{found}, usable"
