"""A training net from any native model's folder, and to a plain Llama's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from quantspec.calibrate.train.config import Shape
from quantspec.calibrate.train.net import PLAIN, LlamaNet, Rules
from quantspec.errors import ModelError
from quantspec.models.atomic import copy_file, make_folder, save_tensors, verify_manifest, write_json
from quantspec.models.config import NATIVE, ModelConfig, config_source, read_config
from quantspec.models.quantization import UnsupportedModel
from quantspec.models.rotation import ResidualRotation, load_rotation
from quantspec.models.weights import Weights, to_dense
from quantspec.numerics.affine import dequantize, quantize
from quantspec.numerics.scheme import Scheme


def llama_config(shape: Shape, vocab: int) -> dict[str, object]:
    """config.json of a tied-head Llama."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.mlp,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": shape.max_positions,
        "rope_theta": shape.rope_theta,
        "rms_norm_eps": shape.rms_eps,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "torch_dtype": "bfloat16",
    }


def shape_of(config: ModelConfig) -> Shape:
    """Sizes of any native model."""
    return Shape(
        hidden=config.hidden_size,
        layers=config.num_layers,
        heads=config.num_heads,
        kv_heads=config.num_kv_heads,
        mlp=config.intermediate_size,
        head_dim=config.head_dim,
        max_positions=config.max_positions,
        rope_theta=config.rope.theta,
        rms_eps=config.rms_norm_eps,
    )


def rules_of(config: ModelConfig) -> Rules:
    """What it has besides."""
    rope = None if config.rope.kind == "default" else config.rope
    windows = config.windows if any(config.windows) else ()
    return Rules(config.tied, config.qkv_bias, config.o_bias, config.mlp_bias, config.qk_norm, rope, windows)


def save_net(net: LlamaNet, out: Path, tokenizer_from: Path, tau: Mapping[str, float] | None = None) -> None:
    """Write bf16 weights, configs and the tokenizer; transformers loads the folder. `tau` of a model that drafts: see
    `measure.fit_taus`."""
    assert net.rules == PLAIN, "the config says no more"
    make_folder(out)
    own = {"quantspec": {"tau": dict(tau)}} if tau else {}
    write_json(out / "config.json", llama_config(net.shape, net.vocab) | own)
    write_json(out / "generation_config.json", {"bos_token_id": 0, "eos_token_id": 1})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (tokenizer_from / name).resolve() != (out / name).resolve():
            copy_file(tokenizer_from / name, out / name)
    save_tensors(
        out / "model.safetensors", {k: v.detach().to("cpu", torch.bfloat16) for k, v in net.state_dict().items()}
    )


def load_net(folder: Path, device: str = "cpu") -> LlamaNet:
    """An fp32 training net, its weights frozen, of any native model: dense or quantized, in every format that is read.

    Quantized weights are dequantized; what they stand for is exact in fp32. A rotated model is turned back, so that
    its states are those that drafters are given. Raises `ModelError`.
    """
    raw = read_config(folder)
    verify_manifest(folder)
    try:
        config = ModelConfig.of(raw, config_source(folder))
    except UnsupportedModel as error:
        hint = f"drafters are trained for {', '.join(NATIVE)} models"
        raise ModelError(str(error), hint=hint) from error
    with torch.device("meta"):
        net = LlamaNet(shape_of(config), config.vocab_size, rules_of(config))
    weights, tensors = Weights(folder, config), {}
    for name, parameter in net.named_parameters():
        if parameter.dim() == 2:
            rows, columns = parameter.shape
            tensors[name] = to_dense(weights.linear(name.removesuffix(".weight"), (rows, columns)))
        else:
            tensors[name] = weights.dense(name, tuple(parameter.shape))
    weights.refuse_leftovers()
    if rotation := load_rotation(folder, raw):
        tensors = turned_back(tensors, rotation)
    net.load_state_dict({name: tensor.to(device) for name, tensor in tensors.items()}, assign=True)
    return net.requires_grad_(False)


def turned_back(tensors: Mapping[str, torch.Tensor], by: ResidualRotation) -> dict[str, torch.Tensor]:
    """The weights of a rotated model (see `models.rotation`) in its parent's basis: what reads the residual stream is
    turned along its inputs, what writes to it along its outputs, and the final norm has the parent's weight again."""
    undo, result = by.rotation.undo, dict(tensors)
    for name, tensor in tensors.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            result[name] = undo(tensor.T).T.contiguous()
        elif tensor.dim() == 2 or name.endswith(("o_proj.bias", "down_proj.bias")):
            result[name] = undo(tensor)
    # A channel that the norm silences has no part in any logit.
    inverse = torch.where(by.final_norm == 0, 0.0, 1 / by.final_norm)
    return result | {"lm_head.weight": result["lm_head.weight"] * inverse, "model.norm.weight": by.final_norm}


def fake_quantize(weight: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """What `weight` [N, K] is worth after rounding to nearest as it would be stored (bf16, then codes)."""
    return dequantize(quantize(weight.detach().bfloat16().float(), scheme))
