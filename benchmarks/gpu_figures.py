"""Parts of ``benchmarks.gpu`` that measure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import torch

from quantspec.benchmarks import cuda_kernels, cuda_timing
from quantspec.benchmarks.config import DecodeBench, KernelBench
from quantspec.benchmarks.cuda_timing import current_device
from quantspec.benchmarks.gpu_found import Found, say
from quantspec.benchmarks.shapes import SHAPES
from quantspec.errors import Unavailable

if TYPE_CHECKING:
    from quantspec.models.load_triton import Kernels

PRODUCTS = {
    "70b gate_up": (8192, 57344, 4),
    "8b gate_up": (4096, 28672, 4),
    "8b o": (4096, 4096, 4),
    "8b head": (4096, 128256, 8),
    "8b down": (14336, 4096, 4),
    "8b qkv": (4096, 6144, 4),
    "70b down": (28672, 8192, 4),
}
"""``(K, N, bits)`` of matrices of Llama 3.1, in the order in which they are measured."""
WIDTHS = (1, 2, 4, 8, 16, 32, 48, 64)


def kernels(found: Found) -> None:
    """``bench kernels`` over matrices of Llama 3.1."""
    machine = cuda_kernels.look_at_device(current_device())
    rows = []
    for name, (k, n_out, bits) in PRODUCTS.items():
        config = KernelBench(shapes=((k, n_out),), widths=WIDTHS, device="cuda", rounds=9)
        report = cuda_kernels.run(config, say, bits=bits, machine=machine)
        rows += [{"matrix": name, "dtype": "bfloat16", **row} for row in report["rows"]]
        found.put(**machine.json(), left_out=report["left_out"], rows=rows)
    k, n_out, bits = PRODUCTS["70b gate_up"]
    config = KernelBench(shapes=((k, n_out),), widths=WIDTHS, device="cuda", rounds=9, backends=("cuda", "triton"))
    report = cuda_kernels.run(config, say, bits=bits, dtype=torch.float16, machine=machine)
    rows += [{"matrix": "70b gate_up", "dtype": "float16", **row} for row in report["rows"]]
    found.put(rows=rows)


def decode(shape: str, kernels: Kernels | None = None, head_bits: int | None = None) -> Callable[[Found], None]:
    """``bench decode`` with random weights of a shape."""

    def measure(found: Found) -> None:
        from quantspec.benchmarks import cuda_decode

        config = DecodeBench(
            shape=SHAPES[shape], device="cuda", kernels=kernels, head_bits=head_bits, tokens=200, widths=WIDTHS
        )
        found.put(**cuda_decode.run(config, say))

    return measure


def paper(shape: str, precisions: tuple[str, ...]) -> Callable[[Found], None]:
    """``bench paper`` on shape-scaled models, written beside the report's scratch files and gone afterwards."""

    def measure(found: Found) -> None:
        from quantspec.benchmarks import paper_page
        from quantspec.benchmarks.paper import run
        from quantspec.benchmarks.paper_config import PaperBench

        with TemporaryDirectory(prefix="quantspec-paper-") as scratch:
            config = PaperBench(
                Path(scratch), shape, precisions=precisions, limit=4, max_new_tokens=128, rounds=3, device="cuda"
            )
            table: dict[str, list[str]] = {}
            for name in precisions:  # one by one, so that what is there stays where a later one does not end
                (one,) = run(replace(config, precisions=(name,)), say)
                table[name] = paper_page.cells(one)
                found.put(columns=paper_page.COLUMNS, table=table, **{name: one.as_dict()})

    return measure


def launch(found: Found) -> None:
    """Programmatic dependent launch, on and off: chains of one product, and a whole step of the 8B shape."""
    from quantspec.benchmarks.cuda_contenders import CudaField
    from quantspec.benchmarks.cuda_decode import CudaDecoding
    from quantspec.benchmarks.cuda_model import random_cuda_decoder
    from quantspec.kernels.cuda import library

    ready = library.load(current_device().index)
    if not ready.programmatic:
        raise Unavailable("this device has no programmatic dependent launch")
    graphs: dict[tuple[str, bool], Callable[[], object]] = {}
    nbytes, count = {}, {}
    fields = {name: CudaField((k, n), 128, current_device()) for name, (k, n, bits) in PRODUCTS.items() if bits == 4}
    chains = {name: field.contender("cuda") for name, field in fields.items()}
    decoding = CudaDecoding(random_cuda_decoder(SHAPES["8b"], 128, "cuda", current_device(), seed=0), 512, 1, 8, 0)
    for on in (True, False):
        ready.programmatic = on
        for name, chain in chains.items():
            nbytes[name], count[name] = chain.nbytes, len(chain.layers)
            for n in (1, 16):
                x = torch.randn(n, fields[name].shape[0], device=current_device(), dtype=torch.bfloat16)
                graphs[f"{name}, n = {n}", on] = cuda_timing.graph([partial(layer, x) for layer in chain.layers])
        graphs["8b step", on] = decoding.graphs(8)["graph"]
    ready.programmatic = True
    times = {key: median(each) for key, each in cuda_timing.alternate(graphs, rounds=9).items()}
    read = cuda_kernels.look_at_device(current_device()).bandwidth
    for (what, on), seconds in times.items():
        name = what.partition(",")[0]
        each = seconds / count.get(name, 1)
        fraction = {"of_read": nbytes[name] / each / read} if name in nbytes else {}
        found.result.setdefault(what, {})["on" if on else "off"] = {"us": each * 1e6, **fraction}
    found.put()
