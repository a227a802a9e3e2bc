"""What a cache of 8 or 4-bit keys and values costs and saves, against one in fp32, on the CPU kernels.

    python -m quantspec.benchmarks.kv_cache [MODEL] [--context N] [--shape 1b]

prints one JSON object. MODEL should be quantized with ``--kv-cache-dtype int4``; every figure is of the kernels that
generate. Per kind of cache: bytes per token, perplexity of held-out text and its ratio to the fp32 cache's with a 95%
interval (bootstrap over rows of text, which keeps the pairing), KL divergence in nats and top-1 agreement per token;
and of a model of random weights in a given shape, milliseconds of a one-token step after ``--context`` tokens, and of
its attention alone (fastest of calls that take turns).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from functools import partial
from math import inf
from pathlib import Path
from typing import Any

import torch

from quantspec.benchmarks.activations import report, score
from quantspec.benchmarks.random_model import random_decoder
from quantspec.benchmarks.shapes import SHAPES
from quantspec.calibrate import data
from quantspec.calibrate.cost.timing import alternate
from quantspec.kernels.cpu import library
from quantspec.kernels.cpu.forward import PARTS
from quantspec.models.base import CausalModel
from quantspec.models.cache import KVCache, kv_format
from quantspec.models.config import ModelConfig
from quantspec.models.cpu_decoder import CpuDecoder
from quantspec.models.load import load_model
from quantspec.models.resolve import resolve
from quantspec.numerics.scheme import KVCacheDtype
from quantspec.types import Batch

DTYPES: tuple[KVCacheDtype, ...] = ("auto", "int8", "int4")


def variants(model: CpuDecoder) -> dict[str, CpuDecoder]:
    """The model with each kind of cache; fp32, the base, comes first."""
    return {
        dtype: CpuDecoder(
            model.config, model._embedding, model._layers, model._norm, model._head,
            weight_bytes=model.weight_bytes, integer=model.backend == "cpu-int8",
            kv_format=kv_format(model.config, dtype),
        )
        for dtype in DTYPES
    }  # fmt: skip


def token_bytes(model: CpuDecoder) -> int:
    """Bytes of one token's keys and values in all layers."""
    kv = model.new_cache(1, 0).kv
    return kv[:, :, 0].numel() * kv.element_size()


def accuracy(name: str, rows: int, seq_len: int, held_out: Path) -> dict[str, Any]:
    """Perplexity, KL and agreement of each kind of cache on held-out text."""
    folder, model = resolve(name), load_model(name)
    assert isinstance(model, CpuDecoder), f"{name} does not run on the CPU kernels"
    models = variants(model)
    eos = next(iter(ModelConfig.load(folder).eos_ids), None)
    texts, tokenizer = data.load_texts(held_out), data.load_tokenizer(folder)
    ids = data.token_rows(texts, tokenizer, eos, seq_len, rows, None)
    figures = report(score(dict[str, CausalModel](models), ids))
    for dtype, one in models.items():
        figures[dtype]["bytes_per_token"] = token_bytes(one)
    return {"model": name, "tokens": ids[:, 1:].numel(), "calibrated": model.config.kv_calibrated, "caches": figures}


def filled(model: CpuDecoder, context: int) -> KVCache:
    """A cache of ``context`` random tokens: their cost is that of any others."""
    cache, config = model.new_cache(context, 1), model.config
    rows = torch.randn(context, 2 * config.num_kv_heads, config.head_dim, generator=torch.Generator().manual_seed(0))
    for layer in range(config.num_layers):
        cache.write(layer, 0, rows)
    cache.commit(range(context))
    return cache


def speed(shape: str, context: int, rounds: int) -> dict[str, Any]:
    """Milliseconds of a one-token step with each kind of cache."""
    models = variants(random_decoder(SHAPES[shape], 128, integer=True, seed=0))
    caches = {dtype: filled(model, context) for dtype, model in models.items()}
    attention: dict[str, list[float]] = {dtype: [] for dtype in models}

    def step(dtype: str) -> None:
        seconds = torch.zeros(len(PARTS), dtype=torch.float64)
        models[dtype].forward(Batch.chain((1,), context), [caches[dtype]], seconds=seconds)
        attention[dtype].append(float(seconds[PARTS.index("attention")]))

    times = alternate({dtype: partial(step, dtype) for dtype in models}, rounds, share=inf)
    figures = {
        dtype: {"ms_per_step": min(times[dtype]) * 1e3, "attention_ms": min(attention[dtype]) * 1e3} for dtype in models
    }
    return {"shape": shape, "context": context, "threads": library.load().qs_threads(), "caches": figures}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="default/target-w4")
    parser.add_argument("--rows", type=int, default=128, help="held-out rows of --seq-len tokens; 0: none")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--held-out", type=Path, default=data.HELD_OUT)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="1b")
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=20, help="0: measure no times")
    options = parser.parse_args(arguments)
    found: dict[str, Any] = {}
    if options.rows:
        found["accuracy"] = accuracy(options.model, options.rows, options.seq_len, options.held_out)
    if options.rounds:
        found["speed"] = speed(options.shape, options.context, options.rounds)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
