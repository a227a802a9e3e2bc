"""``quantspec doctor``: what this machine and this environment can do, and why not what they cannot."""

from __future__ import annotations

import json
import platform
import shlex
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from io import StringIO
from typing import Any

import click

from quantspec import __version__
from quantspec.cli.render import note, table
from quantspec.errors import QuantSpecError
from quantspec.kernels.machine import cores, cpu_flags, processor

REQUIRED = ("torch", "transformers", "safetensors", "tokenizers", "huggingface_hub", "numpy")


@dataclass(frozen=True)
class Package:
    """A package that something here uses where it is installed."""

    module: str
    purpose: str
    """What it is for, and how to get it."""
    instead: str = ""
    """Why it does not serve, and what does."""
    oldest: tuple[int, ...] = ()
    """Versions before this one do not serve."""
    needs: str = ""
    """Another package without which it does not serve."""


OPTIONAL = {
    "bitsandbytes": Package("bitsandbytes", "NF4: pip install 'quantspec[bnb]'", oldest=(0, 48)),
    "accelerate": Package("accelerate", "goes with the others: pip install 'quantspec[bnb]'", oldest=(1, 10)),
    "gptqmodel": Package(
        "gptqmodel",
        "quantize --backend gptqmodel, and the backend gptqmodel-marlin: wants a newer torch, so install it in an "
        "environment of its own; files of its making load without it",
        oldest=(7, 0),
    ),
    "optimum": Package(
        "optimum",
        "GPTQ files in transformers, with gptqmodel: pip install 'quantspec[interop]'; quantspec reads them itself",
        "without gptqmodel its GPTQ quantizer fails (NameError); quantspec reads GPTQ files itself",
        oldest=(2, 0),
        needs="gptqmodel",
    ),
    "auto-gptq": Package(
        "auto_gptq",
        "",
        "archived: its last release, 0.7.1, does not import under transformers 5; quantspec reads and writes its "
        "files, and gptqmodel is its successor",
    ),
    "marlin-kernels": Package(
        "marlin_kernels",
        "",
        "its source package lacks a file that its build reads (envs.py), and there are no wheels; the backend cuda has "
        "kernels of that layout, and gptqmodel brings Marlin's own",
    ),
    "compressed-tensors": Package(
        "compressed_tensors",
        "quantspec's folders in transformers: pip install 'quantspec[interop]'; quantspec reads them itself",
        oldest=(0, 15),
    ),
    "gguf": Package("gguf", "checks GGUF files in tests: pip install 'quantspec[interop]'; quantspec needs none"),
    "lm_eval": Package("lm_eval", "eval --tasks: pip install 'quantspec[lm-eval]'"),
    "triton": Package("triton", "the backend triton: comes with torch for CUDA"),
}
"""By distribution."""


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
        "optional packages": {name: _state(name, package) for name, package in OPTIONAL.items()},
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

    from quantspec.kernels.memory import available_bytes

    free = available_bytes()
    gpus = [_gpu(torch.cuda.get_device_properties(index)) for index in range(torch.cuda.device_count())]
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor(),
        "cores": cores(),
        "cpu flags": " ".join(cpu_flags()) or "none known",
        "torch cpu capability": torch.backends.cpu.get_cpu_capability()
        + (", AMX" if "amx_int8" in cpu_flags() else ""),
        "free memory": "unknown" if free is None else f"{free / 2**30:.1f} GiB",
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


def _state(name: str, package: Package) -> str:
    from quantspec.kernels.packages import lacking

    found = _version(name)
    if found == "missing":
        return f"not installed ({package.purpose or package.instead})"
    instead = f" ({package.instead})" if package.instead else ""
    if package.oldest and (reason := lacking(name, package.oldest)):
        return f"{found}, not usable: {reason}"
    if package.needs and _version(package.needs) == "missing":
        return f"{found}, not usable: {package.needs} is not installed{instead}"
    try:
        # gptqmodel prints a banner, and others grumble.
        with warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            import_module(package.module)
    except Exception as error:  # whatever a foreign package raises, the answer is that it cannot be used
        said = (str(error) or "no reason given").splitlines()[0]
        return f"{found}, not usable: {type(error).__name__}: {said}{instead}"
    return f"{found}, usable"
