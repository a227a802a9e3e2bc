"""Options of ``quantspec bench``. No torch here: the command line reads them for its help."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from quantspec.benchmarks.shapes import ModelShape
from quantspec.errors import UsageError

WIDTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
"""Rows of a forward: a plain step, and trees of up to 64 nodes."""
BACKENDS = ("cpu-int8", "cpu-fp32", "torch-fp32", "torch-bf16", "torch-int4")
CUDA_BACKENDS = ("cuda", "triton", "torch-bf16", "gptqmodel-marlin", "bnb-nf4")
MOST_CUDA_WIDTH = 64
"""Rows of the widest kernel."""
Device = Literal["cpu", "cuda"]


@dataclass(frozen=True)
class KernelBench:
    """What ``quantspec bench kernels`` measures."""

    shapes: tuple[tuple[int, int], ...] = ((4096, 4096), (4096, 14336))
    """Weights to multiply with, as input features x output features: KxN,KxN,..."""
    widths: tuple[int, ...] = WIDTHS
    """Rows n of one call; 1 is always among them, as v(n) = t(n) / t(1)."""
    group_size: int = 128
    """Weights in a row that share a scale."""
    backends: tuple[str, ...] = ()
    """Which to measure, of ``BACKENDS`` or ``CUDA_BACKENDS``; empty: all that run here."""
    device: Device = "cpu"
    """Where."""
    threads: int | None = None
    """CPU threads. Default: all cores."""
    rounds: int = 20
    """How often everything is measured; the least time counts."""
    seed: int = 0
    """Of the weights, and of the order within a round."""

    def __post_init__(self) -> None:
        for k, n in self.shapes:
            check_shape(k, n)
        check_widths(self.widths)
        known = CUDA_BACKENDS if self.device == "cuda" else BACKENDS
        unknown = [name for name in self.backends if name not in known]
        if unknown:
            hint = f"one of {', '.join(known)}"
            raise UsageError(f"unknown backend {unknown[0]!r} on {self.device}", hint=hint)
        check_group_size(self.group_size)
        check_counts(self.threads, self.rounds)
        check_device_options(self.device, self.threads, self.widths)


@dataclass(frozen=True)
class DecodeBench:
    """What ``quantspec bench decode`` measures."""

    model: str | None = None
    """A model folder, hub id or member of the default family."""
    shape: ModelShape | None = None
    """Instead of a model: random weights of this shape."""
    device: Device = "cpu"
    """Where."""
    kernels: Literal["cuda", "triton", "gptqmodel-marlin"] | None = None
    """On CUDA, those of the packed layers. Default: cuda where they run, else triton."""
    head_bits: int | None = None
    """On CUDA, bits of the LM head of quantized weights: 4, or 8, which is the default."""
    activations: Literal["int8", "fp32"] | None = None
    """What activations are rounded to before they meet quantized weights. Default: int8 where weights are."""
    group_size: int | None = None
    """Of random weights: those in a row that share a scale. Default: 128."""
    context: int = 512
    """Tokens in the cache."""
    tokens: int = 32
    """Tokens to decode."""
    widths: tuple[int, ...] = WIDTHS
    """Rows of one forward; 1 is always among them."""
    threads: int | None = None
    """CPU threads. Default: all cores."""
    rounds: int = 5
    """How often every width is measured; the least time counts."""
    seed: int = 0
    """Of random weights, of the tokens, and of the order within a round."""

    def __post_init__(self) -> None:
        if self.model is not None and self.shape is not None:
            raise UsageError("--model and --shape exclude each other", hint="a shape has random weights")
        if self.model is not None and self.group_size is not None:
            raise UsageError("--group-size is for random weights", hint="a model has groups of its own: leave it out")
        check_widths(self.widths)
        if self.context < 1 or self.tokens < 1:
            raise UsageError(f"context and tokens must be at least 1, not {self.context} and {self.tokens}")
        if self.group_size is not None:
            check_group_size(self.group_size)
        check_counts(self.threads, self.rounds)
        check_device_options(self.device, self.threads, self.widths)
        if self.device == "cuda" and self.activations is not None:
            raise UsageError("--activations is for the CPU", hint="on CUDA activations have 16 bits")
        if self.device == "cpu" and (self.kernels, self.head_bits) != (None, None):
            raise UsageError("--kernels and --head-bits are for CUDA", hint="add --device cuda, or use --activations")
        if self.head_bits not in (None, 4, 8):
            raise UsageError(f"an LM head has 4 or 8 bits, not {self.head_bits}")


@dataclass(frozen=True)
class FuzzBench:
    """What ``quantspec bench fuzz`` tries."""

    mutants: int = 20_000
    """How many damaged files."""
    first: int = 0
    """The number of the first one: a report's number N again is --first N --mutants 1."""
    processes: int = 2
    """Processes at a time."""
    seconds: float = 20.0
    """What one mutant may take before it counts as hanging."""
    seed: int = 0
    """Of all mutants."""

    def __post_init__(self) -> None:
        if self.mutants < 1 or self.first < 0 or not 1 <= self.processes <= 256:
            raise UsageError("mutants and processes must be at least 1 (processes at most 256), and first at least 0")
        if not 1 <= self.seconds <= 3600:
            raise UsageError(f"seconds must be from 1 to 3600, not {self.seconds}")


