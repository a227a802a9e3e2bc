"""The work folder ``<out>.partial``: finished layers, and the fingerprint they were made under, so that a run can
resume."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantspec.calibrate.quantize.config import LayerResult, QuantizeConfig
from quantspec.errors import UsageError
from quantspec.models import atomic

if TYPE_CHECKING:
    from torch import Tensor

_PROGRESS = ".quantspec_progress.json"
_ALGORITHM = 2  # raise it when the same settings would give other codes
_SETTINGS = (
    "method",
    "bits",
    "group_size",
    "symmetric",
    "activation_bits",
    "head_bits",
    "embedding_bits",
    "bits_per_weight",
    "widths",
    "ignore",
    "num_samples",
    "seq_len",
    "seed",
    "device",
    "kv_cache_dtype",
    "rotate",
)


def fingerprint(config: QuantizeConfig, model_files: list[Path], calibration: Tensor | None) -> str:
    """A sha256 of all that decides the codes: the model's files, the calibration ids and the settings."""
    parts: dict[str, Any] = {"algorithm": _ALGORITHM} | {name: getattr(config, name) for name in _SETTINGS}
    parts["model"] = {path.name: atomic.sha256(path) for path in model_files}
    parts["options"] = asdict(config.options)
    if calibration is not None:
        parts["calibration"] = hashlib.sha256(calibration.numpy().tobytes()).hexdigest()
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def report_fingerprint(identity: str, held_out: Tensor | None) -> str:
    """A sha256 of the run and the text that its report was measured on."""
    rows = b"" if held_out is None else held_out.numpy().tobytes()
    return hashlib.sha256(identity.encode() + rows).hexdigest()


class WorkFolder:
    """Finished decoder layers on disk. ``results[i]`` are the linear layers of decoder layer i, in order."""

    def __init__(self, out: Path, identity: str, num_layers: int, resume: bool) -> None:
        self.out = out.resolve()  # a link stays where it is
        self.path = self.out.with_name(self.out.name + ".partial")
        self.identity = identity
        self._shards = num_layers + 1
        self._layers: list[dict[str, Any]] = []
        self.discarded = False
        if self.path.exists():
            self._open(resume)
        atomic.make_folder(self.path)
        self._save()

    @property
    def results(self) -> list[list[LayerResult]]:
        return [[LayerResult(**result) for result in layer["results"]] for layer in self._layers]

    def shard(self, index: int) -> Path:
        """File of decoder layer ``index``; the number of layers gives the file of all other tensors."""
        return self.path / f"model-{index + 1:05d}-of-{self._shards:05d}.safetensors"

    def record(self, tensors: dict[str, Tensor], results: list[LayerResult]) -> None:
        """Make the next decoder layer durable: first its shard, then its line in the progress file."""
        file = self.shard(len(self._layers))
        atomic.save_tensors(file, tensors)
        self._layers.append({"sha256": atomic.sha256(file), "results": [asdict(result) for result in results]})
        self._save()

    def finish(self) -> None:
        """Turn the work folder into ``out``: the manifest is written last, then the folder takes its final name.
        Killed at any point, it is either still a work folder or already whole."""
        with atomic.writing(self.path):
            for path in self.path.glob(".*.tmp"):
                path.unlink()
        atomic.write_manifest(self.path)
        atomic.rename_folder(self.path, self.out)
        with atomic.writing(self.out):
            (self.out / _PROGRESS).unlink()

    def _save(self) -> None:
        atomic.write_json(self.path / _PROGRESS, {"fingerprint": self.identity, "layers": self._layers})

    def _open(self, resume: bool) -> None:
        progress = self.path / _PROGRESS
        if not progress.is_file():
            if not self.path.is_dir() or any(self.path.iterdir()):
                raise UsageError(f"{self.path} is in the way and is not ours", hint="move it, or choose another --out")
            return
        try:
            state = json.loads(progress.read_text())
            layers = state["layers"] if resume and state["fingerprint"] == self.identity else None
        except (ValueError, KeyError, TypeError):
            layers = None
        if layers is None:
            self.discarded = True
            with atomic.writing(self.path):
                shutil.rmtree(self.path)
            return
        for layer in layers:
            file = self.shard(len(self._layers))
            if not file.is_file() or atomic.sha256(file) != layer["sha256"]:
                break
            self._layers.append(layer)
