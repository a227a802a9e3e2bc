"""Memory of quantizing: one decoder layer at a time, whatever the model's size, measured by the system.

Each run is a process of its own, whose limits and high-water mark are its alone.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from quantspec.models import atomic
from quantspec.models.tensors import INDEX, TensorStore

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, sets Linux's limits")

HEADS, HEAD_DIM = 8, 64
HIDDEN = HEADS * HEAD_DIM
KV = 2 * HEAD_DIM

PROGRAM = """
import json, resource, sys
from pathlib import Path
import torch
from quantspec.calibrate.quantize.config import QuantizeConfig
from quantspec.calibrate.quantize.run import run
from quantspec.kernels.memory import status_bytes

torch.set_num_threads(1)
small, model, out = map(Path, sys.argv[1:4])
options, allowed = json.loads(sys.argv[4]), int(sys.argv[5])
# Libraries are loaded, and take buffers of their own, at first use: that is not what is measured.
square = torch.eye(2048)
torch.linalg.cholesky_ex((square @ square).T, upper=True)
del square
run(QuantizeConfig(small, out.with_name("warm"), group_size=32, num_samples=4, seq_len=64, eval_samples=0))
Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
before, cap = status_bytes("VmRSS"), status_bytes("VmData") + allowed
if allowed:
    resource.setrlimit(resource.RLIMIT_DATA, (cap, cap))
notes = []
options |= {name: Path(options[name]) for name in ("calibration", "held_out") if name in options}
report = run(QuantizeConfig(model, out, **options), lambda event: notes.append(event.message))
added = report.peak_bytes - before
print(json.dumps({"added": added, "cap": cap, "notes": notes, "perplexity": report.perplexity_after}))
"""


def write_model(folder: Path, tokenizer: Path, layers: int, wide: int, vocabulary: int) -> Path:
    """A Llama of random fp32 weights, a file per layer, made without holding it."""
    folder.mkdir()
    g = torch.Generator().manual_seed(0)

    def weight(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=g) * columns**-0.5

    shapes = {"self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (KV, HIDDEN), "self_attn.v_proj": (KV, HIDDEN),
              "self_attn.o_proj": (HIDDEN, HIDDEN), "mlp.gate_proj": (wide, HIDDEN), "mlp.up_proj": (wide, HIDDEN),
              "mlp.down_proj": (HIDDEN, wide)}  # fmt: skip
    where: dict[str, str] = {}

    def save(file: str, tensors: dict[str, torch.Tensor]) -> None:
        atomic.save_tensors(folder / file, tensors)
        where.update(dict.fromkeys(tensors, file))

    embedding = {"model.embed_tokens.weight": weight(vocabulary, HIDDEN)}
    save("rest.safetensors", embedding | {"model.norm.weight": torch.ones(HIDDEN)})
    for index in range(layers):
        stem = f"model.layers.{index}."
        tensors = {f"{stem}{name}.weight": weight(*shape) for name, shape in shapes.items()}
        tensors |= {f"{stem}{norm}_layernorm.weight": torch.ones(HIDDEN) for norm in ("input", "post_attention")}
        save(f"layer-{index}.safetensors", tensors)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": vocabulary, "hidden_size": HIDDEN,
        "intermediate_size": wide, "num_hidden_layers": layers, "num_attention_heads": HEADS, "head_dim": HEAD_DIM,
        "num_key_value_heads": KV // HEAD_DIM, "max_position_embeddings": 1024, "rms_norm_eps": 1e-5, "rope_theta": 1e4,
        "tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    return folder


def measured(small: Path, model: Path, out: Path, allowed: int = 0, **options: object) -> dict[str, Any]:
    arguments = [sys.executable, "-c", PROGRAM, str(small), str(model), str(out), json.dumps(options), str(allowed)]
    found = subprocess.run(arguments, check=False, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    result: dict[str, Any] = json.loads(found.stdout)
    return result


def layer_bytes(wide: int) -> int:
    """One decoder layer in fp32, norms aside."""
    return 4 * HIDDEN * (2 * HIDDEN + 2 * KV + 3 * wide)


def test_gptq_stays_under_the_bound(model: Path, text: Path, tmp_path: Path) -> None:
    """1.3 times: a layer in fp32, three [K, K] matrices of the widest linear layer, and of the calibration text the
    states between layers and the outputs of attention."""
    wide, samples, length = 2048, 24, 512
    big = write_model(tmp_path / "big", model / "tokenizer.json", 2, wide, vocabulary=20_000)
    long = tmp_path / "long.txt"
    long.write_text(text.read_text().replace("<|doc|>", "") * 8)
    found = measured(
        model, big, tmp_path / "out", calibration=str(long), num_samples=samples, seq_len=length, eval_samples=0
    )
    states = 4 * samples * length * (HIDDEN + HIDDEN)
    # Buffers of the BLAS and holes in the heap do not grow with the model; at this size they are a tenth of the whole.
    fixed = 20e6
    assert found["added"] < fixed + 1.3 * (layer_bytes(wide) + 3 * 4 * wide**2 + states)


def test_a_model_larger_than_the_memory_that_a_process_may_have(model: Path, text: Path, tmp_path: Path) -> None:
    """The limit is on memory of the process's own (RLIMIT_DATA): one on its address space would count torch's mapped
    libraries, half a gigabyte, and make the test about them."""
    wide = 2048
    big = write_model(tmp_path / "big", model / "tokenizer.json", 26, wide, vocabulary=16_000)
    size = TensorStore(big).nbytes()
    allowed = int(1.3 * (layer_bytes(wide) + 3 * 4 * wide**2))
    found = measured(
        model, big, tmp_path / "out", allowed, method="rtn", held_out=str(text), eval_samples=2, seq_len=64
    )
    assert size > 1.2 * found["cap"]
    assert size > 4 * allowed
    assert found["perplexity"] > 1
    assert atomic.verify_manifest(tmp_path / "out")
