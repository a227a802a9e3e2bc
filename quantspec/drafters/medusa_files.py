"""Medusa heads on disk, in both published layouts, and writing them in one.

FasterDecoding's (``medusa_lm_head.safetensors``; elsewhere ``model.safetensors``): ``{head}.{layer}.linear.weight``
and ``.bias``, then ``{head}.{layers}.weight``, perhaps behind ``medusa_head.``; its config gives counts alone, so the
tensors tell the sizes. vLLM's: ``blocks.{head}.layers.{layer}.weight``, ``lm_heads.{head}.weight`` (or one
``lm_head.weight`` for all), perhaps behind ``medusa_heads.``, and ``token_map``: target ids of a smaller vocabulary.
Here tensors go by vLLM's names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantspec.drafters.head_keys import architectures, read_flag, read_own, read_size, refuse_unknown_keys
from quantspec.drafters.head_tensors import HeadStore, HeadTensors
from quantspec.drafters.tau import read_taus
from quantspec.errors import ModelError
from quantspec.models import atomic
from quantspec.models.config import read_config

ARCHITECTURE = "MedusaModel"
_WEIGHTS = "medusa_lm_head.safetensors"
_COUNTS = {"heads": ("medusa_num_heads", "num_heads"), "layers": ("medusa_num_layers", "num_hidden_layers")}
_KEYS = {
    *(key for keys in _COUNTS.values() for key in keys), "base_model_name_or_path", "version", "hidden_size",
    "vocab_size", "truncated_vocab_size", "medusa_fc_bias", "original_lm_head", "logit_scale", "max_paths", "topk",
    "max_seq_len", "quantspec", "quantization_config",
}  # fmt: skip
_OWN_KEYS = {"tau", "base", "label"}
_BLOCK = re.compile(r"(\d+)\.(\d+)\.linear\.(weight|bias)")
_LM_HEAD = re.compile(r"(\d+)\.(\d+)\.weight")


@dataclass(frozen=True, slots=True)
class MedusaConfig:
    """Shape of the heads: ``layers`` residual layers each, then ``lm_rows`` rows of an LM head, ``shared`` by all or
    not; ``tau`` see ``tau.tau_at``."""

    heads: int
    layers: int
    hidden_size: int
    vocab_size: int
    draft_vocab_size: int
    biased: bool = True
    shared: bool = False
    tau: Mapping[float, float] = field(default_factory=dict)
    base: str | None = None
    """The weights of the target that they were trained on, for people."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor the heads must have, besides ``token_map``."""
        hidden, shapes = self.hidden_size, dict[str, tuple[int, ...]]()
        for head in range(self.heads):
            for layer in range(self.layers):
                shapes[f"blocks.{head}.layers.{layer}.weight"] = (hidden, hidden)
                if self.biased:
                    shapes[f"blocks.{head}.layers.{layer}.bias"] = (hidden,)
            if not self.shared:
                shapes[f"lm_heads.{head}.weight"] = (self.draft_vocab_size, hidden)
        return shapes | ({"lm_head.weight": (self.draft_vocab_size, hidden)} if self.shared else {})


