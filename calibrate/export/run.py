"""Export a model: read all of it, ask the target, write it one decoder layer at a time."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from quantspec.calibrate.export import awq, compressed_tensors, gguf_folder, gptq
from quantspec.calibrate.export.base import Form, stored_bytes
from quantspec.calibrate.export.bitsandbytes import copy, is_bitsandbytes
from quantspec.calibrate.export.config import ENGINES, ExportConfig, ExportReport
from quantspec.calibrate.export.draft import FOLDER, Head, HeadExport, open_draft
from quantspec.calibrate.export.draft_eagle3 import Eagle3Export, PEagleExport
from quantspec.calibrate.export.draft_medusa import MedusaExport
from quantspec.calibrate.export.limits import vllm_loads
from quantspec.calibrate.export.output import OutputFolder, check_free, check_room
from quantspec.calibrate.export.serve import DraftKind, commands
from quantspec.calibrate.export.sidecars import has_tokenizer, write_sidecars
from quantspec.calibrate.export.source import VOCABULARY, Shard, Source, dense
from quantspec.calibrate.export.survey import Survey
from quantspec.calibrate.quantize.checkpoint import write_index
from quantspec.calibrate.quantize.estimate import describe
from quantspec.errors import Interrupted, ModelError, UsageError
from quantspec.models import atomic
from quantspec.models.tensors import TensorStore
from quantspec.numerics.affine import QuantizedWeight

OnShard = Callable[[int, int], None]
"""Hears how many shards are written, of how many."""
_ORIGINAL = "export the checkpoint that the GGUF file was made of"


@torch.no_grad()
def run(config: ExportConfig, on_shard: OnShard | None = None, *, dry_run: bool = False) -> ExportReport:
    """Write ``config.model`` into ``config.out`` in the form that ``config.to`` loads; with ``dry_run`` only say what
    would be written. Every code is kept.

    Raises ``ModelError`` where the target cannot hold the model, before anything is written; ``UsageError``,
    ``ResourceError``, or ``Interrupted`` after Ctrl-C, which leave nothing behind.
    """
    started = time.perf_counter()
    if config.draft_model is None and config.num_speculative_tokens != ExportConfig.num_speculative_tokens:
        raise UsageError("--num-speculative-tokens goes with --draft-model alone", hint="leave it out")
    try:
        check_free(config.out)
        if config.out.resolve().is_relative_to(config.model.resolve()):
            raise UsageError(f"{config.out} lies in the model's own folder", hint="choose another --out")
        if is_bitsandbytes(config.model):
            return copy(config, dry_run=dry_run)
        if config.to == "gguf":
            return gguf_folder.write(config, dry_run=dry_run)
        export = _Export(config)
        if not dry_run:
            check_room(config.out, export.room)
            with OutputFolder(config.out) as output:
                export.write(output.path, on_shard or (lambda done, total: None))
                output.finish()
    except KeyboardInterrupt as error:
        raise Interrupted("interrupted; nothing is left of the export", hint="give the command again") from error
    return replace(export.report(), dry_run=dry_run, seconds=time.perf_counter() - started)


class _Export:
    """One model read and found to fit, with its drafter, if any."""

    def __init__(self, config: ExportConfig, is_draft: bool = False) -> None:
        self.config, self.source = config, Source.open(config.model)
        if self.source.config.rope.kind == "factors":
            raise ModelError(f"{config.model} has rope factors that config.json has no word for", hint=_ORIGINAL)
        self.draft: HeadExport | _Export | None = None
        if config.draft_model is not None:
            draft = open_draft(config.draft_model, self.source, config)
            options = replace(config, model=config.draft_model, draft_model=None)
            self.draft = _Export(options, is_draft=True) if isinstance(draft, Source) else draft
        self.survey = Survey.of(self.source)
        keeps_dense = is_draft and not self.survey.quantized
        self.form = Form(None, None) if keeps_dense or config.dequantize else _form(config, self.survey)
        self.notes = [*self.form.notes, *_notes(self.survey, self.form)]
        self.bytes = stored_bytes(self.survey, self.form)
        self.room = self.bytes
        if isinstance(self.draft, _Export):
            self.notes += [f"drafter: {note}" for note in self.draft.notes]
            self.room += self.draft.bytes
        elif self.draft is not None:
            self.room += TensorStore(self.draft.folder).nbytes()
            if isinstance(self.draft, Eagle3Export):
                self.notes += [f"drafter: {note}" for note in self.draft.notes]

    def write(self, folder: Path, on_shard: OnShard) -> None:
        """All files but the manifest; config.json, without which nobody loads the folder, comes last."""
        if self.draft is not None:
            atomic.make_folder(folder / FOLDER)
            self.draft.write(folder / FOLDER, on_shard)
            atomic.write_manifest(folder / FOLDER)
        total = self.source.num_shards
        for number, shard in enumerate(self.source.shards(self.source.weights()), 1):
            atomic.save_tensors(folder / f"model-{number:05d}-of-{total:05d}.safetensors", self._stored(shard))
            shard.clear()  # before the next one is read
            on_shard(number, total)
        write_sidecars(self.source, folder)
        write_index(folder)
        for name, content in self.form.files.items():
            atomic.write_json(folder / name, content)
        raw = {key: value for key, value in self.source.raw.items() if key != "quantization_config"}
        if self.form.quantization_config is not None:
            raw["quantization_config"] = self.form.quantization_config
        atomic.write_json(folder / "config.json", raw)

    def _stored(self, shard: Shard) -> dict[str, Tensor]:
        """The tensors of a shard as the target has them. Engines read packed vocabularies as noise, so embedding and
        LM head are always dense."""
        tensors: dict[str, Tensor] = {}
        for name, weight in shard.items():
            if not isinstance(weight, QuantizedWeight):
                tensors[name] = weight
            elif self.form.pack is None or name in VOCABULARY:
                tensors[name] = dense(weight, self.source.dtype)
            else:
                module = name.removesuffix(".weight")
                tensors |= {f"{module}.{suffix}": part for suffix, part in self.form.pack(weight).items()}
        return tensors

    def report(self) -> ExportReport:
        config = self.config
        unpacked = str(self.source.dtype).removeprefix("torch.")
        schemes = Counter(
            str(module.dtype).removeprefix("torch.") if module.scheme is None
            else unpacked if self.form.pack is None else describe(module.scheme)
            for module in self.survey.linear
        )  # fmt: skip
        draft = None if self.draft is None else config.out / FOLDER
        kinds: dict[type, DraftKind] = {
            Head: "eagle", Eagle3Export: "eagle3", PEagleExport: "peagle", MedusaExport: "medusa",
        }  # fmt: skip
        tokens = self.draft.tokens if isinstance(self.draft, MedusaExport) else config.num_speculative_tokens
        return ExportReport(
            model=str(config.model),
            out=str(config.out),
            to=config.to,
            schemes=dict(schemes),
            bytes_before=self.survey.bytes,
            bytes_after=self.bytes,
            draft=None if draft is None else str(draft),
            commands=commands(
                config.to,
                config.out,
                draft,
                kinds.get(type(self.draft), "model"),
                tokens,
                vllm_loads(self.survey, config.to),
            ),
            notes=self.notes,
        )


def _form(config: ExportConfig, survey: Survey) -> Form:
    if config.to in ENGINES:
        return compressed_tensors.form(survey, config.to)
    return (gptq if config.to == "gptq" else awq).form(survey)


def _notes(survey: Survey, form: Form) -> list[str]:
    dtype, quantization = str(survey.source.dtype).removeprefix("torch."), survey.source.config.quantization
    packed = [module.name for module in survey.vocabulary if module.scheme is not None]
    notes = [f"{name} is packed, and written in {dtype}: engines read no other" for name in packed]
    if form.pack is None and survey.quantized:
        notes.append(f"{len(survey.quantized)} linear layers are dequantized, and rounded to {dtype}")
    notes += quantization.notes if quantization is not None else ()
    if not has_tokenizer(survey.source):
        notes.append(f"{survey.source.folder} has no tokenizer, which an engine needs")
    if survey.source.dequantized:
        notes.append(f"{survey.source.dequantized}; here they are rounded to {dtype}")
    return notes
