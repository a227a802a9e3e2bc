"""The EAGLE-1/2 network (arXiv 2401.15077): one decoder layer that continues a target's features.

Slot i reads the target's feature f_i (after its final norm, the input of its LM head) and the embedding of t_{i+1}, at
rotary position i, and puts out an estimate of f_{i+1}, to which the target's own head is applied to predict t_{i+2}.
``fc`` takes the embedding first; the layer has no input norm and nothing norms its output.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from quantspec.errors import ModelError
from quantspec.kernels.cpu.eagle import EagleKernel
from quantspec.models.config import ModelConfig, read_config
from quantspec.models.rope import RopeTable
from quantspec.models.tensors import TensorStore

ARCHITECTURE = "LlamaForCausalLMEagle"
LAYER = "layers.0."
NORM = f"{LAYER}post_attention_layernorm.weight"
TURN = "turn.weight"
"""Not in any checkpoint: ``[H, H]`` that every output goes through last (see ``eagle_rotation``)."""
_OWN_KEYS = {"tau", "base", "rotation"}  # "base" is for people: what the head was trained on


@dataclass(frozen=True, slots=True)
class HeadConfig:
    """Shape of the layer, whether ``fc`` has a bias, and ``tau`` by temperature (see ``View.scores``). ``rotation``
    names the target's that its weights were made for (None: for one that is not rotated)."""

    model: ModelConfig
    fc_bias: bool
    tau: Mapping[float, float]
    rotation: str | None = None

    @classmethod
    def load(cls, folder: Path) -> HeadConfig:
        """Read ``folder/config.json``: a one-layer Llama, as in published heads, plus our own section ``quantspec``."""
        raw, source = read_config(folder), str(folder / "config.json")
        model = ModelConfig.of({"model_type": "llama", **raw}, source)
        own = raw.get("quantspec", {})
        if model.num_layers != 1 or model.qk_norm or model.o_bias or model.mlp_bias or any(model.windows):
            raise ModelError(
                f"{source} does not describe an EAGLE-1 or EAGLE-2 head (one plain Llama layer)",
                hint="other families, such as EAGLE-3, are not supported yet",
            )
        if not isinstance(own, dict) or own.keys() - _OWN_KEYS:
            raise ModelError(f"{source}: the section quantspec may only have {', '.join(sorted(_OWN_KEYS))}")
        return cls(model, bool(raw.get("bias", True)), _taus(own.get("tau", {}), source), own.get("rotation"))

    def tau_at(self, temperature: float) -> float:
        """Linear between the fitted temperatures, constant beyond them, 1 where none was fitted."""
        points = sorted(self.tau.items())
        below = [point for point in points if point[0] <= temperature]
        above = [point for point in points if point[0] >= temperature]
        if not points:
            return 1.0
        if not below or not above:
            return (below or above)[-1 if below else 0][1]
        (t0, tau0), (t1, tau1) = below[-1], above[0]
        return tau0 if t1 == t0 else tau0 + (tau1 - tau0) * (temperature - t0) / (t1 - t0)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor a head must have."""
        model, layer = self.model, LAYER
        hidden, mlp = model.hidden_size, model.intermediate_size
        widths = {"q": model.num_heads * model.head_dim, "k": model.num_kv_heads * model.head_dim}
        widths["v"] = widths["k"]
        shapes: dict[str, tuple[int, ...]] = {"fc.weight": (hidden, 2 * hidden)}
        if self.fc_bias:
            shapes["fc.bias"] = (hidden,)
        for name, width in widths.items():
            shapes[f"{layer}self_attn.{name}_proj.weight"] = (width, hidden)
            if model.qkv_bias:
                shapes[f"{layer}self_attn.{name}_proj.bias"] = (width,)
        return shapes | {
            f"{layer}self_attn.o_proj.weight": (hidden, widths["q"]),
            f"{layer}mlp.gate_proj.weight": (mlp, hidden),
            f"{layer}mlp.up_proj.weight": (mlp, hidden),
            f"{layer}mlp.down_proj.weight": (hidden, mlp),
            NORM: (hidden,),
        }


def _taus(raw: Any, source: str) -> dict[float, float]:
    try:
        taus = {float(temperature): float(tau) for temperature, tau in raw.items()}
    except (AttributeError, TypeError, ValueError):
        taus = {0.0: 0.0}
    if not all(temperature >= 0 and 0 < tau < float("inf") for temperature, tau in taus.items()):
        raise ModelError(f"{source}: quantspec.tau must map temperatures to numbers above 0, not {raw!r}")
    return taus


Weights = dict[str, tuple[Tensor, Tensor | None]]


def read_head(folder: Path) -> tuple[HeadConfig, dict[str, Tensor]]:
    """A head's configuration and its tensors by checkpoint name: exactly ``config.shapes()`` and perhaps
    ``embed_tokens.weight``. Raises ``ModelError`` for a missing, unused or misshapen tensor, or a pickle."""
    config, store = HeadConfig.load(folder), TensorStore(folder)
    shapes = config.shapes()
    if "embed_tokens.weight" in store:
        shapes["embed_tokens.weight"] = (config.model.vocab_size, config.model.hidden_size)
    for name in store.keys():  # noqa: SIM118 - a TensorStore is not a dict
        if name not in shapes:
            raise ModelError(f"{folder}: tensor {name} has no place in an EAGLE head", hint="is it EAGLE-1 or -2?")
    for name, shape in shapes.items():
        if store.shape(name) != shape:
            found, asked = list(store.shape(name)), list(shape)
            raise ModelError(f"{folder}: tensor {name} is {found}, but config.json asks for {asked}")
    return config, {name: store.get(name) for name in shapes}


def fuse_head(config: HeadConfig, tensors: Mapping[str, Tensor]) -> Weights:
    """Weight and bias of each matmul; q, k and v, and gate and up, are one."""
    attention = [f"{LAYER}self_attn.{name}_proj" for name in ("q", "k", "v")]
    qkv_bias = torch.cat([tensors[f"{name}.bias"] for name in attention]) if config.model.qkv_bias else None
    return {
        "fc": (tensors["fc.weight"], tensors.get("fc.bias")),
        "qkv": (torch.cat([tensors[f"{name}.weight"] for name in attention]), qkv_bias),
        "o": (tensors[f"{LAYER}self_attn.o_proj.weight"], None),
        "gate_up": (torch.cat([tensors[f"{LAYER}mlp.{name}_proj.weight"] for name in ("gate", "up")]), None),
        "down": (tensors[f"{LAYER}mlp.down_proj.weight"], None),
    }


class EagleHead:
    """The network, in plain batched operations: no text depends on a drafter, so its rows need no fixed bits."""

    def __init__(
        self, config: HeadConfig, tensors: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype
    ) -> None:
        """``tensors`` as ``read_head`` or ``eagle_rotation.read_head_for`` returns them."""
        self.config, self._device, self._dtype = config, device, dtype
        turn = tensors.get(TURN)
        self._turn = None if turn is None else turn.to(device, dtype)
        own = tensors.get("embed_tokens.weight")
        self.embed_weight = None if own is None else own.to(device, dtype)
        self.rope = RopeTable(config.model.rope, config.model.head_dim, device, dtype)
        self._take(fuse_head(config, tensors), tensors[NORM])

    def _take(self, weights: Weights, norm: Tensor) -> None:
        moved = {
            name: (weight.to(self._device, self._dtype), None if bias is None else bias.to(self._device, self._dtype))
            for name, (weight, bias) in weights.items()
        }
        model = self.config.model
        scale = torch.ones(moved["qkv"][0].shape[0], 1).to(moved["qkv"][0])
        scale[: model.num_heads * model.head_dim] = model.head_dim**-0.5  # of the softmax, folded into the queries
        (self.fc_weight, self.fc_bias), (qkv, qkv_bias) = moved["fc"], moved["qkv"]
        self.qkv, self.qkv_bias = qkv * scale, None if qkv_bias is None else qkv_bias * scale[:, 0]
        self.o_proj, self.gate_up, self.down = moved["o"][0], moved["gate_up"][0], moved["down"][0]
        self.norm = norm.to(self._device, self._dtype)

    def new_kv(self, capacity: int) -> Tensor:
        """Zeroed keys and values, ``[2, kv_heads, capacity, head_dim]``."""
        model = self.config.model
        shape = (2, model.num_kv_heads, capacity, model.head_dim)
        return torch.zeros(shape, device=self._device, dtype=self._dtype)

    def forward(
        self, features: Tensor, embeddings: Tensor, positions: slice, kv: Tensor, start: int, bias: Tensor
    ) -> Tensor:
        """Outputs ``[m, H]`` of m slots, whose keys and values go to ``kv`` slots ``start`` on.

        ``features [m, H]`` and ``embeddings [m, H]`` are the inputs; ``positions`` spans m rotary positions, or one
        that all share. ``bias [m, w]`` is added to the scores of the last w slots (0 to see one, -inf not to); every
        slot before those is seen by all.
        """
        model = self.config.model
        m, kv_heads, end = features.shape[0], model.num_kv_heads, start + features.shape[0]
        x = F.linear(torch.cat((embeddings, features), dim=1), self.fc_weight, self.fc_bias)
        qkv = F.linear(x, self.qkv, self.qkv_bias).view(m, -1, model.head_dim)
        qk = qkv[:, : model.num_heads + kv_heads]
        self.rope.grow(positions.stop)
        cos, sin = self.rope.cos[positions, None], self.rope.sin[positions, None]
        qk = qk * cos + qk.roll(model.head_dim // 2, -1) * sin
        kv[0, :, start:end] = qk[:, model.num_heads :].transpose(0, 1)
        kv[1, :, start:end] = qkv[:, model.num_heads + kv_heads :].transpose(0, 1)

        # Query heads that share a key-value head are rows of one matrix: [kv_heads, m * group, head_dim].
        q = qk[:, : model.num_heads].reshape(m, kv_heads, -1, model.head_dim).transpose(0, 1)
        scores = q.flatten(1, 2) @ kv[0, :, :end].transpose(1, 2)
        by_row = scores.view(kv_heads, m, -1, end)
        by_row[..., end - bias.shape[1] :] += bias[:, None]
        mixed = (scores.softmax(-1) @ kv[1, :, :end]).view(kv_heads, m, -1, model.head_dim)
        x = x + F.linear(mixed.transpose(0, 1).reshape(m, -1), self.o_proj)
        gate, up = F.linear(F.rms_norm(x, self.norm.shape, self.norm, model.rms_norm_eps), self.gate_up).chunk(2, dim=1)
        return self._turned(x + F.linear(F.silu(gate) * up, self.down))

    def _turned(self, outputs: Tensor) -> Tensor:
        return outputs if self._turn is None else F.linear(outputs, self._turn)


class NativeEagleHead(EagleHead):
    """The same on the CPU kernels: one call, weights in the checkpoint's own type."""

    def _take(self, weights: Weights, norm: Tensor) -> None:
        model = self.config.model
        self._kernel = EagleKernel(
            weights, norm, eps=model.rms_norm_eps, heads=model.num_heads, kv_heads=model.num_kv_heads,
            head_dim=model.head_dim,
        )  # fmt: skip

    def forward(
        self, features: Tensor, embeddings: Tensor, positions: slice, kv: Tensor, start: int, bias: Tensor
    ) -> Tensor:
        self.rope.grow(positions.stop)
        cos, sin = self.rope.cos[positions], self.rope.sin[positions]
        return self._turned(self._kernel(features, embeddings, cos, sin, kv, start, bias))