def is_medusa(raw: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of Medusa heads."""
    return raw.get("model_type") == "medusa" or "medusa_num_heads" in raw or ARCHITECTURE in architectures(raw)


def read_medusa_config(folder: Path) -> MedusaConfig:
    """From ``folder/config.json`` and the tensors' sizes. Raises ``ModelError`` for what is unknown or does not fit."""
    return _read(folder)[0]


def read_medusa(folder: Path) -> tuple[MedusaConfig, HeadTensors, Tensor | None]:
    """The heads' configuration; their tensors by the names of ``config.shapes()``; target ids ``[draft_vocab_size]``
    of their vocabulary, None where it is the target's.

    Raises ``ModelError`` for a key of the config or a tensor that has no place, a missing or misshapen tensor, a
    vocabulary map out of range, or a pickle.
    """
    config, store, names = _read(folder)
    shapes = config.shapes()
    for name, stored in names.items():
        if name not in shapes and name != "token_map":
            hint = "is medusa_num_heads or medusa_num_layers wrong, or is it a whole model?"
            raise ModelError(f"{folder}: tensor {stored} has no place in these Medusa heads", hint=hint)
    missing = [name for name in shapes if name not in names]
    if missing:
        raise ModelError(f"{folder} has no tensor {missing[0]}", hint="are these whole Medusa heads?")
    tensors = store.read(names)
    ids = _draft_ids(folder, config, tensors.pop("token_map", None))
    for name, shape in shapes.items():
        found = tuple(tensors[name].shape)
        if ids is not None and name.startswith("lm_head") and found == (config.vocab_size, config.hidden_size):
            tensors[name] = tensors[name][ids]  # vLLM takes rows of a whole LM head, too
            tensors.packed.pop(name, None)
        elif found != shape:
            raise ModelError(f"{folder}: tensor {names[name]} is {list(found)}, but these heads ask for {list(shape)}")
    return config, tensors, ids


def _read(folder: Path) -> tuple[MedusaConfig, HeadStore, dict[str, str]]:
    """The configuration, the store, and the stored name of each tensor."""
    raw, source = read_config(folder), str(folder / "config.json")
    refuse_unknown_keys(raw, _KEYS, source)
    if not is_medusa(raw):
        raise ModelError(f"{source} does not describe Medusa heads")
    if raw.get("logit_scale", 1.0) not in (None, 1.0):
        raise ModelError(f"{source}: logit_scale {raw['logit_scale']!r} is not known here")
    own = read_own(raw, _OWN_KEYS, source)
    heads, layers = (_count(raw, keys, source) for keys in _COUNTS.values())
    store = HeadStore(folder, [folder / _WEIGHTS] if (folder / _WEIGHTS).is_file() else None)
    names = canonical_names(store, layers)
    if len(names) < len(list(store)):
        raise ModelError(f"{folder} has a tensor under two names")
    shared = read_flag(raw, "original_lm_head", source)
    if shared and "lm_heads.0.weight" in names and "lm_head.weight" not in names:
        names["lm_head.weight"] = names.pop("lm_heads.0.weight")
    head = "lm_head.weight" if shared else "lm_heads.0.weight"
    if head not in names:
        raise ModelError(f"{folder} has no tensor {head}", hint="are these whole Medusa heads?")
    rows, width = (*store.shape(names[head]), 0, 0)[:2]
    vocab = read_size(raw, "vocab_size", rows, source)
    config = MedusaConfig(
        heads, layers, read_size(raw, "hidden_size", width, source), vocab,
        read_size(raw, "truncated_vocab_size", vocab, source),
        any(name.endswith(".bias") for name in names), shared, read_taus(own.get("tau", {}), source), own.get("base"),
    )  # fmt: skip
    if raw.get("medusa_fc_bias") is not None and read_flag(raw, "medusa_fc_bias", source) != config.biased:
        raise ModelError(f"{source}: medusa_fc_bias does not go with the tensors")
    return config, store, names


def canonical_names(store: Iterable[str], layers: int) -> dict[str, str]:
    """vLLM's name of each tensor to the one it has in the folder; heads have so many residual ``layers``."""
    names = {}
    for stored in store:
        name = stored.removeprefix("medusa_head.").removeprefix("medusa_heads.")
        if block := _BLOCK.fullmatch(name):
            name = f"blocks.{block[1]}.layers.{block[2]}.{block[3]}"
        elif (lm_head := _LM_HEAD.fullmatch(name)) and int(lm_head[2]) == layers:
            name = f"lm_heads.{lm_head[1]}.weight"
        names[name] = stored
    return names


def _count(raw: Mapping[str, Any], keys: tuple[str, ...], source: str) -> int:
    """A count that may stand under either of two keys."""
    found = {key: raw[key] for key in keys if key in raw}
    if not found:
        raise ModelError(f"{source} has no {keys[0]}")
    for key, value in found.items():
        # Zero layers are LM heads alone.
        if type(value) is not int or not (0 if "layers" in key else 1) <= value <= 1000:
            raise ModelError(f"{source}: {key} must be a small whole number, not {value!r}")
    if len(set(found.values())) > 1:
        raise ModelError(f"{source}: {' and '.join(found)} differ")
    return next(iter(found.values()))


def _draft_ids(folder: Path, config: MedusaConfig, token_map: Tensor | None) -> Tensor | None:
    vocab, size = config.vocab_size, config.draft_vocab_size
    if token_map is None:
        if size != vocab:
            raise ModelError(f"{folder} drafts from {size} of {vocab} tokens but has no token_map that says which")
        return None
    if tuple(token_map.shape) != (size,) or token_map.is_floating_point() or token_map.dtype == torch.bool:
        raise ModelError(
            f"{folder}: token_map must be {size} token ids, not {list(token_map.shape)} of {token_map.dtype}",
            hint="store it as int64, the target's id of each draft token; truncated_vocab_size counts them",
        )
    ids = token_map.long()
    if bool((ids < 0).any() or (ids >= vocab).any()) or len(ids.unique()) < size:
        raise ModelError(
            f"{folder}: token_map names tokens outside the target's {vocab}, or one twice",
            hint="it holds target ids, not offsets as d2t does; was it made with this target's tokenizer?",
        )
    return ids


def save_medusa(out: Path, config: MedusaConfig, tensors: Mapping[str, Tensor], ids: Tensor | None) -> None:
    """Write vLLM's layout; arguments as ``read_medusa`` returns them."""
    own: dict[str, Any] = {"tau": {f"{temperature:g}": tau for temperature, tau in config.tau.items()}}
    if config.base is not None:
        own["base"] = config.base
    settings = {
        "architectures": [ARCHITECTURE],
        "model_type": "medusa",
        "num_heads": config.heads,
        "num_hidden_layers": config.layers,
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "truncated_vocab_size": config.draft_vocab_size,
        "medusa_fc_bias": config.biased,
        "original_lm_head": config.shared,
        "torch_dtype": "bfloat16",
        "quantspec": own,
    }
    maps = {} if ids is None else {"token_map": ids}
    atomic.make_folder(out)
    atomic.write_json(out / "config.json", settings)
    atomic.save_tensors(out / "model.safetensors", {**tensors, **maps})
