"""A family of small models and heads, scaled to a larger shape: ``quantspec bench scale``."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from quantspec.benchmarks.scaled.config import (
    GROUP,
    HEADS,
    MEMBERS,
    MODELS,
    SHARE,
    ScaleBench,
    eagle_bytes,
    folder_name,
    linear_bytes,
    lm_rows,
    model_bytes,
)
from quantspec.benchmarks.scaled.decoder import LABEL, Scaled, Small
from quantspec.benchmarks.scaled.heads import Base, HeadWriter
from quantspec.benchmarks.scaled.places import layer_places
from quantspec.benchmarks.scaled.sheet import Dense, Noise, Packed, SheetOf
from quantspec.calibrate.quantize.checkpoint import quantization_config
from quantspec.calibrate.quantize.plan import Plan
from quantspec.errors import UsageError
from quantspec.models import atomic
from quantspec.models.config import read_config
from quantspec.models.fingerprint import fingerprint
from quantspec.models.json_files import read_object
from quantspec.models.quantization import HEAD_MODULE
from quantspec.models.resolve import FAMILY
from quantspec.models.tensors import TensorStore
from quantspec.numerics.scheme import Scheme

Say = Callable[[str], None]
SUMMARY = "shape_scaled.json"


@torch.no_grad()
def run(config: ScaleBench, say: Say) -> dict[str, Any]:
    """Write the family; what is there already stays, so that a run that was stopped goes on. Raises ``UsageError`` or
    ``ModelError``: a member is missing, or does not go into the shape."""
    return _Run(config, say).run()


class _Run:
    def __init__(self, config: ScaleBench, say: Say) -> None:
        self.config, self._say, self._noise = config, say, Noise(config.seed)
        self._source = config.source or FAMILY
        self._shapes = dict(zip(MODELS, config.shapes(), strict=True))
        self._bases: dict[str, Base] = {}

    def run(self) -> dict[str, Any]:
        report = self._begun()
        for name in self.config.only or MEMBERS:
            start, (folder, bits) = time.perf_counter(), self._form(name)
            if not (folder / atomic.MANIFEST).exists():
                (self._model if name in MODELS else self._head)(name, folder, bits)
                size, seconds = TensorStore(folder).nbytes() / 1e9, time.perf_counter() - start
                self._say(f"{folder.name}: {size:.2f} GB, {seconds:.0f} s")
            report["members"][folder.name] = self._described(name, folder, bits)
            atomic.write_json(self.config.out / SUMMARY, report)
        return report

    def _begun(self) -> dict[str, Any]:
        """What the folder holds already. Raises ``UsageError``: models of another shape, or something else."""
        config, path = self.config, self.config.out / SUMMARY
        shapes = {name: asdict(shape) for name, shape in self._shapes.items()}
        wanted = {"label": LABEL["label"], "shapes": shapes, "source": str(self._source), "seed": config.seed}
        if path.exists():
            report = read_object(path)
            if wanted == {key: report.get(key) for key in wanted}:
                return report
        if config.out.exists() and (not config.out.is_dir() or _holds_more(config.out)):
            raise UsageError(f"{config.out} holds something else already", hint="choose another --out")
        atomic.make_folder(config.out)
        atomic.write_json(path, wanted | {"members": {}})
        return wanted | {"members": {}}

    def _form(self, name: str) -> tuple[Path, int]:
        """Where a member goes, and its bits: those of the family's own where that is quantized, else 8 for heads."""
        bits = self.config.bits
        if bits == 4 and name in HEADS and not self._member(name, 4).name.endswith("-w4"):
            bits = 8
        return self.config.out / folder_name(name, bits), bits

    def _member(self, name: str, bits: int) -> Path:
        """The small one: with its own 4 bits where these are wanted and there."""
        packed = self._source / f"{name}-w4"
        wanted = bits == 4 or (self.config.dequantized and name in MODELS)
        folder = packed if wanted and packed.is_dir() else self._source / name
        if not (folder / "config.json").exists():
            raise UsageError(f"{self._source} has no {folder.name}", hint="give a family of `quantspec train family`")
        return folder

    def _sheets(self, bits: int) -> SheetOf:
        return Dense(self._noise) if bits == 16 else Packed(Scheme(bits, GROUP), self._noise)

    def _model(self, name: str, folder: Path, bits: int) -> None:
        shape, source = self._shapes[name], self._member(name, bits)
        small = Small.open(source, self.config.seed)
        quantization = quantization_config(Plan({"Linear": Scheme(bits, GROUP)}, frozenset())) if bits < 16 else None
        note = {"source": source.name, "shape": self.config.shape}
        Scaled(small, shape, self._sheets(bits), self._noise, GROUP).write(folder, quantization, note)

    def _base(self, name: str) -> Base:
        """The model that a head drafts for, small and large."""
        if name not in self._bases:
            folder, bits = self._form(name)
            if not (folder / atomic.MANIFEST).exists():
                raise UsageError(f"{folder} has to be there before its heads", hint=f"add {name} to --only")
            small, shape = Small.open(self._member(name, bits), self.config.seed), self._shapes[name]
            layers = layer_places(small.config.num_layers, shape.layers)
            self._bases[name] = Base(small, shape, layers, fingerprint(folder))
        return self._bases[name]

    def _head(self, name: str, folder: Path, bits: int) -> None:
        base, source = self._base(HEADS[name]), self._member(name, bits)
        rows = self._lm_rows(name, base, read_config(source), bits)
        quantization = None
        if bits < 16:
            scheme = Scheme(bits, GROUP)
            quantization = quantization_config(Plan({"fc": scheme}, frozenset(), {HEAD_MODULE: scheme}))
        HeadWriter(source, base, self._sheets(bits), rows).write(folder, quantization)

    def _lm_rows(self, name: str, base: Base, raw: dict[str, Any], bits: int) -> int:
        budget, shape = model_bytes(base.shape, self.config.bits) / SHARE, base.shape
        vocab = base.small.config.vocab_size
        used = raw.get("draft_vocab_size") or raw.get("truncated_vocab_size") or vocab
        if name.startswith("medusa"):
            heads = raw["num_heads"]
            blocks = linear_bytes(heads * shape.hidden, shape.hidden, bits)
            return lm_rows(shape, budget - blocks, heads, bits, used, vocab)
        streams = 0 if name in ("eagle-target", "eagle-intermediate") else 3
        budget -= eagle_bytes(shape, bits, raw["num_hidden_layers"], streams)
        return lm_rows(shape, budget, 1, bits, used, vocab)

    def _described(self, name: str, folder: Path, bits: int) -> dict[str, Any]:
        """Bytes that a step reads, beside its target's or base's."""
        of = HEADS.get(name, "target")
        base = model_bytes(self._shapes[of], self.config.bits)
        heads = TensorStore(folder).nbytes() - _looked_up(folder) if name in HEADS else 0
        read = heads or model_bytes(self._shapes[name], bits)
        beside = None if name == of else self._form(of)[0].name
        source = self._member(name, bits).name
        return {"source": source, "bits": bits, "bytes": int(read), "share": read / base, "of": beside}


def _holds_more(folder: Path) -> bool:
    """Than what a run leaves that was refused before its first member, for a shape or source that does not go."""
    names = {path.name for path in folder.iterdir()}
    return bool(names - {SUMMARY}) or (SUMMARY in names and bool(read_object(folder / SUMMARY).get("members")))


def _looked_up(folder: Path) -> int:
    """Bytes of what is not read whole in a step: an embedding, and a vocabulary's map."""
    store = TensorStore(folder)
    return sum(store.size(name) for name in ("embed_tokens.weight", "d2t", "t2d", "token_map") if name in store)
