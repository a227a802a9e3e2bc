"""A whole model's decoding: tokens/s, where a step's time goes, what it reads, and the cost curve v(n) of its forward.

A step reads every packed weight once, and the keys and values of the context; embeddings are a row or so. Without VNNI
an 8-bit weight takes twice the instructions of a 4-bit one, so its multiply-adds count twice in the bound.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from math import inf
from statistics import median
from time import perf_counter
from typing import Any

import torch

from quantspec.benchmarks.config import DecodeBench
from quantspec.benchmarks.kernels import Machine, Measured, Notice, best, check_device, look_at_machine, set_threads
from quantspec.benchmarks.random_model import random_decoder
from quantspec.benchmarks.shapes import SHAPES
from quantspec.calibrate.cost.timing import alternate
from quantspec.engine.build import DEFAULT_TARGET
from quantspec.errors import UsageError
from quantspec.kernels.cpu import probes
from quantspec.kernels.cpu.build import cpu_level
from quantspec.kernels.cpu.forward import PARTS
from quantspec.kernels.cpu.packed import PackedLinear
from quantspec.models.cache import KVCache
from quantspec.models.cpu_decoder import CpuDecoder
from quantspec.models.load import load_model
from quantspec.models.resolve import resolve
from quantspec.types import Batch

_Q8 = 1  # enum Format of linear.h
_GROUP_SIZE = 128
"""Of random weights, where nothing else is asked for; and of the inner loop that bounds a model without groups."""


@dataclass
class Steps:
    """Forwards of one width, each with its seconds and those of its parts."""

    seconds: list[float] = field(default_factory=list)
    parts: list[list[float]] = field(default_factory=list)

    def parts_ms(self) -> dict[str, float]:
        """Of the fastest step; "other" is what happened outside the C call."""
        fastest = min(range(len(self.seconds)), key=self.seconds.__getitem__)
        parts = self.parts[fastest]
        named = dict(zip(PARTS, parts, strict=True)) | {"other": self.seconds[fastest] - sum(parts)}
        return {name: seconds * 1e3 for name, seconds in named.items()}


class Decoding:
    """A model with ``context`` tokens in its cache (random keys and values: their cost is that of any others)."""

    def __init__(self, model: CpuDecoder, context: int, more: int, widest: int, seed: int) -> None:
        self.model, self.context = model, context
        self.cache: KVCache = model.new_cache(context + more, widest)
        self.cache.kv.normal_(generator=torch.Generator().manual_seed(seed))
        self.cache.commit(range(context))
        self._random = random.Random(seed)

    def forward(self, tokens: Iterable[int], steps: Steps) -> int:
        """One forward of a chain of tokens; returns the token that is likeliest to follow."""
        parts = torch.zeros(len(PARTS), dtype=torch.float64)
        began = perf_counter()
        batch = Batch.chain(tuple(tokens), self.cache.length)
        token = int(self.model.forward(batch, [self.cache], seconds=parts).logits[-1].argmax())
        steps.seconds.append(perf_counter() - began)
        steps.parts.append(parts.tolist())
        return token

    def decode(self, count: int) -> tuple[Steps, float]:
        """Decode greedily, one token at a time: the steps, and the seconds of all of them."""
        steps, token = Steps(), self.token()
        self.forward([token], Steps())  # the first wakes threads and touches the cache
        began = perf_counter()
        for _ in range(count):
            token = self.forward([token], steps)
            self.cache.commit([0])
        spent = perf_counter() - began
        self.cache.truncate(self.context)
        return steps, spent

    def curve(self, widths: Iterable[int], rounds: int, seed: int) -> dict[int, Steps]:
        """Forwards of every width, alternated; nothing is committed."""
        found: dict[int, Steps] = {n: Steps() for n in widths}

        def call(n: int) -> Callable[[], object]:
            tokens = [self.token() for _ in range(n)]
            return lambda: self.forward(tokens, found[n])

        alternate({n: call(n) for n in found}, rounds, seed, share=inf)
        return found

    def token(self) -> int:
        return self._random.randrange(self.model.vocab_size)


@dataclass(frozen=True)
class Work:
    """What a one-row step has to do: ``weight_bytes`` by part, ``kv_bytes`` of the context, ``macs`` of the weights."""

    weight_bytes: dict[str, int]
    kv_bytes: int
    macs: int

    @classmethod
    def of(cls, model: CpuDecoder, context: int, level: str) -> Work:
        """``level``: of the processor, see ``build.LEVELS``."""
        layers, head = model._layers, model._head
        linears = {
            "qkv": [layer.qkv for layer in layers],
            "o": [layer.o for layer in layers],
            "mlp": [one for layer in layers for one in (layer.gate_up, layer.down)],
            "head": [head],
        }
        cache = model.new_cache(1, 0).kv
        per_token = cache.shape[0] * cache.shape[1] * cache.shape[3] * cache.element_size()
        return cls(
            {part: sum(one.nbytes for one in each) for part, each in linears.items()},
            per_token * context,
            sum(_macs(one, level) for each in linears.values() for one in each),
        )

    @property
    def nbytes(self) -> int:
        return sum(self.weight_bytes.values()) + self.kv_bytes


def _macs(linear: PackedLinear, level: str) -> int:
    rows, cols = linear.shape
    return rows * cols * (2 if linear.struct.format == _Q8 and level != "avx512vnni" else 1)


def run(config: DecodeBench, notice: Notice = lambda line: None) -> dict[str, Any]:
    """Measure; returns what ``--json`` prints.

    Raises ``UsageError`` for a model that the native kernels do not run or a context it has no positions for,
    ``ResourceError`` for a shape that does not fit into memory, ``Unavailable`` without a compiler.
    """
    check_device(config.device)
    if config.model is not None:
        resolve(config.model)  # a name that leads nowhere is said at once
    if config.device == "cuda":
        from quantspec.benchmarks import cuda_decode

        return cuda_decode.run(config, notice)
    threads, widths = config.threads or probes.cores(), sorted({1, *config.widths})
    set_threads(threads, threads)
    notice(f"measuring what {threads} threads of this machine can do")
    machine = look_at_machine(threads, config.group_size or _GROUP_SIZE)
    notice(f"preparing {config.model or 'a model of random weights'}")
    model = _model(config)
    _check_length(model, config.context + max(config.tokens, *widths))
    set_threads(threads, 1)  # idle threads of torch would take the cores from the native ones
    notice("decoding")
    decoding = Decoding(model, config.context, config.tokens, max(widths), config.seed)
    steps, spent = decoding.decode(config.tokens)
    curve = decoding.curve(widths, config.rounds, config.seed)
    machine = best(machine, look_at_machine(threads, config.group_size or _GROUP_SIZE))
    work = Work.of(model, config.context, cpu_level())
    return {**machine.json(), **_report(config, threads, machine, work, steps, spent, curve, model)}


def _model(config: DecodeBench) -> CpuDecoder:
    if config.model is None:
        integer = config.activations != "fp32"
        group_size = config.group_size or _GROUP_SIZE
        return random_decoder(config.shape or SHAPES["1b"], group_size, integer=integer, seed=config.seed)
    # "default" is what it is wherever text is generated: the quantized target.
    name = DEFAULT_TARGET if config.model == "default" else config.model
    model = load_model(name, activations=config.activations)
    if not isinstance(model, CpuDecoder):
        raise UsageError(f"{config.model} does not run on the native kernels but by {model.backend}")
    return model


def _check_length(model: CpuDecoder, length: int) -> None:
    if length > model.max_positions:
        raise UsageError(
            f"{length} tokens are more than the model's {model.max_positions} positions", hint="lower --context"
        )


def _group_size(config: DecodeBench, model: CpuDecoder) -> int | None:
    """Of the weights that run: None if no weight is quantized, -1 for one scale per output channel."""
    if config.model is None:
        return config.group_size or _GROUP_SIZE
    quantized = model.config.quantization
    return quantized.scheme.group_size if quantized else None


def _report(
    config: DecodeBench, threads: int, machine: Machine, work: Work, steps: Steps, spent: float,
    curve: dict[int, Steps], model: CpuDecoder,
) -> dict[str, Any]:  # fmt: skip
    backend, mode = model.backend, model.backend.removeprefix("cpu-")
    times = {n: found.seconds for n, found in curve.items()}
    measured = Measured(backend, mode, None, _group_size(config, model), work.nbytes, work.macs, times)
    seconds, bound = min(steps.seconds), machine.bound(work.nbytes, work.macs, mode)
    return {
        "model": config.model,
        "shape": None if config.model else vars(config.shape or SHAPES["1b"]),
        "backend": backend,
        "mode": mode,
        "threads": threads,
        "context": config.context,
        "tokens": config.tokens,
        "rounds": config.rounds,
        "tokens_per_second": config.tokens / spent,
        "ms_per_step": seconds * 1e3,
        "ms_per_step_median": median(steps.seconds) * 1e3,
        "parts_ms": steps.parts_ms(),
        "part_bytes": {**work.weight_bytes, "attention": work.kv_bytes},
        "bytes_per_step": work.nbytes,
        "gbps": work.nbytes / seconds / 1e9,
        "bandwidth_fraction": work.nbytes / seconds / machine.bandwidth,
        "bound_ms": bound * 1e3,
        "rows": [{**row, "parts_ms": curve[row["n"]].parts_ms()} for row in measured.rows(machine)],
    }
