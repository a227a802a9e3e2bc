"""The EAGLE-1/2 network (arXiv 2401.15077): one decoder layer that continues a target's features.

Slot i reads the target's feature f_i (after its final norm, the input of its LM head) and the embedding of t_{i+1}, at
rotary position i, and puts out an estimate of f_{i+1}, to which the target's own head is applied to predict t_{i+2}.
``fc`` takes the embedding first; the layer has no input norm and nothing norms its output.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from quantspec.drafters.eagle3_files import draft_ids
from quantspec.drafters.head_keys import LAYER_KEYS, read_own, refuse_unknown_keys
from quantspec.drafters.head_layer import HeadLayer, Weights, fuse_layer, layer_shapes, new_kv
from quantspec.drafters.head_tensors import HeadStore, HeadTensors, Matrix, stored
from quantspec.drafters.tau import read_taus, tau_at
from quantspec.errors import ModelError
from quantspec.kernels.cpu.eagle import EagleKernel
from quantspec.kernels.cpu.packed import pack_any
from quantspec.models.config import ModelConfig, read_config
from quantspec.models.rope import RopeTable
from quantspec.models.weights import to_dense

ARCHITECTURE = "LlamaForCausalLMEagle"
LAYER = "layers.0."
NORM = f"{LAYER}post_attention_layernorm.weight"
TURN = "turn.weight"
"""Not in any checkpoint: ``[H, H]`` that every output goes through last (see ``eagle_rotation``)."""
LM_HEAD, DRAFT_IDS = "lm_head.weight", "draft_ids"
"""Of heads that bring an LM head of their own: their target's, quantized, or with some of its rows alone (FR-Spec,
arXiv 2502.14856). The ids stand in files as ``d2t`` (see ``eagle3_files``)."""
_OWN_KEYS = {"tau", "base", "label", "rotation"}  # "base" is for people: what the head was trained on; so is "label"


@dataclass(frozen=True, slots=True)
class HeadConfig:
    """Shape of the layer, whether ``fc`` has a bias, and ``tau`` by temperature (see ``View.scores``). ``rotation``
    names the target's that its weights were made for (None: for one that is not rotated), ``base`` the weights of the
    target that it was trained on. ``draft_vocab_size``: rows of an LM head of its own, fewer than the target's."""

    model: ModelConfig
    fc_bias: bool
    tau: Mapping[float, float]
    rotation: str | None = None
    base: str | None = None
    draft_vocab_size: int | None = None

    @classmethod
    def load(cls, folder: Path) -> HeadConfig:
        """Read ``folder/config.json``: a one-layer Llama, as in published heads, plus our own section ``quantspec``."""
        raw, source = read_config(folder), str(folder / "config.json")
        if any("eagle3" in str(name).lower() for name in raw.get("architectures") or ()):
            raise ModelError(f"{source} describes an EAGLE-3 head", hint="it has a loader of its own: method eagle3")
        refuse_unknown_keys(raw, LAYER_KEYS | {"bias", "quantspec", "draft_vocab_size"}, source)
        model = ModelConfig.of({"model_type": "llama", **raw}, source)
        if model.num_layers != 1 or model.qk_norm or model.o_bias or model.mlp_bias or any(model.windows):
            raise ModelError(
                f"{source} does not describe an EAGLE-1 or EAGLE-2 head (one plain Llama layer)",
                hint="EAGLE-3 heads of more layers are known by their architecture, LlamaForCausalLMEagle3",
            )
        own = read_own(raw, _OWN_KEYS, source)
        size = raw.get("draft_vocab_size")
        if size is not None and (type(size) is not int or not 0 < size <= model.vocab_size):
            raise ModelError(f"{source}: draft_vocab_size must be from 1 to {model.vocab_size}, not {size!r}")
        taus = read_taus(own.get("tau", {}), source)
        return cls(model, bool(raw.get("bias", True)), taus, own.get("rotation"), own.get("base"), size)

    def tau_at(self, temperature: float) -> float:
        """See ``tau.tau_at``."""
        return tau_at(self.tau, temperature)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor a head must have."""
        hidden = self.model.hidden_size
        fc: dict[str, tuple[int, ...]] = {"fc.weight": (hidden, 2 * hidden)}
        if self.fc_bias:
            fc["fc.bias"] = (hidden,)
        return fc | layer_shapes(self.model, LAYER, hidden)


def read_head(folder: Path) -> tuple[HeadConfig, HeadTensors]:
    """A head's configuration and its tensors by checkpoint name: exactly ``config.shapes()``, perhaps
    ``embed_tokens.weight``, and where the head brings an LM head, ``LM_HEAD`` and the target ids ``DRAFT_IDS`` of its
    rows, if these are not all. Raises ``ModelError`` for a missing, unused or misshapen tensor, or a pickle."""
    config, store = HeadConfig.load(folder), HeadStore(folder)
    shapes, model = config.shapes(), config.model
    if "embed_tokens.weight" in store:
        shapes["embed_tokens.weight"] = (model.vocab_size, model.hidden_size)
    if LM_HEAD in store or config.draft_vocab_size is not None:
        shapes[LM_HEAD] = (config.draft_vocab_size or model.vocab_size, model.hidden_size)
    maps = [name for name in ("d2t", "t2d") if name in store and LM_HEAD in shapes]
    for name in store:
        if name not in shapes and name not in maps:
            raise ModelError(f"{folder}: tensor {name} has no place in an EAGLE head", hint="is it EAGLE-1 or -2?")
    for name, shape in shapes.items():
        if store.shape(name) != shape:
            found, asked = list(store.shape(name)), list(shape)
            raise ModelError(f"{folder}: tensor {name} is {found}, but config.json asks for {asked}")
    tensors = store.read({name: name for name in shapes})
    if LM_HEAD in shapes:
        ids = draft_ids(folder, len(tensors[LM_HEAD]), model.vocab_size, store.read({name: name for name in maps}))
        if ids is not None:
            tensors[DRAFT_IDS] = ids
    return config, tensors


def fuse_head(config: HeadConfig, tensors: Mapping[str, Tensor]) -> Weights:
    """Weight and bias of each matmul; q, k and v, and gate and up, are one."""
    return {"fc": (stored(tensors, "fc.weight"), tensors.get("fc.bias"))} | fuse_layer(config.model, tensors, LAYER)


class EagleHead:
    """The network: see ``feature_tree.Network``."""

    def __init__(
        self, config: HeadConfig, tensors: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype
    ) -> None:
        """``tensors`` as ``read_head`` or ``eagle_rotation.read_head_for`` returns them."""
        self.config, self.width, self._device, self._dtype = config, config.model.hidden_size, device, dtype
        turn = tensors.get(TURN)
        self._turn = None if turn is None else turn.to(device, dtype)
        own = tensors.get("embed_tokens.weight")
        self.embed_weight = None if own is None else own.to(device, dtype)
        self.ids = None if DRAFT_IDS not in tensors else tensors[DRAFT_IDS].to(device)
        self.lm_head = self._linear(stored(tensors, LM_HEAD)) if LM_HEAD in tensors else None
        self.rope = RopeTable(config.model.rope, config.model.head_dim, device, dtype)
        self._take(fuse_head(config, tensors), tensors[NORM])

    def _linear(self, weight: Matrix) -> Callable[[Tensor], Tensor]:
        held = to_dense(weight).to(self._device, self._dtype)
        return lambda x: F.linear(x, held)

    def _take(self, weights: Weights, norm: Tensor) -> None:
        weight, bias = weights["fc"]
        self.fc_weight = to_dense(weight).to(self._device, self._dtype)
        self.fc_bias = None if bias is None else bias.to(self._device, self._dtype)
        self.layer = HeadLayer(self.config.model, weights, norm, self._device, self._dtype)

    def new_kv(self, capacity: int) -> Tensor:
        """Zeroed keys and values, ``[2, kv_heads, capacity, head_dim]``."""
        return new_kv(self.config.model, capacity, self._device, self._dtype)

    def forward(
        self, features: Tensor, embeddings: Tensor, positions: slice, kv: Tensor, start: int, bias: Tensor
    ) -> Tensor:
        """See ``feature_tree.Network``."""
        x = F.linear(torch.cat((embeddings, features), dim=1), self.fc_weight, self.fc_bias)
        self.rope.grow(positions.stop)
        cos, sin = self.rope.cos[positions], self.rope.sin[positions]
        return self._turned(self.layer.forward(x, x, cos, sin, kv, start, bias))

    def _turned(self, outputs: Tensor) -> Tensor:
        return outputs if self._turn is None else F.linear(outputs, self._turn)


class NativeEagleHead(EagleHead):
    """The same on the CPU kernels: one call, weights as the checkpoint has them."""

    _integer = False

    def _linear(self, weight: Matrix) -> Callable[[Tensor], Tensor]:
        return pack_any(weight, integer=self._integer)

    def _take(self, weights: Weights, norm: Tensor) -> None:
        model = self.config.model
        self._kernel = EagleKernel(
            weights, norm, eps=model.rms_norm_eps, heads=model.num_heads, kv_heads=model.num_kv_heads,
            head_dim=model.head_dim, integer=self._integer,
        )  # fmt: skip

    def forward(
        self, features: Tensor, embeddings: Tensor, positions: slice, kv: Tensor, start: int, bias: Tensor
    ) -> Tensor:
        self.rope.grow(positions.stop)
        cos, sin = self.rope.cos[positions], self.rope.sin[positions]
        return self._turned(self._kernel(features, embeddings, cos, sin, kv, start, bias))


class IntegerEagleHead(NativeEagleHead):
    """With int8 activations, where the weights are quantized: beside a target that has them too."""

    _integer = True
