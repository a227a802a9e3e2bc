"""``bench decode --device cuda``: a whole model on Triton's decoder, with the packed layers of either kind of kernels.

A step's time is the host's, from its tokens to the next token. What the device does of it is a replay of the forward's
graph; its parts are graphs of their own, each of which goes through the part in all layers, so that no weight is in the
second-level cache. Whatever is left of the step ("other") is the draw, the host's work and the gaps between launches.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from math import inf
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from quantspec.benchmarks import cuda_timing
from quantspec.benchmarks.config import DecodeBench
from quantspec.benchmarks.cuda_kernels import Accelerator, look_at_device
from quantspec.benchmarks.cuda_model import BITS, HEAD_BITS, matrices, part_bytes, random_cuda_decoder, rows_like
from quantspec.benchmarks.kernels import Measured, Notice
from quantspec.benchmarks.shapes import SHAPES
from quantspec.calibrate.cost.timing import alternate
from quantspec.engine.build import DEFAULT_TARGET
from quantspec.errors import Unavailable, UsageError
from quantspec.kernels.draws import Drawn, Layout
from quantspec.kernels.triton.norm import rms_norm
from quantspec.kernels.triton.swiglu import swiglu
from quantspec.models.base import NO_DRAW, Drawing
from quantspec.models.load import load_model
from quantspec.models.load_triton import Kernels
from quantspec.models.triton_decoder import TritonDecoder
from quantspec.models.triton_frame import Frame, tile_for
from quantspec.types import Batch

_GROUP_SIZE = 128
_GREEDY = Drawing([NO_DRAW], Layout())
WARM_UP = 3
"""Forwards: kernels are compiled by the first of a width, its graph is captured by the second."""
Call = Callable[[], object]


class CudaDecoding:
    """A model with ``context`` tokens in its cache: random keys and values, whose cost is that of any others."""

    def __init__(self, model: TritonDecoder, context: int, more: int, widest: int, seed: int) -> None:
        self.model, self.context = model, context
        self.cache = model.new_cache(context + more, widest)
        self.cache.storage.kv.normal_()
        self.cache.commit(range(context))
        self._random = random.Random(seed)

    def forward(self, tokens: Iterable[int]) -> int:
        """One forward of a chain of tokens; returns the token that is likeliest to follow."""
        batch = Batch.chain(tuple(tokens), self.cache.length)
        table = self.model.draw(batch, [self.cache], (), _GREEDY).draws
        assert table is not None
        return int(Drawn.read(table[-1:].cpu().numpy(), _GREEDY.layout).ids[0, 0])

    def decode(self, count: int) -> tuple[list[float], float]:
        """Decode greedily, one token at a time: seconds of each step, and of all of them."""
        token, steps = self._token(), []
        for _ in range(WARM_UP):
            self.forward([token])
        began = perf_counter()
        for _ in range(count):
            started = perf_counter()
            token = self.forward([token])
            self.cache.commit([0])
            steps.append(perf_counter() - started)
        spent = perf_counter() - began
        self.cache.truncate(self.context)
        return steps, spent

    def curve(self, widths: Iterable[int], rounds: int, seed: int) -> dict[int, list[float]]:
        """Seconds of forwards of every width, alternated; nothing is committed."""

        def call(n: int) -> Call:
            tokens = [self._token() for _ in range(n)]
            for _ in range(WARM_UP):
                self.forward(tokens)
            return lambda: self.forward(tokens)

        return alternate({n: call(n) for n in widths}, rounds, seed, share=inf)

    @torch.inference_mode()
    def graphs(self, rows: int) -> dict[str, Call]:
        """Replays of a forward of so many rows (a tile) and of its parts."""
        model, storage = self.model, self.cache.storage
        frame = storage.frame(rows)
        frame.fill([self._token() for _ in range(rows)], [range(-1, rows - 1)], [self.context])
        calls: dict[str, list[Call]] = {"graph": [lambda: model._run(frame, [storage], (), _GREEDY.layout)]}
        calls |= parts(model, frame, self)
        return {name: cuda_timing.graph(each) for name, each in calls.items()}

    def _token(self) -> int:
        return self._random.randrange(self.model.vocab_size)


def parts(model: TritonDecoder, frame: Frame, decoding: CudaDecoding) -> dict[str, list[Call]]:
    """The calls of all layers, by part, on random rows: a norm counts to what it feeds."""
    config, layers, storages = model.config, model._layers, [decoding.cache.storage]
    x, eps = F.embedding(frame.tokens, model._embedding), config.rms_norm_eps
    heads = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    qkv, mixed = rows_like(x, heads), rows_like(x, config.num_heads * config.head_dim)

    def fed(norm: Tensor, product: Callable[[Tensor], object]) -> Call:
        return lambda: product(rms_norm(x, norm, eps, x)[0])

    return {
        "embedding": [lambda: F.embedding(frame.tokens, model._embedding)],
        "qkv": [fed(layer.input_norm, layer.qkv) for layer in layers],
        "attention": [
            lambda i=i, layer=layer: model._attend(i, layer, qkv, frame, storages)  # type: ignore[misc]
            for i, layer in enumerate(layers)
        ],
        "o": [lambda layer=layer: layer.o(mixed) for layer in layers],  # type: ignore[misc]
        "mlp": [
            fed(layer.post_norm, lambda rows, layer=layer: layer.down(swiglu(layer.gate_up(rows))))  # type: ignore[misc]
            for layer in layers
        ],
        "head": [fed(model._norm, model._head)],
    }


def run(
    config: DecodeBench, notice: Notice = lambda line: None, *, machine: Accelerator | None = None
) -> dict[str, Any]:
    """Measure; returns what ``--json`` prints. ``machine``: what an earlier call found the device to do.

    Raises ``UsageError`` for a model that does not run on these kernels or a context it has no positions for,
    ``ResourceError`` for a shape that does not fit into memory, ``Unavailable`` without the kernels asked for.
    """
    device, widths = cuda_timing.current_device(), sorted({1, *config.widths})
    if machine is None:
        notice("measuring what this device can do")
        machine = look_at_device(device)
    kernels = config.kernels or best_kernels(device, notice)
    notice(f"preparing {config.model or 'a model of random weights'}")
    model = _model(config, kernels, device)
    length = config.context + max(config.tokens, *widths)
    if length > model.max_positions:
        raise UsageError(
            f"{length} tokens are more than the model's {model.max_positions} positions", hint="lower --context"
        )
    notice("decoding")
    decoding = CudaDecoding(model, config.context, config.tokens, max(widths), config.seed)
    steps, spent = decoding.decode(config.tokens)
    curve = decoding.curve(widths, config.rounds, config.seed)
    replays = {
        (tile, name): call for tile in {tile_for(n) for n in widths} for name, call in decoding.graphs(tile).items()
    }
    alone = {
        key: median(times) for key, times in cuda_timing.alternate(replays, config.rounds, seed=config.seed).items()
    }
    return {**machine.json(), **_report(config, kernels, machine, decoding, steps, spent, curve, alone)}


def best_kernels(device: torch.device, notice: Notice) -> Kernels:
    """The CUDA kernels where they run, else Triton's, and a line that says so."""
    from quantspec.kernels.cuda import library

    if (why := library.usable(device.index or 0)) is None:
        return "cuda"
    notice(f"Triton's kernels, since {why}")
    return "triton"


