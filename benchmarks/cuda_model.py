"""A packed model of a given shape with random weights, made on the CUDA device that runs it."""

from __future__ import annotations

import gc
from functools import cache

import torch
from torch import Tensor

from quantspec.benchmarks.cuda_contenders import random_weight
from quantspec.benchmarks.random_model import model_config
from quantspec.benchmarks.shapes import ModelShape
from quantspec.errors import ResourceError
from quantspec.models.config import ModelConfig
from quantspec.models.load_triton import Kernels, packed_linear, workspace_for
from quantspec.models.triton_decoder import Matmul, TritonDecoder, TritonLayer
from quantspec.numerics.affine import QuantizedWeight
from quantspec.numerics.scheme import CHANNEL

BITS, HEAD_BITS, HEAD_GROUP = 4, 8, 128
_SCALE_BYTES = 2


@torch.no_grad()
def random_cuda_decoder(
    shape: ModelShape, group_size: int, kernels: Kernels, device: torch.device, *, seed: int,
    dtype: torch.dtype = torch.bfloat16, head_bits: int = HEAD_BITS,
) -> TritonDecoder:  # fmt: skip
    """Linear layers of 4 bits, an LM head of ``head_bits``, an embedding of ``dtype``. Layers hold equal codes at
    different places, which no cache can tell.

    Raises ``ResourceError`` if it would not fit into the device's memory, ``Unavailable`` as ``workspace_for`` does.
    """
    _check_memory(shape, device)
    torch.manual_seed(seed)
    workspace, config = workspace_for(device, kernels), model_config(shape)

    @cache
    def drawn(rows: int, cols: int) -> QuantizedWeight:
        return random_weight(rows, cols, BITS, dtype, device, group_size)

    def linear(rows: int, cols: int) -> Matmul:
        return packed_linear(drawn(rows, cols), None, device, kernels, workspace, dtype=dtype)

    ones = torch.ones(shape.hidden, device=device)
    mixed, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    layers = [
        TritonLayer(
            input_norm=ones,
            qkv=linear(mixed + 2 * kv, shape.hidden),
            qk_norm=None,
            o=linear(shape.hidden, mixed),
            post_norm=ones,
            gate_up=linear(2 * shape.inner, shape.hidden),
            down=linear(shape.hidden, shape.inner),
            window=None,
        )
        for _ in range(shape.layers)
    ]
    drawn.cache_clear()
    embedding = torch.randn(shape.vocab, shape.hidden, device=device, dtype=dtype)
    head_weight = random_weight(shape.vocab, shape.hidden, head_bits, dtype, device, HEAD_GROUP)
    head = packed_linear(head_weight, None, device, kernels, workspace, dtype=dtype, out_dtype=torch.float32)
    del head_weight
    nbytes = sum(part_bytes(config, BITS, group_size, head_bits).values()) + embedding.nbytes
    _give_back(device)
    return TritonDecoder(config, embedding, layers, ones, head, weight_bytes=nbytes)


def part_bytes(config: ModelConfig, bits: int, group_size: int, head_bits: int) -> dict[str, int]:
    """Bytes of the weights that a step reads, by part: codes and their 16-bit scales. 16 bits: no scales."""
    return {
        part: sum(_bytes(n, k, head_bits if part == "head" else bits, group_size) for n, k in sizes)
        for part, sizes in matrices(config).items()
    }


def matrices(config: ModelConfig) -> dict[str, list[tuple[int, int]]]:
    """``(N, K)`` of all matrices that a step multiplies with, by part."""
    hidden, inner, head = config.hidden_size, config.intermediate_size, config.head_dim
    mixed, layers = config.num_heads * head, config.num_layers
    return {
        "qkv": [(mixed + 2 * config.num_kv_heads * head, hidden)] * layers,
        "o": [(hidden, mixed)] * layers,
        "mlp": [(2 * inner, hidden), (hidden, inner)] * layers,
        "head": [(config.vocab_size, hidden)],
    }


def _bytes(n: int, k: int, bits: int, group_size: int) -> int:
    groups = 0 if bits == 16 else 1 if group_size == CHANNEL else -(-k // group_size)
    return n * k * bits // 8 + n * groups * _SCALE_BYTES


def _check_memory(shape: ModelShape, device: torch.device) -> None:
    if device.type != "cuda":
        return
    free, _ = torch.cuda.mem_get_info(device)
    need = shape.memory + 2 * shape.vocab * shape.hidden + 4 * 2 * shape.inner * shape.hidden
    if need > free:
        missing = f"{need / 1e9:.1f} GB of the device's memory, and {free / 1e9:.1f} are free"
        raise ResourceError(f"a model of this shape needs {missing}", hint="take a smaller shape, such as 1b")


def _give_back(device: torch.device) -> None:
    """What packing needed on the way."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def rows_like(x: Tensor, columns: int) -> Tensor:
    """Random rows for a part of a model: as many as x has, of its type and place."""
    return torch.randn(x.shape[0], columns, device=x.device, dtype=x.dtype)
