"""EAGLE-3 and P-EAGLE heads for engines, in either form, in the conventions that engines read alike.

Flat: vLLM and SGLang load EAGLE-3 heads. SGLang reads no layer ids at the top level, where vLLM does: it takes those of
``eagle_config``, where a list that begins with 1 names the layers that streams leave in every version, and without it
the streams that enter layers 2, L // 2 and L - 3. A head that was trained on others would draft nonsense there, and
nobody would say so. speculators: vLLM alone; it hands EAGLE-3's flags on to the network, where of a flat head all are
ignored that a version does not know, and of a P-EAGLE head those of 3.1 are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from quantspec.calibrate.export.config import DraftForm
from quantspec.calibrate.export.source import Source
from quantspec.drafters import eagle3_files, peagle_files
from quantspec.drafters.eagle3_head import FLAGS, Eagle3Config
from quantspec.drafters.head_tensors import HeadTensors
from quantspec.errors import ModelError
from quantspec.models.rotation import load_rotation

Engine = Literal["vllm", "sglang"]
"""That runs EAGLE heads."""
_ELSEWHERE = "it runs with quantspec generate"
_FLAGS_OF_3_1 = frozenset(("fc_norm", "norm_output"))


@dataclass(frozen=True)
class Eagle3Export:
    """An EAGLE-3 head in ``folder`` for ``target``; ``out`` is where the target goes, ``tokens`` how many to draft."""

    folder: Path
    target: Source
    engine: Engine
    form: DraftForm = "flat"
    out: Path = Path()
    tokens: int = 3

    def check(self) -> Eagle3Export:
        """Itself. Raises ``ModelError``: it was made for another target, or the engine does not run its kind."""
        config, engine = self.head, self.engine
        wanted = (self.target.config.hidden_size, self.target.config.vocab_size)
        if (config.target_hidden_size, config.model.vocab_size) != wanted:
            raise ModelError(
                f"{self.folder} is for a target of width {config.target_hidden_size} and {config.model.vocab_size} "
                f"tokens, and the model has {wanted[0]} and {wanted[1]}",
                hint="give a drafter of this model",
            )
        reason = ""
        if own := self.another_reason():
            reason = own
        elif load_rotation(self.target.folder, self.target.raw) is not None:
            reason = "its target is rotated, which it does not know of in an engine"
        elif engine == "sglang" and self.form == "speculators":
            reason = "SGLang does not read the speculators form"
        elif config.flags & self.ignored:
            reason = f"it has {', '.join(sorted(config.flags & self.ignored))}, which not all engines have"
        elif engine == "sglang" and config.model.num_layers > 1:
            reason = f"it has {config.model.num_layers} layers, and SGLang's has one"
        elif engine == "sglang" and self._renamed(config) and (config.taps or (None,))[0] != 1:
            reason = "versions of SGLang differ on which layers it reads"
        if reason:
            hint = "leave out --draft-form" if reason.endswith("the speculators form") else _ELSEWHERE
            raise ModelError(f"{self.folder} cannot be exported: {reason}", hint=hint)
        return self

    @property
    def head(self) -> Eagle3Config:
        return eagle3_files.read_eagle3_config(self.folder)

    @property
    def ignored(self) -> frozenset[str]:
        """Flags that an engine may overlook in this form."""
        return frozenset(FLAGS) if self.form == "flat" else frozenset()

    def another_reason(self) -> str:
        return ""

    def write(self, out: Path, on_shard: object = None) -> None:
        """All files but the manifest. Layer ids are named, also where the head's own folder leaves them out."""
        config, tensors, ids = eagle3_files.read_eagle3(self.folder)
        config, dense = self._named(config), in_one_dtype(tensors)
        if self.form == "flat":
            eagle3_files.save_flat(out, config, dense, ids, self._for_sglang(config))
        else:
            eagle3_files.save_speculators(
                out, config, dense, ids, verifier=str(self.out), verifier_architectures=self._architectures(),
                speculative_tokens=self.tokens,
            )  # fmt: skip

    @property
    def notes(self) -> list[str]:
        """What is lost on the way."""
        return []

    def _named(self, config: Eagle3Config) -> Eagle3Config:
        return replace(config, taps=config.taps_of(self.target.config.num_layers))

    def _for_sglang(self, config: Eagle3Config) -> dict[str, object]:
        """Layer ids where SGLang looks, which it does not without the flag beside them; vLLM's are at the top level."""
        if self.engine == "vllm" or config.taps is None or not self._renamed(config):
            return {}
        return {"eagle_config": {"use_aux_hidden_state": True, "eagle_aux_hidden_state_layer_ids": list(config.taps)}}

    def _renamed(self, config: Eagle3Config) -> bool:
        """Whether the head reads other layers than SGLang would by itself."""
        layers = self.target.config.num_layers
        return config.taps_of(layers) != replace(config, taps=None).taps_of(layers)

    def _architectures(self) -> list[str]:
        """Of the target, by which vLLM knows it."""
        return list(self.target.raw.get("architectures") or ())


@dataclass(frozen=True)
class PEagleExport(Eagle3Export):
    """A P-EAGLE head, which vLLM runs."""

    @property
    def head(self) -> Eagle3Config:
        return peagle_files.read_peagle_config(self.folder).head

    @property
    def ignored(self) -> frozenset[str]:
        return frozenset(FLAGS) if self.form == "flat" else _FLAGS_OF_3_1

    def another_reason(self) -> str:
        return "SGLang does not run P-EAGLE heads" if self.engine == "sglang" else ""

    @property
    def notes(self) -> list[str]:
        rank = peagle_files.read_peagle_config(self.folder).path_rank
        return ["its path network stays behind: no engine runs one, and slots speak for themselves"] if rank else []

    def write(self, out: Path, on_shard: object = None) -> None:
        """All files but the manifest, as of an EAGLE-3 head."""
        config, tensors, ids = peagle_files.read_peagle(self.folder)
        config, dense = config.without_path(in_one_dtype(tensors))
        config = replace(config, head=self._named(config.head))
        if self.form == "flat":
            peagle_files.save_flat(out, config, dense, ids)
        else:
            peagle_files.save_speculators(
                out, config, dense, ids, verifier=str(self.out), verifier_architectures=self._architectures(),
                speculative_tokens=self.tokens,
            )  # fmt: skip


def in_one_dtype(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights that are stored quantized in the type of the others: engines read no packed heads."""
    packed = tensors.packed if isinstance(tensors, HeadTensors) else {}
    dtype = next((tensor.dtype for name, tensor in tensors.items() if name not in packed), torch.bfloat16)
    return {name: tensor.to(dtype) if name in packed else tensor for name, tensor in tensors.items()}