def _model(config: DecodeBench, kernels: Kernels, device: torch.device) -> TritonDecoder:
    if config.model is None:
        shape, group_size = config.shape or SHAPES["1b"], config.group_size or _GROUP_SIZE
        head_bits = config.head_bits or HEAD_BITS
        return random_cuda_decoder(shape, group_size, kernels, device, seed=config.seed, head_bits=head_bits)
    # "default" is what it is wherever text is generated: the quantized target.
    name = DEFAULT_TARGET if config.model == "default" else config.model
    model = load_model(name, device=str(device), backend=kernels, head_bits=config.head_bits)
    if not isinstance(model, TritonDecoder):
        raise Unavailable(f"{config.model} does not run on packed kernels here but by {model.backend}")
    return model


def _scheme(config: DecodeBench, model: TritonDecoder) -> tuple[int, int | None, int]:
    """Bits of the weights, their group (None: they are not quantized), and bits of the LM head."""
    head_bits = config.head_bits or HEAD_BITS
    if config.model is None:
        return BITS, config.group_size or _GROUP_SIZE, head_bits
    quantized = model.config.quantization
    return (quantized.scheme.bits, quantized.scheme.group_size, head_bits) if quantized else (16, None, 16)


def _report(
    config: DecodeBench, kernels: Kernels, machine: Accelerator, decoding: CudaDecoding, steps: list[float],
    spent: float, curve: dict[int, list[float]], alone: dict[tuple[int, str], float],
) -> dict[str, Any]:  # fmt: skip
    model, kv = decoding.model, decoding.cache.storage.kv
    bits, group_size, head_bits = _scheme(config, model)
    reads = part_bytes(model.config, bits, group_size or -1, head_bits)
    reads["attention"] = kv.shape[0] * kv.shape[1] * kv.shape[3] * kv.element_size() * config.context
    nbytes, macs = sum(reads.values()), sum(n * k for each in matrices(model.config).values() for n, k in each)
    measured = Measured(kernels, f"w{bits}a16", None, group_size, nbytes, macs, curve)
    seconds = min(steps)

    def split(n: int, whole: float) -> dict[str, Any]:
        tile = tile_for(n)
        found = {name: time * 1e3 for (rows, name), time in alone.items() if rows == tile}
        graph = found.pop("graph")
        return {"parts_ms": {**found, "other": whole * 1e3 - sum(found.values())}, "graph_ms": graph}

    graph_seconds = alone[tile_for(1), "graph"]
    return {
        "model": config.model,
        "shape": None if config.model else vars(config.shape or SHAPES["1b"]),
        "backend": kernels,
        "mode": f"w{bits}a16",
        "head_bits": head_bits,
        "threads": None,
        "context": config.context,
        "tokens": config.tokens,
        "rounds": config.rounds,
        "tokens_per_second": config.tokens / spent,
        "graph_tokens_per_second": 1 / graph_seconds,
        "ms_per_step": seconds * 1e3,
        "ms_per_step_median": median(steps) * 1e3,
        **split(1, seconds),
        "part_bytes": reads,
        "bytes_per_step": nbytes,
        "gbps": nbytes / seconds / 1e9,
        "bandwidth_fraction": nbytes / seconds / machine.bandwidth,
        "graph_bandwidth_fraction": nbytes / graph_seconds / machine.bandwidth,
        "bound_ms": machine.bound(nbytes, macs, "") * 1e3,
        "rows": [{**row, **split(row["n"], row["ms"] / 1e3)} for row in measured.rows(machine)],
    }
