"""The kinds of heads that can be quantized: how each is read, and a forward over text in which the inputs of its linear
layers can be observed. A new kind is one class here.

Nets are those that heads are trained in: their parameters have the names of checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from quantspec.calibrate.quantize.layer import STAGES
from quantspec.calibrate.train.checkpoint import shape_of
from quantspec.calibrate.train.config import Shape
from quantspec.calibrate.train.methods.eagle import EagleHead
from quantspec.calibrate.train.methods.eagle3_net import Eagle3Net, Flags
from quantspec.calibrate.train.methods.medusa import Block, MedusaNet
from quantspec.calibrate.train.methods.peagle_net import PEagleNet
from quantspec.calibrate.train.methods.peagle_rows import AnchoredMask
from quantspec.calibrate.train.net import LlamaNet
from quantspec.drafters.eagle3_files import canonical, is_eagle3, read_eagle3
from quantspec.drafters.eagle3_head import Eagle3Config
from quantspec.drafters.eagle_head import DRAFT_IDS, LM_HEAD, read_head
from quantspec.drafters.medusa_files import canonical_names, is_medusa, read_medusa
from quantspec.drafters.peagle_files import is_peagle, read_peagle
from quantspec.errors import ModelError
from quantspec.models.config import ModelConfig, read_config
from quantspec.models.tensors import TensorStore

STEPS = 3
"""Draft steps that inputs are observed in: later ones read what the head itself put out."""
_HEAD, _EMBEDDING = "lm_head", "embed_tokens.weight"


class Head(Protocol):
    """A head in memory. ``net`` has its dense weights in fp32; ``ids`` are the target ids of its vocabulary (None: all
    of the target's ``vocab``); linear layers of one ``stages`` entry read the same input and run in that order."""

    net: nn.Module
    ids: Tensor | None
    vocab: int
    width: int
    stages: list[tuple[str, ...]]

    @property
    def lm_stages(self) -> list[tuple[str, ...]]:
        """Its own LM heads, run last; none where it borrows its target's."""

    @property
    def lm_head(self) -> nn.Linear | None:
        """The one LM head whose rows may be dropped."""

    @property
    def companions(self) -> list[str]:
        """Tensors of the net that have a row for each of that LM head's, and lose the same ones."""

    def names(self, stored: list[str]) -> dict[str, str]:
        """Names of its net's tensors to those in the folder that has ``stored``."""

    def inputs(self, base: LlamaNet, ids: Tensor) -> list[Tensor]:
        """What the target gives it on ``ids [1, T]``, whatever its own weights are."""

    def observe(self, ids: Tensor, inputs: list[Tensor]) -> None:
        """A forward of the drafts that begin at every token of ``ids [1, T]``."""


def is_head(folder: Path) -> bool:
    """Whether a folder holds a head that can be quantized. (Published EAGLE-1 and -2 heads call themselves Llamas.)"""
    if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        return False
    raw = read_config(folder)
    return (
        is_medusa(raw)
        or is_peagle(raw)
        or is_eagle3(raw)
        or any(name.startswith("fc.weight") for name in TensorStore(folder))
    )


def open_head(folder: Path, raw: Mapping[str, Any]) -> Head:
    """Raises ``ModelError`` as the kind's own loader does."""
    if is_medusa(raw):
        return Medusa(folder)
    if is_peagle(raw):
        return PEagle(folder)
    return Eagle3(folder) if is_eagle3(raw) else Eagle(folder)


class _OneLmHead:
    """What the EAGLE kinds share."""

    net: nn.Module

    @property
    def lm_head(self) -> nn.Linear | None:
        return getattr(self.net, _HEAD, None)

    @property
    def lm_stages(self) -> list[tuple[str, ...]]:
        return [] if self.lm_head is None else [(_HEAD,)]

    @property
    def companions(self) -> list[str]:
        return []

    def names(self, stored: list[str]) -> dict[str, str]:
        return {canonical(name): name for name in stored}


class Eagle(_OneLmHead):
    """EAGLE-1 and -2: see ``Head``."""

    def __init__(self, folder: Path) -> None:
        config, tensors = read_head(folder)
        if config.rotation is not None:
            raise ModelError(f"{folder} was made for a rotated target", hint="quantize the head that it was made from")
        model = config.model
        self.width, self.vocab = model.hidden_size, model.vocab_size
        self.ids, self._embedding = tensors.pop(DRAFT_IDS, None), tensors.pop(_EMBEDDING, None)
        net = EagleHead(_shape(folder, model))
        if not config.fc_bias:
            net.fc.bias.data.zero_()
        lm_head = tensors.pop(LM_HEAD, None)
        _fill(net, tensors)
        self.net: nn.Module = net
        if lm_head is not None:
            self.borrow(lm_head)
        self.stages = [("fc",), *_layer_stages(1)]

    def borrow(self, weight: Tensor) -> None:
        """Give it an LM head of its own, ``weight [V, H]`` of its target."""
        self.net.lm_head = _linear(weight)

    def inputs(self, base: LlamaNet, ids: Tensor) -> list[Tensor]:
        return [_embedded(base, self._embedding, ids[:, 1:]), base.features(ids)[:, :-1]]

    def observe(self, ids: Tensor, inputs: list[Tensor]) -> None:
        embedded, features = inputs
        for output in cast(EagleHead, self.net).unrolled(embedded, features, STEPS):
            if self.lm_head is not None:
                self.lm_head(output)


class Eagle3(_OneLmHead):
    """EAGLE-3 and 3.1: see ``Head``."""

    def __init__(self, folder: Path) -> None:
        self._take(folder, *self._read(folder))

    def _read(self, folder: Path) -> tuple[Eagle3Config, dict[str, Tensor], Tensor | None]:
        return read_eagle3(folder)

    def _take(self, folder: Path, config: Eagle3Config, tensors: dict[str, Tensor], ids: Tensor | None) -> None:
        self._folder, self.config, self.ids = folder, config, ids
        self.width, self.vocab = config.target_hidden_size, config.model.vocab_size
        self._embedding = self._own_embedding(tensors)
        self._net = self._new_net(_shape(folder, config.model))
        self.net: nn.Module = self._net
        _fill(self._net, tensors)
        self.stages = [("fc",), *_layer_stages(config.model.num_layers)]

    def _own_embedding(self, tensors: dict[str, Tensor]) -> Tensor | None:
        return tensors.pop(_EMBEDDING, None)

    def _new_net(self, shape: Shape) -> Eagle3Net:
        config = self.config
        flags = Flags(**dict.fromkeys(config.flags, True))
        return Eagle3Net(shape, config.target_hidden_size, config.streams, config.draft_vocab_size, flags)

    def _streams(self, base: LlamaNet, ids: Tensor) -> list[Tensor]:
        taps = self.config.taps_of(base.shape.layers)
        assert taps is not None, "the base says how many layers it has"
        deepest = max((tap for tap in taps if isinstance(tap, int)), default=0)
        if deepest >= base.shape.layers:
            raise ModelError(f"{self._folder} reads its target after layer {deepest}, beyond --target's last")
        streams = base.streams(ids, taps)
        return [streams[tap][:, :-1] for tap in taps]

    def inputs(self, base: LlamaNet, ids: Tensor) -> list[Tensor]:
        return [_embedded(base, self._embedding, ids[:, 1:]), *self._streams(base, ids)]

    def observe(self, ids: Tensor, inputs: list[Tensor]) -> None:
        embedded, *streams = inputs
        slots = torch.arange(ids.shape[1] - 1, device=ids.device)[None]
        for output in self._net.unrolled(embedded, self._net.fuse(streams), STEPS, slots):
            self._net.lm_head(output)


class PEagle(Eagle3):
    """P-EAGLE: see ``Head``."""

    def _read(self, folder: Path) -> tuple[Eagle3Config, dict[str, Tensor], Tensor | None]:
        config, tensors, ids = read_peagle(folder)
        self._mask_token, self._rank = config.mask_token_id, config.path_rank
        return config.head, tensors, ids

    @property
    def companions(self) -> list[str]:
        """Its path network stays as it is but for them: it is small."""
        return ["path.lm_head.weight"] if self._rank else []

    def _own_embedding(self, tensors: dict[str, Tensor]) -> None:
        """It is the net's."""

    def _new_net(self, shape: Shape) -> Eagle3Net:
        config = self.config
        flags = Flags(**dict.fromkeys(config.flags, True))
        return PEagleNet(
            shape, config.target_hidden_size, config.streams, config.draft_vocab_size, flags, self.vocab,
            self._mask_token, self._rank,
        )  # fmt: skip

    def inputs(self, base: LlamaNet, ids: Tensor) -> list[Tensor]:
        return self._streams(base, ids)

    def observe(self, ids: Tensor, inputs: list[Tensor]) -> None:
        count = ids.shape[1] - 1
        elements = torch.arange(count * STEPS, device=ids.device)[None]
        mask = AnchoredMask(count, STEPS).of(elements)
        self._net.lm_head(self._net(ids[:, 1:], inputs, elements, STEPS, mask))


class Medusa:
    """Medusa heads: see ``Head``. The target ids of their vocabulary stay as they are in the folder."""

    ids: Tensor | None = None
    lm_head: nn.Linear | None = None

    def __init__(self, folder: Path) -> None:
        self.companions = list[str]()
        self.config, tensors, _ = read_medusa(folder)
        config = self.config
        self.width, self.vocab = config.hidden_size, config.vocab_size
        shared = tensors.pop(LM_HEAD, None)
        rows = torch.empty(1 if config.shared else config.draft_vocab_size, config.hidden_size)
        self._net = MedusaNet(rows, config.heads, config.layers)
        self.net: nn.Module = self._net
        if not config.biased:
            for block in self._net.blocks:
                for layer in cast(Block, block).layers:
                    cast(nn.Linear, layer).bias.data.zero_()
        if shared is not None:
            self._net.lm_heads = nn.ModuleList()
            self._net.add_module(_HEAD, _linear(shared))
        _fill(self._net, tensors)
        self.stages: list[tuple[str, ...]] = [
            (f"blocks.{head}.layers.{i}",) for head in range(config.heads) for i in range(config.layers)
        ]

    @property
    def lm_stages(self) -> list[tuple[str, ...]]:
        return [(_HEAD,)] if self.config.shared else [(f"lm_heads.{head}",) for head in range(self.config.heads)]

    def names(self, stored: list[str]) -> dict[str, str]:
        return canonical_names(stored, self.config.layers)

    def inputs(self, base: LlamaNet, ids: Tensor) -> list[Tensor]:
        return [base.features(ids)]

    def observe(self, ids: Tensor, inputs: list[Tensor]) -> None:
        for head, block in enumerate(self._net.blocks):
            lm_head = self._net.get_submodule(self.lm_stages[0 if self.config.shared else head][0])
            lm_head(block(inputs[0]))


def _layer_stages(layers: int) -> list[tuple[str, ...]]:
    return [tuple(f"layers.{i}.{name}" for name in stage) for i in range(layers) for stage in STAGES]


def _shape(folder: Path, model: ModelConfig) -> Shape:
    """Raises ``ModelError`` for what nets do not have. (They know no scaling of rotary frequencies: inputs, which are
    all that is taken from them, change little.)"""
    if model.qkv_bias:
        raise ModelError(f"{folder} has biases in its attention: heads with them are not quantized")
    return shape_of(model)


def _fill(net: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    missing, unexpected = net.load_state_dict({k: v.float() for k, v in tensors.items()}, strict=False)
    assert all(name.endswith(("bias", LM_HEAD)) for name in missing), "the loader checked them"
    assert not unexpected, "the loader checked them"
    net.requires_grad_(False)


def _linear(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.float(), requires_grad=False)
    return linear


def _embedded(base: LlamaNet, own: Tensor | None, ids: Tensor) -> Tensor:
    return base.model.embed_tokens(ids) if own is None else own.to(ids.device)[ids].float()
