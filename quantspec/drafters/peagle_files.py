"""P-EAGLE heads on disk: EAGLE-3's two layouts with a mask (see ``eagle3_files``).

Besides EAGLE-3's tensors there are ``mask_hidden``, which stands for the streams of slots that the target has not seen,
and ``embed_tokens.weight``, in which ``mask_token_id`` stands for their tokens. That id goes by several names; where
more than one is there, vLLM's order decides. Layers are numbered, in the flat form too if there are several.

A head of ours may have a path network besides (see ``peagle_path``): ``path_rank`` in its config.json, tensors
``path.*``. Without them it is the head that engines know.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from quantspec.drafters import eagle3_files
from quantspec.drafters.eagle3_files import is_eagle3, parse_head, read_head_tensors
from quantspec.drafters.eagle3_head import Eagle3Config
from quantspec.drafters.head_keys import architectures, read_size
from quantspec.errors import ModelError
from quantspec.models.config import read_config

SPECULATOR = "PEagleSpeculator"
_ARCHITECTURES = (SPECULATOR, "PEagleDraftModel", "PeagleLlamaForCausalLM", "PeagleQwen3ForCausalLM")
_MASK_KEYS = ("mask_token_id", "dspark_noise_token_id", "pard_token", "ptd_token_id")
"""Where the mask's id may stand, after ``dflash_config.mask_token_id``."""
_TRAINING_KEYS = ("num_depths", "para_num", "down_sample_ratio", "down_sample_ratio_min", "loss_type")
"""How a head was trained, which changes nothing here."""
_RANK = "path_rank"
_MARKS = ("dflash_config", "parallel_drafting", _RANK, *_MASK_KEYS)
"""Keys that no EAGLE-3 head has."""
MASK, EMBEDDING = "mask_hidden", "embed_tokens.weight"


@dataclass(frozen=True, slots=True)
class PEagleConfig:
    """``head`` is what the network has in common with EAGLE-3; ``path_rank`` that of the path network, 0 for none."""

    head: Eagle3Config
    mask_token_id: int
    path_rank: int = 0

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor, besides the vocabulary map."""
        head = self.head
        own = {
            MASK: (1, 1, head.streams * head.target_hidden_size),
            EMBEDDING: (head.model.vocab_size, head.model.hidden_size),
        }
        return head.shapes() | own | self.path_shapes()

    def path_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of the path network's tensors."""
        rank, read = self.path_rank, 2 * self.head.model.hidden_size
        if not rank:
            return {}
        return {
            "path.gate_proj.weight": (2 * rank, read),
            "path.up_proj.weight": (2 * rank, read),
            "path.down_proj.weight": (rank, 2 * rank),
            "path.lm_head.weight": (self.head.draft_vocab_size, rank),
        }

    def without_path(self, tensors: Mapping[str, Tensor]) -> tuple[PEagleConfig, dict[str, Tensor]]:
        """The paper's head: all slots say is what they say by themselves."""
        path = self.path_shapes()
        return replace(self, path_rank=0), {name: tensor for name, tensor in tensors.items() if name not in path}


def is_peagle(raw: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of a P-EAGLE head: one that says so, or an EAGLE-3 head with a mask."""
    named = any(name in _ARCHITECTURES for name in architectures(raw))
    if raw.get("speculators_model_type") == "peagle" or named:
        return True
    return is_eagle3(raw) and any(key in raw for key in _MARKS)


def read_peagle(folder: Path) -> tuple[PEagleConfig, dict[str, Tensor], Tensor | None]:
    """A head's configuration; its tensors by the names of ``config.shapes()``; the target ids of its vocabulary,
    ascending, None where it is the target's. Raises ``ModelError`` as ``read_eagle3`` does."""
    config = read_peagle_config(folder)
    return config, *read_head_tensors(folder, config.head, config.shapes())


def read_peagle_config(folder: Path) -> PEagleConfig:
    """From ``folder/config.json`` in either layout. Raises ``ModelError`` for what is unknown or does not fit."""
    raw, source = read_config(folder), str(folder / "config.json")
    if not is_peagle(raw):
        raise ModelError(f"{source} does not describe a P-EAGLE head")
    head = parse_head(raw, source, (*_MARKS, *_TRAINING_KEYS))
    rank = 0 if raw.get(_RANK) is None else read_size(raw, _RANK, 0, source, most=head.model.hidden_size)
    return PEagleConfig(head, _mask_token(raw, head.model.vocab_size, source), rank)


def _mask_token(raw: Mapping[str, Any], vocab: int, source: str) -> int:
    nested = raw.get("dflash_config") or {}
    if not isinstance(nested, dict) or nested.keys() - {"mask_token_id"}:
        raise ModelError(f"{source}: dflash_config may only have mask_token_id in a P-EAGLE head")
    places = [
        ("dflash_config.mask_token_id", nested.get("mask_token_id")),
        *((key, raw.get(key)) for key in _MASK_KEYS),
    ]
    name, value = next(((name, value) for name, value in places if value is not None), ("", None))
    if value is None:
        raise ModelError(f"{source} does not say which token stands for a masked one", hint="add mask_token_id")
    if type(value) is not int or not 0 <= value < vocab:
        raise ModelError(f"{source}: {name} must be a token of the {vocab} there are, not {value!r}")
    return value


def save_flat(out: Path, config: PEagleConfig, tensors: Mapping[str, Tensor], ids: Tensor | None) -> None:
    """Write the flat form, which vLLM loads as method ``eagle3`` with ``parallel_drafting``; arguments as
    ``read_peagle`` returns them. The mask's id stands under both names that its versions have looked for."""
    mask = {"mask_token_id": config.mask_token_id, "pard_token": config.mask_token_id}
    eagle3_files.save_flat(out, config.head, tensors, ids, mask | _rank(config))


def _rank(config: PEagleConfig) -> dict[str, Any]:
    return {_RANK: config.path_rank} if config.path_rank else {}


def save_speculators(
    out: Path, config: PEagleConfig, tensors: Mapping[str, Tensor], ids: Tensor | None, *, verifier: str,
    verifier_architectures: list[str], speculative_tokens: int = 5,
) -> None:  # fmt: skip
    """Write the speculators form; see ``eagle3_files.save_speculators``."""
    more = {
        "architectures": [SPECULATOR], "mask_token_id": config.mask_token_id, "embed_requires_grad": True,
        **_rank(config),
    }  # fmt: skip
    eagle3_files.save_speculators(
        out, config.head, tensors, ids, verifier=verifier, verifier_architectures=verifier_architectures,
        speculative_tokens=speculative_tokens, kind="peagle", more=more,
    )  # fmt: skip
