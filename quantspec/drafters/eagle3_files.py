"""EAGLE-3 heads on disk, in every published layout, and writing them in two.

Flat: the published heads of the paper's authors, AngelSlim's and SpecForge's (``midlayer.*``), ModelOpt's
(``layers.0.*``). speculators: layers numbered, and the layers' config nested. Weights are the same under either name.
``d2t`` holds offsets (target id = i + d2t[i]), ``t2d`` which target tokens can be drafted.

Layer ids are written in two ways that name the same streams: by the layer that a stream enters (top level, speculators)
or by the one it leaves (inside ``eagle_config``: SpecForge, ModelOpt). Read one for the other, acceptance dies in
silence, so both become taps here: 0-based layers *after* which the stream is read. A list inside ``eagle_config`` that
begins with 2 is of the first way, as SGLang takes it too.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantspec.drafters.eagle3_head import FLAGS, Eagle3Config
from quantspec.drafters.head_keys import (
    LAYER_KEYS,
    OTHER_KEYS,
    architectures,
    read_flag,
    read_own,
    read_size,
    refuse_unknown_keys,
)
from quantspec.drafters.head_tensors import HeadStore, HeadTensors
from quantspec.drafters.tau import read_taus
from quantspec.errors import ModelError
from quantspec.models import atomic
from quantspec.models.config import ModelConfig, read_config
from quantspec.types import Tap

ARCHITECTURE, SPECULATOR = "LlamaForCausalLMEagle3", "Eagle3Speculator"
_ARCHITECTURES = (
    ARCHITECTURE,
    SPECULATOR,
    "Eagle3LlamaForCausalLM",
    "LlamaEagle3DraftModel",
    "LlamaForCausalLMEagle3Deep",
)
_IDS = "eagle_aux_hidden_state_layer_ids"
_MISSING = {
    "mask_hidden": "a P-EAGLE head brings what stands for streams not seen yet; if it is a plain EAGLE-3 head, take "
    "mask token and parallel_drafting out of its config.json",
}
"""Tensor to the hint where it is not there."""
_OWN_KEYS = {"tau", "base", "label"}
_FLAT_KEYS = {"draft_vocab_size", "target_hidden_size", "eagle_config", _IDS, "quantspec", *FLAGS}
_SPECULATORS_KEYS = {
    "speculators_model_type", "speculators_version", "speculators_config", "transformer_layer_config",
    "embed_requires_grad", "draft_vocab_size", "target_hidden_size", _IDS, "quantspec", *FLAGS,
}  # fmt: skip
_EAGLE_CONFIG: dict[str, tuple[Any, ...]] = {
    "use_aux_hidden_state": (True,),
    "use_input_layernorm_in_first_layer": (True,),
    "use_last_layernorm": (True,),
    "use_mtp_layernorm": (False,),
    "next_layer_regular": (True,),
    "parallel_draft_step": (1,),
    "parallel_draft_heads_num_layers": (),
}
"""What ModelOpt writes beside the layer ids, and the values that make an EAGLE-3 head (or None)."""


def is_eagle3(raw: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of an EAGLE-3 head."""
    named = any(name in _ARCHITECTURES for name in architectures(raw))
    return raw.get("speculators_model_type") == "eagle3" or named


def read_eagle3(folder: Path) -> tuple[Eagle3Config, dict[str, Tensor], Tensor | None]:
    """A head's configuration; its tensors by the names of ``config.shapes()`` and perhaps ``embed_tokens.weight``; the
    target ids ``[draft_vocab_size]`` of its vocabulary, ascending, None where it is the target's.

    Raises ``ModelError`` for a key of the config or a tensor that has no place, a missing or misshapen tensor, a
    vocabulary map out of range, or a pickle.
    """
    config = read_eagle3_config(folder)
    return config, *read_head_tensors(folder, config, config.shapes())


