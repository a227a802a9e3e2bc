"""The memory planner against the system: what ``quantspec generate --dry-run`` predicts, and the most resident memory
that a process of its own then takes.

``python -m quantspec.benchmarks.memory [--shape 1b] [--context 2048] [--keep DIR]`` writes models of that shape with
random weights, in 4 bits and in bf16, and an EAGLE head for them, and generates with each.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantspec.benchmarks.random_model import model_config
from quantspec.benchmarks.shapes import ModelShape, parse_shape
from quantspec.models import atomic
from quantspec.models.quantization import EMBEDDING_MODULE, HEAD_MODULE
from quantspec.models.resolve import resolve
from quantspec.models.tensors import INDEX
from quantspec.models.weights import Fused, LayerNames

_GROUP, _NEW_TOKENS = 128, 8


@dataclass(frozen=True)
class Row:
    """Bytes that one run added to a process that had torch loaded."""

    case: str
    context: int
    loading: int
    measured_loading: int
    running: int
    measured_running: int

    def ratios(self) -> dict[str, float]:
        """Predicted over measured: while it loads, after that, and the most of both."""
        most = max(self.loading, self.running) / max(self.measured_loading, self.measured_running)
        figures = {"loading": self.loading / self.measured_loading, "running": self.running / self.measured_running}
        return {f"{name}_ratio": round(ratio, 3) for name, ratio in (figures | {"peak": most}).items()}


def write_model(folder: Path, shape: ModelShape, *, bits: int, seed: int = 0) -> Path:
    """A Llama of random weights, in 4 ``bits`` (LM head and embedding in bf16) or 16, a file per layer."""
    folder.mkdir(parents=True)
    generator, config = torch.Generator().manual_seed(seed), model_config(shape)
    tokenizer = resolve("default/target")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tokenizer / name).read_bytes())
    raw: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": shape.vocab,
        "hidden_size": shape.hidden, "intermediate_size": shape.inner, "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads, "head_dim": shape.head_dim,
        "max_position_embeddings": config.max_positions, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
        "tie_word_embeddings": shape.tied, "bos_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
    if bits == 4:
        raw["quantization_config"] = _QUANTIZATION
    (folder / "config.json").write_text(json.dumps(raw))
    weight_map: dict[str, str] = {}
    vocabulary = [EMBEDDING_MODULE] if shape.tied else [EMBEDDING_MODULE, HEAD_MODULE]
    outer = {f"{name}.weight": _dense(shape.vocab, shape.hidden, generator) for name in vocabulary}
    files = {"outer.safetensors": outer | {"model.norm.weight": torch.ones(shape.hidden)}}
    for i in range(shape.layers):
        tensors: dict[str, Tensor] = {}
        names = LayerNames.of(config, i)
        for norm in (names.input_norm, names.post_norm):
            tensors[norm] = torch.ones(shape.hidden)
        for fused in (names.qkv, names.o, names.gate_up, names.down):
            tensors |= _linears(fused, bits, generator)
        files[f"layer-{i}.safetensors"] = tensors
        for file, held in files.items():
            atomic.save_tensors(folder / file, held)
            weight_map |= dict.fromkeys(held, file)
        files = {}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


_QUANTIZATION = {
    "quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head"],
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": {
        "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": _GROUP,
    }}},
}  # fmt: skip


def _linears(fused: Fused, bits: int, generator: torch.Generator) -> dict[str, Tensor]:
    k, tensors = fused.in_features, dict[str, Tensor]()
    for name, n in fused.parts:
        if bits == 16:
            tensors[f"{name}.weight"] = _dense(n, k, generator)
            continue
        words = torch.randint(-(2**31), 2**31, (n, k // 8), dtype=torch.int32, generator=generator)
        tensors[f"{name}.weight_packed"] = words
        tensors[f"{name}.weight_scale"] = torch.full((n, -(-k // _GROUP)), k**-0.5 / 4.6, dtype=torch.bfloat16)
        tensors[f"{name}.weight_shape"] = torch.tensor([n, k])
    return tensors


def _dense(n: int, k: int, generator: torch.Generator) -> Tensor:
    return torch.empty(n, k, dtype=torch.bfloat16).normal_(0, k**-0.5, generator=generator)


def write_head(folder: Path, shape: ModelShape) -> Path:
    """An EAGLE head of random weights in bf16 for a model of that shape."""
    folder.mkdir(parents=True)
    raw = json.loads((resolve("default/eagle-target") / "config.json").read_text())
    raw |= {
        "vocab_size": shape.vocab, "hidden_size": shape.hidden, "intermediate_size": shape.inner,
        "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads, "head_dim": shape.head_dim,
    }  # fmt: skip
    raw.pop("quantspec", None)
    (folder / "config.json").write_text(json.dumps(raw))
    from quantspec.drafters.eagle_head import HeadConfig

    generator = torch.Generator().manual_seed(1)
    tensors = {
        name: _dense(sizes[0], sizes[1], generator) if len(sizes) == 2 else torch.ones(*sizes, dtype=torch.bfloat16)
        for name, sizes in HeadConfig.load(folder).shapes().items()
    }
    atomic.save_tensors(folder / "model.safetensors", tensors)
    return folder


_PROGRAM = """
import json, sys
from pathlib import Path
import torch
from quantspec.engine import build
from quantspec.engine.config import EngineConfig
from quantspec.engine.llm import LLM
from quantspec.kernels.memory import peak_bytes, status_bytes
from quantspec.types import SamplingParams

options, context, new = json.loads(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
config = EngineConfig(**options)
plan = build.price(config, lambda line: None).plan(context)
before = status_bytes("VmRSS")
llm = LLM(build.build(config, lambda line: print(line, file=sys.stderr)))
loaded = peak_bytes() - before
Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
tokens = [(7 * i * i + 3 * i) % llm._engine.model.vocab_size for i in range(context - new)]
llm.generate(tokens, SamplingParams(max_new_tokens=new, temperature=0.8, ignore_eos=True))
print(json.dumps(plan.as_dict() | {"measured_loading": loaded, "measured_running": peak_bytes() - before}))
"""


def measure(case: str, context: int, options: dict[str, Any]) -> Row:
    """Predict, load and generate in a process of its own."""
    command = [sys.executable, "-c", _PROGRAM, json.dumps(options), str(context), str(_NEW_TOKENS)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    return Row(case, context, *(found[key] for key in list(Row.__dataclass_fields__)[2:]))


def cases(root: Path, shape: ModelShape) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and options of each run."""
    w4 = write_model(root / "w4", shape, bits=4)
    head = write_head(root / "head", shape)
    yield "4 bits", {"model": str(w4), "method": "none"}
    yield "4 bits, int8 keys and values", {"model": str(w4), "method": "none", "kv_cache_dtype": "int8"}
    yield "4 bits, fp32 activations", {"model": str(w4), "method": "none", "activations": "fp32"}
    yield "4 bits, EAGLE head", {"model": str(w4), "method": "eagle", "head": str(head)}
    yield "4 bits, itself as draft model", {"model": str(w4), "method": "draft", "draft_model": str(w4)}
    dense = write_model(root / "dense", shape, bits=16)
    yield "bf16", {"model": str(dense), "method": "none"}
    yield "bf16, reference", {"model": str(dense), "method": "none", "backend": "reference-fast"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", type=parse_shape, default="1b,layers=4")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--keep", type=Path, help="where the models are written, and left")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.keep) as root:
        for case, options in cases(Path(root), arguments.shape):
            row = measure(case, arguments.context, options)
            print(json.dumps(asdict(row) | row.ratios()), flush=True)


if __name__ == "__main__":
    main()