@dataclass(frozen=True)
class DraftersBench:
    """What ``quantspec bench drafters`` measures."""

    model: str = "default"
    """The target: a folder, hub id or member of the default family."""
    draft_model: str | None = None
    """A smaller model: a drafter itself, and the intermediate of cascades over heads of its width."""
    head: tuple[str, ...] = ()
    """A head of the target or of the draft model (may be repeated); its own config says of which kind it is."""
    drafters: tuple[str, ...] = ()
    """Which to measure; empty: all that are found."""
    prompts: Path | None = None
    """JSON lines with a question each. Default: 100 questions of GSM8K that no training of the family has seen."""
    limit: int = 80
    """How many of them, from the first on."""
    max_new_tokens: int = 96
    """Tokens to generate for each."""
    rounds: int = 2
    """How often greedy texts are generated; a prompt's least times count."""
    out: Path | None = None
    """Folder for a table as JSON, HTML and PNG, and the log by which a run that was stopped goes on."""
    device: str = "cpu"
    """cpu, cuda, cuda:1, ..."""
    threads: int | None = None
    """CPU threads. Default: all cores."""
    seed: int = 0
    """Of sampled texts, and of the order within a round."""

    def __post_init__(self) -> None:
        check_texts(self.limit, self.max_new_tokens)
        check_counts(self.threads, self.rounds)


def check_shape(k: int, n: int) -> None:
    if k < 1 or n < 1:
        raise UsageError(f"a shape needs at least one input and one output, not {k}x{n}")
    if k % 32:
        raise UsageError(f"K must be a multiple of 32, not {k} (shape {k}x{n})")


def check_group_size(size: int) -> None:
    if size < 32 or size % 32:
        raise UsageError(f"the group size must be a multiple of 32, not {size}")


def check_widths(widths: tuple[int, ...]) -> None:
    wrong = [n for n in widths if not 1 <= n <= 4096]
    if wrong or not widths:
        raise UsageError(f"widths are numbers of rows from 1 to 4096, not {wrong[0] if wrong else 'none'}")


def check_device_options(device: Device, threads: int | None, widths: tuple[int, ...]) -> None:
    if device == "cuda" and threads is not None:
        raise UsageError("--threads is for the CPU", hint="leave it out with --device cuda")
    if device == "cuda" and max(widths) > MOST_CUDA_WIDTH:
        raise UsageError(f"on CUDA, widths are at most {MOST_CUDA_WIDTH} rows, not {max(widths)}")


def check_texts(limit: int, max_new_tokens: int) -> None:
    if limit < 1 or max_new_tokens < 2:
        found = f"{limit} and {max_new_tokens}"
        raise UsageError(f"--limit must be at least 1 and --max-new-tokens at least 2, not {found}")


def check_counts(threads: int | None, rounds: int) -> None:
    if threads is not None and not 1 <= threads <= 1024:
        raise UsageError(f"threads must be from 1 to 1024, not {threads}")
    if rounds < 1:
        raise UsageError(f"rounds must be at least 1, not {rounds}")