def read_head_tensors(
    folder: Path, config: Eagle3Config, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[HeadTensors, Tensor | None]:
    """Tensors and target ids of a head that must have exactly ``shapes``, and may have ``embed_tokens.weight``; see
    ``read_eagle3``."""
    store, shapes = HeadStore(folder), dict(shapes)
    names = {canonical(name): name for name in store}
    if len(names) < len(list(store)):
        raise ModelError(f"{folder} has its first layer both as midlayer and as layers.0")
    if "embed_tokens.weight" in names:
        shapes["embed_tokens.weight"] = (config.model.vocab_size, config.model.hidden_size)
    for name in names:
        if name not in shapes and name not in ("d2t", "t2d"):
            raise ModelError(
                f"{folder}: tensor {names[name]} has no place in this EAGLE-3 head",
                hint="is a flag missing from its config.json?",
            )
    for name, shape in shapes.items():
        if name not in names:
            raise ModelError(f"{folder} has no tensor {name}", hint=_MISSING.get(name, "is it a whole EAGLE-3 head?"))
        found = store.shape(names[name])
        if found != shape:
            raise ModelError(f"{folder}: tensor {names[name]} is {list(found)}, but config.json asks for {list(shape)}")
    maps = store.read({name: name for name in ("d2t", "t2d") if name in names})
    return store.read({name: names[name] for name in shapes}), draft_ids(
        folder, config.draft_vocab_size, config.model.vocab_size, maps
    )


def canonical(name: str) -> str:
    """A tensor's name as if layers were numbered."""
    return name.replace("midlayer.", "layers.0.", 1) if name.startswith("midlayer.") else name


def draft_ids(folder: Path, size: int, vocab: int, maps: Mapping[str, Tensor]) -> Tensor | None:
    """Target ids ``[size]`` of a head's vocabulary by its ``d2t`` and ``t2d``; None where it is the target's. Raises
    ``ModelError``."""
    if "d2t" not in maps:
        if size == vocab and "t2d" not in maps:
            return None
        raise ModelError(f"{folder} drafts from {size} of {vocab} tokens but has no tensor d2t that says which")
    offsets = maps["d2t"]
    if tuple(offsets.shape) != (size,) or offsets.is_floating_point():
        raise ModelError(
            f"{folder}: d2t must be {size} whole numbers, not {list(offsets.shape)} of {offsets.dtype}",
            hint=f"store it as int64, one offset a draft token; draft_vocab_size says that there are {size}",
        )
    ids = offsets.long() + torch.arange(size)
    if bool((ids < 0).any() or (ids >= vocab).any()) or len(ids.unique()) < size:
        raise ModelError(
            f"{folder}: d2t names tokens outside the target's {vocab}, or one twice",
            hint="d2t holds offsets: draft token i is target token i + d2t[i]",
        )
    if "t2d" in maps:
        expected = torch.zeros(vocab, dtype=torch.bool).index_fill_(0, ids, True)
        if tuple(maps["t2d"].shape) != (vocab,) or not maps["t2d"].bool().equal(expected):
            raise ModelError(
                f"{folder}: t2d and d2t name different tokens",
                hint=f"t2d holds {vocab} flags, true for each i + d2t[i]; if d2t is right, leave t2d out",
            )
    return ids


def read_eagle3_config(folder: Path) -> Eagle3Config:
    """From ``folder/config.json`` in either layout. Raises ``ModelError`` for what is unknown or does not fit."""
    raw, source = read_config(folder), str(folder / "config.json")
    if not is_eagle3(raw):
        raise ModelError(f"{source} does not describe an EAGLE-3 head")
    return parse_head(raw, source)


def parse_head(raw: Mapping[str, Any], source: str, more_keys: Collection[str] = ()) -> Eagle3Config:
    """From a config.json that may also have ``more_keys``; see ``read_eagle3_config``."""
    nested = "transformer_layer_config" in raw
    if nested and not isinstance(raw["transformer_layer_config"], dict):
        raise ModelError(f"{source}: transformer_layer_config is not an object")
    layer = dict(raw["transformer_layer_config"] if nested else {k: v for k, v in raw.items() if k in LAYER_KEYS})
    refuse_unknown_keys(raw, {*more_keys, *(_SPECULATORS_KEYS if nested else _FLAT_KEYS | LAYER_KEYS)}, source)
    if nested:
        refuse_unknown_keys(layer, LAYER_KEYS, f"{source}: transformer_layer_config")
    # Heads of Qwen targets are Llama layers too, whatever the target's config.
    model = ModelConfig.of({**layer, "model_type": "llama"}, source)
    if model.o_bias or model.mlp_bias or any(model.windows):
        raise ModelError(f"{source} asks for biases or a window that no EAGLE-3 head here has")
    own = read_own(raw, _OWN_KEYS, source)
    return Eagle3Config(
        model=model,
        layer={key: value for key, value in layer.items() if key in LAYER_KEYS - OTHER_KEYS},
        target_hidden_size=read_size(raw, "target_hidden_size", model.hidden_size, source),
        draft_vocab_size=read_size(raw, "draft_vocab_size", model.vocab_size, source, most=model.vocab_size),
        taps=_taps(raw, source),
        flags=frozenset(name for name in FLAGS if read_flag(raw, name, source)),
        tau=read_taus(own.get("tau", {}), source),
        base=own.get("base"),
    )


def _taps(raw: Mapping[str, Any], source: str) -> tuple[Tap, ...] | None:
    """0-based layers after which the target is tapped; None where the file does not say."""
    nested = raw.get("eagle_config") or {}
    if not isinstance(nested, dict):
        raise ModelError(f"{source}: eagle_config is not an object", hint="it holds layer ids and switches")
    for key, value in nested.items():
        if key != _IDS and (key not in _EAGLE_CONFIG or value not in (None, *_EAGLE_CONFIG[key])):
            raise ModelError(f"{source}: eagle_config.{key} {value!r} is not known here")
    entering, leaving = _ids(raw.get(_IDS), source), _ids(nested.get(_IDS), source)
    if leaving is not None and leaving[0] == 2:
        entering, leaving = leaving, None
    taps = [ids for ids in (None if entering is None else [i - 1 for i in entering], leaving) if ids is not None]
    if not taps:
        return None
    if any(other != taps[0] for other in taps):
        raise ModelError(f"{source} names its target's layers twice, and differently")
    return tuple("embed" if tap < 0 else tap for tap in taps[0])


def _ids(value: Any, source: str) -> list[int] | None:
    if value is None:
        return None
    if not isinstance(value, list) or not value or not all(type(i) is int and i >= 0 for i in value):
        raise ModelError(f"{source}: layer ids must be a list of whole numbers, not {value!r}")
    return value


def save_flat(
    out: Path, config: Eagle3Config, tensors: Mapping[str, Tensor], ids: Tensor | None,
    more: Mapping[str, Any] | None = None,
) -> None:  # fmt: skip
    """Write the flat form, which vLLM and SGLang load; arguments as ``read_eagle3`` returns them, and ``more`` for its
    config.json.

    Layer ids stand at the top level, by the layer that a stream enters: vLLM reads them there, and SGLang its own
    default, which is what a head trained with default taps needs.
    """
    settings = {
        **config.layer,
        "architectures": [ARCHITECTURE],
        "model_type": "llama",
        **_common(config),
        "tie_word_embeddings": False,
        **(more or {}),
    }
    single = config.model.num_layers == 1
    named = {name.replace("layers.0.", "midlayer.") if single else name: tensor for name, tensor in tensors.items()}
    _write(out, settings, named, config, ids)


def save_speculators(
    out: Path, config: Eagle3Config, tensors: Mapping[str, Tensor], ids: Tensor | None, *, verifier: str,
    verifier_architectures: list[str], speculative_tokens: int = 3, kind: str = "eagle3",
    more: Mapping[str, Any] | None = None,
) -> None:  # fmt: skip
    """Write the speculators form, which vLLM loads; ``verifier`` names the target as a user would, ``kind`` the
    algorithm; ``more`` goes into its config.json."""
    proposal = {"proposal_type": "greedy", "speculative_tokens": speculative_tokens, "verifier_accept_k": 1}
    settings = {
        "architectures": [SPECULATOR],
        "speculators_model_type": kind,
        "speculators_version": "0.3.0",
        **_common(config),
        **{name: name in config.flags for name in FLAGS},
        "embed_requires_grad": False,
        "transformer_layer_config": {**config.layer, "model_type": "llama", "tie_word_embeddings": False},
        "speculators_config": {
            "algorithm": kind,
            "default_proposal_method": "greedy",
            "proposal_methods": [proposal | {"accept_tolerance": 0.0}],
            "verifier": {"name_or_path": verifier, "architectures": verifier_architectures},
        },
        **(more or {}),
    }
    _write(out, settings, tensors, config, ids)


def _common(config: Eagle3Config) -> dict[str, Any]:
    common: dict[str, Any] = {
        "draft_vocab_size": config.draft_vocab_size,
        "target_hidden_size": config.target_hidden_size,
        **{name: True for name in FLAGS if name in config.flags},
    }
    own: dict[str, Any] = {"tau": {f"{temperature:g}": tau for temperature, tau in config.tau.items()}}
    if config.base is not None:
        own["base"] = config.base
    if config.taps is not None:
        taps = [-1 if tap == "embed" else int(tap) for tap in config.taps]
        common[_IDS] = [tap + 1 for tap in taps]
    return common | {"quantspec": own}


def _write(
    out: Path, settings: Mapping[str, Any], tensors: Mapping[str, Tensor], config: Eagle3Config, ids: Tensor | None
) -> None:
    maps = {}
    if ids is not None:
        member = torch.zeros(config.model.vocab_size, dtype=torch.bool).index_fill_(0, ids, True)
        maps = {"d2t": ids - torch.arange(len(ids)), "t2d": member}
    atomic.make_folder(out)
    atomic.write_json(out / "config.json", settings)
    atomic.save_tensors(out / "model.safetensors", {**tensors, **maps})
