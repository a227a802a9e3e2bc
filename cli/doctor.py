"""``quantspec doctor``: what this machine and this environment can do, and why not what they cannot."""

from __future__ import annotations

import json
import platform
import warnings
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import click

from quantspec import __version__
from quantspec.cli.machine import cores, cpu_flags, processor
from quantspec.cli.render import table

REQUIRED = ("torch", "transformers", "safetensors", "tokenizers", "huggingface_hub", "numpy")
OPTIONAL = {
    "bitsandbytes": ("bitsandbytes", "NF4 models; pip install 'quantspec[bnb]'"),
    "accelerate": ("accelerate", "wanted by bitsandbytes; pip install 'quantspec[bnb]'"),
    "compressed-tensors": ("compressed_tensors", "cross-check of our own format; pip install 'quantspec[interop]'"),
    "optimum": ("optimum", "GPTQ checkpoints through transformers; pip install 'quantspec[interop]'"),
    "gguf": ("gguf", "GGUF files; pip install 'quantspec[interop]'"),
    "gptqmodel": ("gptqmodel", "GPTQ kernels through optimum; install it yourself, it wants a newer torch"),
    "auto-gptq": ("auto_gptq", "archived; quantspec reads its checkpoint format without it"),
    "marlin-kernels": ("marlin_kernels", "does not build from source; quantspec brings kernels of its own"),
    "triton": ("triton", "portable GPU kernels; comes with torch for CUDA"),
}


@click.command
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def doctor(as_json: bool) -> None:
    """Report versions, the processor, kernel backends and optional packages: usable, or the reason why not."""
    report = {"versions": _versions(), "machine": _machine(), "backends": _backends(), "packages": _packages()}
    if as_json:
        click.echo(json.dumps(report))
        return
    table("versions", ("package", "version"), report["versions"].items())
    table("machine", ("", "value"), ((key, value) for key, value in report["machine"].items()))
    for title, key in (("kernel backends", "backends"), ("optional packages", "packages")):
        table(title, ("name", "state"), ((name, state) for name, state in report[key].items()))


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
        "torch cpu capability": torch.backends.cpu.get_cpu_capability(),
        "gpus": ", ".join(gpus) or "none",
    }


def _backends() -> dict[str, str]:
    from quantspec.kernels import dispatch

    return dispatch.table()


def _packages() -> dict[str, str]:
    return {name: _state(name, module, purpose) for name, (module, purpose) in OPTIONAL.items()}


def _state(name: str, module: str, purpose: str) -> str:
    found = _version(name)
    if found == "missing":
        return f"not installed ({purpose})"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import_module(module)
    except Exception as error:  # whatever a foreign package raises, the answer is that it cannot be used
        return f"{found}, not usable: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return f"{found}, usable"
