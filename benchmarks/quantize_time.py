"""How long quantization takes at a real model's size, from one decoder layer of random weights.

    python -m quantspec.benchmarks.quantize_time --shape 1b --methods rtn mse gptq --rows 8 16 --project 64 128

prints one JSON object: for each method and number of calibration rows the processor seconds of one layer (its reading,
its forward and its rounding; writing it and the closing report are left out), and the minutes that all layers of the
shape would take on two cores that do nothing else and share the work evenly. ``--project`` draws a line through the
first and the last of ``--rows``. One thread, its processor time and the least of ``--rounds``, because other jobs may
share the machine, and threads that wait for each other would count too.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from quantspec.benchmarks.shapes import ModelShape, parse_shape
from quantspec.calibrate.quantize.config import RECIPES, QuantizeConfig
from quantspec.calibrate.quantize.pipeline import LayerPipeline
from quantspec.calibrate.quantize.plan import Plan
from quantspec.calibrate.quantize.stream import EMBEDDING, FINAL_NORM, StreamedModel
from quantspec.models import atomic

_CORES = 2
_VOCAB = 256  # nothing here reads it


def write_layer(folder: Path, shape: ModelShape) -> None:
    """A model of one decoder layer with random bf16 weights, whose outputs have the power of their inputs."""
    g = torch.Generator().manual_seed(0)
    q, kv, hidden, inner = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim, shape.hidden, shape.inner
    sizes = {"self_attn.q": (q, hidden), "self_attn.k": (kv, hidden), "self_attn.v": (kv, hidden)}
    sizes |= {"self_attn.o": (hidden, q), "mlp.gate": (inner, hidden), "mlp.up": (inner, hidden)}
    sizes |= {"mlp.down": (hidden, inner)}
    tensors = {EMBEDDING: torch.zeros(_VOCAB, hidden).bfloat16(), FINAL_NORM: torch.ones(hidden).bfloat16()}
    for name, (rows, columns) in sizes.items():
        weight = torch.randn(rows, columns, generator=g).mul_(columns**-0.5)
        tensors[f"model.layers.0.{name}_proj.weight"] = weight.bfloat16()
    for name in ("input", "post_attention"):
        tensors[f"model.layers.0.{name}_layernorm.weight"] = torch.ones(hidden).bfloat16()
    atomic.save_tensors(folder / "model.safetensors", tensors)
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": _VOCAB, "hidden_act": "silu"}
    config |= {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": 1, "rms_norm_eps": 1e-5}
    config |= {"num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads, "head_dim": shape.head_dim}
    config |= {"max_position_embeddings": 4096, "rope_theta": 10000.0, "tie_word_embeddings": True}
    atomic.write_json(folder / "config.json", config)


@torch.no_grad()
def layer_seconds(config: QuantizeConfig) -> tuple[float, dict[str, float]]:
    """Processor seconds to read and quantize layer 0 on as many rows as the method takes; wall seconds by linear
    layer."""
    source = StreamedModel(config.model, config.device)
    by_linear: dict[str, float] = {}
    pipeline = LayerPipeline(
        config, Plan.of(config, source), None, lambda done: by_linear.update({done.name: done.seconds})
    )
    hidden = None
    if pipeline.calibrated:
        g, width = torch.Generator().manual_seed(1), source.config.hidden_size
        # Few directions carry most of the power, as in models.
        mix = torch.randn(width // 8, width, generator=g)
        hidden = torch.randn(pipeline.num_samples, config.seq_len, width // 8, generator=g) @ mix
        hidden += torch.randn(hidden.shape, generator=g)
    began = time.process_time()
    pipeline.quantize(source.layer(0), 0, source.store, hidden)
    return time.process_time() - began, by_linear


def measure(config: QuantizeConfig, shape: ModelShape, rows: list[int], project: list[int], rounds: int) -> Any:
    """Seconds of one layer and minutes of all, by the number of calibration rows."""
    limited = [replace(config, num_samples=count) for count in rows]
    found: dict[int, float] = {}
    for _ in range(rounds):
        for one in limited:
            seconds, by_linear = layer_seconds(one)
            found[one.num_samples] = min(seconds, found.get(one.num_samples, seconds))
            print(f"{one.method}, {one.num_samples} rows: {seconds:.1f} s; by layer {by_linear}", file=sys.stderr)
    first, last = rows[0], rows[-1]
    slope = (found[last] - found[first]) / max(1, last - first)
    lines = {count: found[first] + slope * (count - first) for count in project if last > first}

    def minutes(seconds: float) -> float:
        return round(seconds * shape.layers / 60 / _CORES, 2)

    return {
        "layer_cpu_seconds": {count: round(seconds, 2) for count, seconds in found.items()},
        "model_minutes": {count: minutes(seconds) for count, seconds in found.items()},
        "projected_minutes": {count: minutes(seconds) for count, seconds in lines.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=parse_shape, default="1b")
    parser.add_argument("--methods", choices=list(RECIPES), nargs="+", default=["rtn", "mse", "gptq"])
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 16], help="calibration rows, rising")
    parser.add_argument("--project", type=int, nargs="+", default=[64, 128], help="rows to project to")
    parser.add_argument("--rounds", type=int, default=1)
    for name in ("bits", "group_size", "seq_len"):
        parser.add_argument("--" + name.replace("_", "-"), type=int, default=getattr(QuantizeConfig, name))
    given = vars(parser.parse_args())
    torch.set_num_threads(1)
    shape, rows, project, rounds = (given.pop(name) for name in ("shape", "rows", "project", "rounds"))
    methods = given.pop("methods")
    with tempfile.TemporaryDirectory() as folder:
        write_layer(Path(folder), shape)
        config = QuantizeConfig(Path(folder), Path(folder) / "out", **given)
        found = {method: measure(replace(config, method=method), shape, rows, project, rounds) for method in methods}
    print(json.dumps({"layers": shape.layers, "cores": _CORES, "methods": found}, indent=2))


if __name__ == "__main__":
    main()
