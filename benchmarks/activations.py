"""What int8 activations cost, and 8 bits for LM head and embedding: a model under the CPU backends, on the same tokens.

    python -m quantspec.benchmarks.activations [MODEL] [--reference]

prints one JSON object. Everything is held against ``cpu-fp32``, which has the weights exactly as stored: perplexity and
its ratio with a 95% interval (bootstrap over rows of text, which keeps the pairing), KL divergence in nats and top-1
agreement per token. Two mixtures part the cost of ``cpu-int8``: its layers with the stored head and embedding, and its
head and embedding with the layers of ``cpu-fp32``. Two more tell what rounding the head alone costs on a GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from math import exp
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantspec.calibrate import data
from quantspec.calibrate.stats import ratio
from quantspec.kernels.cpu.packed import Arena, pack
from quantspec.models.base import CausalModel
from quantspec.models.config import ModelConfig
from quantspec.models.cpu_decoder import CpuDecoder
from quantspec.models.load import load_model
from quantspec.models.resolve import resolve
from quantspec.models.weights import HEAD_SCHEMES, Weights, round_head
from quantspec.numerics.measures import kl_divergence, top1_agreement
from quantspec.types import Batch

BASE = "cpu-fp32"


def mixed(layers: CpuDecoder, vocabulary: CpuDecoder) -> CpuDecoder:
    """A model with the layers (and their activations) of one, and the embedding and LM head of another."""
    return CpuDecoder(
        layers.config, vocabulary._embedding, layers._layers, layers._norm, vocabulary._head,
        weight_bytes=layers.weight_bytes, integer=layers.backend == "cpu-int8",
    )  # fmt: skip


def with_head(model: CpuDecoder, name: str, bits: int) -> CpuDecoder:
    """The model with its LM head, stored unquantized, in what a GPU's backends make of it under ``head_bits``."""
    config, folder = model.config, resolve(name)
    tensor = "model.embed_tokens.weight" if config.tied else "lm_head.weight"
    stored = Weights(folder, config).stored(tensor, (config.vocab_size, config.hidden_size))
    head = pack(round_head(stored, bits), None, arena=Arena(), integer=False)
    return CpuDecoder(
        config, model._embedding, model._layers, model._norm, head,
        weight_bytes=model.weight_bytes, integer=False,
    )  # fmt: skip


def load_models(name: str, reference: bool) -> dict[str, CausalModel]:
    """The base first. Raises ``UsageError`` for a model that is not quantized."""
    int8, fp32 = (load_model(name, backend=backend) for backend in ("cpu-int8", BASE))
    assert isinstance(int8, CpuDecoder)
    assert isinstance(fp32, CpuDecoder)
    models: dict[str, CausalModel] = {
        BASE: fp32,
        "cpu-int8": int8,
        "int8 activations alone": mixed(int8, fp32),
        "8-bit head and embedding alone": mixed(fp32, int8),
        **{f"{bits}-bit head of a GPU alone": with_head(fp32, name, bits) for bits in HEAD_SCHEMES},
    }
    if reference:
        models["reference-exact"] = load_model(name, backend="reference-exact")
    return models


def log_probs(model: CausalModel, tokens: Sequence[int]) -> Tensor:
    """Log-probabilities ``[T - 1, V]`` of what follows each token but the last."""
    batch = Batch.chain(tuple(tokens[:-1]))
    return model.forward(batch, [model.new_cache(len(tokens), 1)]).logits.log_softmax(-1)


@torch.no_grad()
def score(models: Mapping[str, CausalModel], rows: Tensor) -> dict[str, dict[str, list[float]]]:
    """Per model the mean over each row of ``rows [S, T]``: ``loss`` in nats per token, and ``kl`` (nats) and ``top1``
    (share of equal tokens) against the first model."""
    found: dict[str, dict[str, list[float]]] = {name: {"loss": [], "kl": [], "top1": []} for name in models}
    for number, row in enumerate(rows, 1):
        logs = {name: log_probs(model, row.tolist()) for name, model in models.items()}
        base = next(iter(logs.values()))
        for name, log in logs.items():
            found[name]["loss"].append(-float(log.gather(1, row[1:, None]).double().mean()))
            found[name]["kl"].append(float(kl_divergence(base, log).double().mean()))
            found[name]["top1"].append(top1_agreement(base, log))
        print(f"\r{number}/{len(rows)}", end="", file=sys.stderr)
    print(file=sys.stderr)
    return found


def report(found: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[str, dict[str, Any]]:
    """Figures of each model from the means of its rows (all of one length); the first model is the base."""
    base = next(iter(found.values()))["loss"]
    figures = {}
    for name, one in found.items():
        loss = ratio([(value, 1) for value in one["loss"]])
        change = ratio([(value - before, 1) for value, before in zip(one["loss"], base, strict=True)])
        figures[name] = {
            "perplexity": exp(loss.value),
            "ratio": exp(change.value),
            "ratio_95": (exp(change.low), exp(change.high)),
            "kl": sum(one["kl"]) / len(base),
            "top1_agreement": sum(one["top1"]) / len(base),
        }
    return figures


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="default/target-w4")
    parser.add_argument("--rows", type=int, default=128, help="held-out rows of --seq-len tokens")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--held-out", type=Path, default=data.HELD_OUT)
    parser.add_argument("--reference", action="store_true", help="measure reference-exact too, which takes minutes")
    options = parser.parse_args(arguments)
    models = load_models(options.model, options.reference)
    folder = resolve(options.model)
    eos = next(iter(ModelConfig.load(folder).eos_ids), None)
    texts, tokenizer = data.load_texts(options.held_out), data.load_tokenizer(folder)
    rows = data.token_rows(texts, tokenizer, eos, options.seq_len, options.rows, None)
    found = {"model": options.model, "tokens": rows[:, 1:].numel(), "models": report(score(models, rows))}
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
