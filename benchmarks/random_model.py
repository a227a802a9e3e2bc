"""A packed model of a given shape with random weights, made without ever holding its weights as floats.

Codes are random, never zeros: on some processors zeros run too fast. Layers hold equal codes at different places, which
no cache can tell.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch

from quantspec.benchmarks.shapes import ModelShape
from quantspec.errors import ResourceError
from quantspec.kernels.cpu.forward import PackedLayer
from quantspec.kernels.cpu.packed import Arena, PackedLinear, pack
from quantspec.models.config import ModelConfig, Rope
from quantspec.models.cpu_decoder import CpuDecoder
from quantspec.models.load_cpu import HEAD_SCHEME
from quantspec.numerics.affine import QuantizedWeight
from quantspec.numerics.scheme import Scheme

_MAX_POSITIONS = 2**17


def random_decoder(shape: ModelShape, group_size: int, *, integer: bool, seed: int) -> CpuDecoder:
    """Linear layers of 4 bits; embedding and LM head of 8 (``integer``) or in bf16, as a checkpoint's would be packed.

    Raises ``ResourceError`` if it would not fit into memory.
    """
    free = available_memory()
    if free is not None and shape.memory > free:
        need = f"{shape.memory / 1e9:.1f} GB of memory, and {free / 1e9:.1f} are free"
        raise ResourceError(f"a model of this shape needs {need}", hint="take a smaller shape, such as 1b")
    generator, arena, scheme = torch.Generator().manual_seed(seed), Arena(), Scheme(4, group_size)

    def codes(rows: int, cols: int, scheme: Scheme) -> QuantizedWeight:
        drawn = torch.randint(scheme.q_min, scheme.q_max + 1, (rows, cols), generator=generator, dtype=torch.int8)
        # Uniform codes have a deviation of 2^bits / sqrt(12); the product's rows shall have that of the inputs.
        scale = 12**0.5 / 2**scheme.bits / cols**0.5
        scales = torch.full((rows, scheme.num_groups(cols)), scale, dtype=getattr(torch, scheme.dtype))
        return QuantizedWeight(drawn, scales, None, scheme)

    drawn = cache(
        lambda rows, cols: codes(rows, cols, scheme)
    )  # equal in all layers: drawing takes longer than packing

    def linear(rows: int, cols: int) -> PackedLinear:
        return pack(drawn(rows, cols), arena=arena, integer=integer)

    def vocabulary() -> PackedLinear:
        if integer:
            return pack(codes(shape.vocab, shape.hidden, HEAD_SCHEME), arena=arena)
        weight = torch.empty(shape.vocab, shape.hidden, dtype=torch.bfloat16)
        return pack(weight.normal_(0, shape.hidden**-0.5, generator=generator), arena=arena)

    ones, mixed = torch.ones(shape.hidden), shape.heads * shape.head_dim
    layers = [
        PackedLayer(
            input_norm=ones,
            qkv=linear((shape.heads + 2 * shape.kv_heads) * shape.head_dim, shape.hidden),
            q_norm=None,
            k_norm=None,
            o=linear(shape.hidden, mixed),
            post_norm=ones,
            gate_up=linear(2 * shape.inner, shape.hidden),
            down=linear(shape.hidden, shape.inner),
            window=None,
        )
        for _ in range(shape.layers)
    ]
    drawn.cache_clear()
    embedding = vocabulary()
    head = embedding if shape.tied else vocabulary()
    linears = [one for layer in layers for one in layer.linears] + ([embedding] if shape.tied else [embedding, head])
    nbytes = sum(one.nbytes for one in linears)
    return CpuDecoder(model_config(shape), embedding, layers, ones, head, weight_bytes=nbytes, integer=integer)


def model_config(shape: ModelShape) -> ModelConfig:
    return ModelConfig(
        architecture="llama",
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_layers=shape.layers,
        num_heads=shape.heads,
        num_kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_positions=_MAX_POSITIONS,
        rms_norm_eps=1e-5,
        rope=Rope(500_000.0),
        windows=(None,) * shape.layers,
        tied=shape.tied,
        qkv_bias=False,
        o_bias=False,
        mlp_bias=False,
        qk_norm=False,
        bos_id=None,
        eos_ids=(),
    )


def available_memory() -> int | None:
    """Bytes that Linux could give without swapping; None where it does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
