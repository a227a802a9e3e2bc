"""Which keys a head's config.json may have: a flag that is ignored loads cleanly and ruins acceptance."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from quantspec.errors import ModelError

OTHER_KEYS = frozenset(
    (
        "architectures", "model_type", "torch_dtype", "dtype", "transformers_version", "use_cache", "_name_or_path",
        "initializer_range", "attention_dropout", "pretraining_tp", "bos_token_id", "eos_token_id", "pad_token_id",
        "tie_word_embeddings", "return_dict", "output_hidden_states", "output_attentions", "is_encoder_decoder",
        "chunk_size_feed_forward", "problem_type", "id2label", "label2id", "unsloth_version",
        "quantization_config", "compression_config",
    )
)  # fmt: skip
"""Keys that say nothing about how a head computes."""
LAYER_KEYS = OTHER_KEYS | {
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings", "rope_theta", "rope_scaling", "rope_parameters",
    "rms_norm_eps", "hidden_act", "attention_bias", "mlp_bias", "sliding_window", "use_sliding_window",
    "max_window_layers", "layer_types",
}  # fmt: skip
"""All keys of a plain Llama or Qwen config."""


def architectures(raw: Mapping[str, Any]) -> list[Any]:
    """Those that a config.json names, none where it names them in no list."""
    names = raw.get("architectures")
    return names if isinstance(names, list) else []


def refuse_unknown_keys(raw: Iterable[str], known: Collection[str], source: str) -> None:
    """Raise a ``ModelError`` for the first key that is not ``known`` and may change the network."""
    for key in raw:
        if key in known or key in OTHER_KEYS:
            continue
        near = difflib.get_close_matches(key, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "a head trained with a flag that is not known here is no good"
        raise ModelError(f"{source} has the key {key!r}, which is not known here", hint=hint)


def read_own(raw: Mapping[str, Any], known: Collection[str], source: str) -> dict[str, Any]:
    """Our own section ``quantspec``: ``tau`` (see ``tau.read_taus``), and names, which are strings. Raises
    ``ModelError``."""
    own = raw.get("quantspec", {})
    if not isinstance(own, dict) or own.keys() - known:
        raise ModelError(
            f"{source}: the section quantspec may only have {', '.join(sorted(known))}",
            hint="what is not known here may change how the head computes: load it with a newer quantspec",
        )
    for key, value in own.items():
        if key != "tau" and not isinstance(value, str | None):
            hint = f'write it in quotes, or leave {key} out: "base" is the fingerprint of the weights it was trained on'
            raise ModelError(f"{source}: quantspec.{key} must be a string, not {value!r:.60}", hint=hint)
    return own


def read_size(raw: Mapping[str, Any], key: str, default: int, source: str, most: int | None = None) -> int:
    """A whole number from 1 to ``most``, ``default`` where there is none. Raises ``ModelError``."""
    value = raw.get(key)
    if value is None:
        return default
    if type(value) is not int or value < 1 or (most is not None and value > most):
        raise ModelError(f"{source}: {key} must be a whole number from 1{f' to {most}' if most else ''}, not {value!r}")
    return value


def read_flag(raw: Mapping[str, Any], key: str, source: str) -> bool:
    """True or false, false where there is none. Raises ``ModelError``."""
    value = raw.get(key)
    if not isinstance(value, bool | None):
        raise ModelError(f"{source}: {key} must be true or false, not {value!r}")
    return bool(value)
