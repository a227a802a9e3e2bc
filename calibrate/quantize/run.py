"""Quantize a checkpoint, one decoder layer in memory at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from quantspec.calibrate import data
from quantspec.calibrate.memory import give_back_freed_blocks
from quantspec.calibrate.quantize import auto, by_gptqmodel, checkpoint, report
from quantspec.calibrate.quantize.acceptance import tune
from quantspec.calibrate.quantize.config import (
    Event,
    LayerResult,
    QuantizeConfig,
    QuantizeReport,
    Sensitivity,
    Stage,
    Trial,
)
from quantspec.calibrate.quantize.estimate import check_room
from quantspec.calibrate.quantize.evaluate import batches
from quantspec.calibrate.quantize.interrupt import deferred_interrupt
from quantspec.calibrate.quantize.layer import DecoderLayer
from quantspec.calibrate.quantize.methods import nf4
from quantspec.calibrate.quantize.page import html
from quantspec.calibrate.quantize.pipeline import LayerPipeline
from quantspec.calibrate.quantize.plan import Plan, vocabulary_schemes
from quantspec.calibrate.quantize.sensitivity import assign, linear_sizes, mean_bits, narrowest
from quantspec.calibrate.quantize.stream import EMBEDDING, HEAD, StreamedModel, layer_prefix, layer_weights
from quantspec.calibrate.quantize.transforms.registry import model_transform
from quantspec.calibrate.quantize.work import WorkFolder, fingerprint, report_fingerprint
from quantspec.errors import Interrupted, ModelError, ResourceError, UsageError
from quantspec.kernels.memory import give_back_the_rest, peak_bytes
from quantspec.models import atomic
from quantspec.models.config import KV_CALIBRATED, read_config
from quantspec.models.load import usable_device
from quantspec.models.quantization import EMBEDDING_MODULE
from quantspec.models.tensors import TensorInfo, TensorStore

OnEvent = Callable[[Event], None]
_LESS = "lower --num-samples, --eval-samples or --seq-len"


def run(config: QuantizeConfig, on_event: OnEvent | None = None) -> QuantizeReport:
    """Quantize ``config.model`` into ``config.out`` and say what came out; ``on_event`` hears of every linear layer.

    The result is a folder in compressed-tensors' form. A run that was cut goes on from its finished layers
    and ends with the same bytes (given as many threads). Raises ``ModelError``, ``UsageError``, ``ResourceError``, or
    ``Interrupted`` after Ctrl-C.
    """
    give_back_freed_blocks()
    try:
        with torch.no_grad():
            return _Run(config, on_event or (lambda event: None)).run()
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise ResourceError("out of memory while quantizing", hint=_LESS) from error
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):  # what the CPU allocator says
            raise
        raise ResourceError("out of memory while quantizing", hint=_LESS) from error
    except KeyboardInterrupt as error:
        hint = "run the same command again to go on from them"
        raise Interrupted("interrupted; finished layers are kept", hint=hint) from error


class _Run:
    """One run: its inputs, and the counters behind its events."""

    def __init__(self, config: QuantizeConfig, on_event: OnEvent) -> None:
        device, self.lowered = usable_device(config.device)
        self.config = config = replace(config, device=device)
        self.on_event = on_event
        self.source = StreamedModel(config.model, config.device)
        atomic.verify_manifest(config.model)
        self.plan = Plan.of(config, self.source)
        if self.plan.nf4:
            nf4.require()
        if config.backend == "gptqmodel":
            by_gptqmodel.require()
        self.transform = model_transform(config, self.source)
        self.pipeline = LayerPipeline(config, self.plan, self.transform, self._on_result)
        if config.bits_per_weight is not None:
            narrowest(config, self.plan, linear_sizes(self.source))  # refuses a budget that cannot be met
        self.sensitivity: list[Sensitivity] = []
        self.tried: list[Trial] = []
        self.done, self.started = 0, time.perf_counter()
        self.notes: list[str] = []
        self.told: set[str] = set()

    def run(self) -> QuantizeReport:
        config = self.config
        for line in self.lowered:
            self._say("note", line)
        if config.seq_len > (limit := self.source.config.max_positions):
            self._say("note", f"rows of text are {limit} tokens long, all that the model has positions for")
        calibration = None
        if config.calibration is not None and not self.pipeline.calibrated:
            self._say("note", f"{config.method} reads no calibration text: {config.calibration} is left alone")
        if self.pipeline.calibrated:
            calibration = self._rows(config.calibration or data.CALIBRATION, self.pipeline.num_samples, config.seed)
        held_out = (
            self._rows(config.held_out or data.HELD_OUT, config.eval_samples, None) if config.eval_samples else None
        )
        identity = fingerprint(config, self.source.store.files, calibration)
        seal = report_fingerprint(identity, held_out)
        if any(config.out.iterdir()) if config.out.is_dir() else config.out.exists():
            finished = _finished(config.out, seal)
            self._say("note", f"{config.out} is already the result of these settings")
            return finished
        check_room(config.out, self.plan, self.source)
        with WorkFolder(config.out, identity, self.source.config.num_layers, config.resume) as work:
            return self._work(work, seal, calibration, held_out)

    def _work(self, work: WorkFolder, seal: str, calibration: Tensor | None, held_out: Tensor | None) -> QuantizeReport:
        """Quantize, write and measure, in ``work``; the report's fingerprint is ``seal``."""
        config = self.config
        if work.discarded:
            self._say("note", "starting over: the parts of the unfinished run are dropped")
        measured = work.path / ".quantspec_sensitivity.json"
        if config.bits_per_weight is not None and calibration is not None:
            self._say("note", "measuring what each layer costs in few bits")
            self.plan, self.sensitivity = assign(config, self.plan, self.source, calibration, measured)
            self.pipeline.plan = self.plan
        chosen = work.path / ".quantspec_choice.json"
        if config.method == "auto" and calibration is not None:
            calibration = self._choose_method(calibration, chosen)
        if config.backend == "gptqmodel":
            layers = self._quantize_by_gptqmodel(work, calibration)
        else:
            layers = self._quantize(work, calibration)
        work.complete()
        result = self._report(work, layers, calibration, held_out)
        atomic.write_json(work.path / report.REPORT, {"fingerprint": seal} | result.to_json())
        atomic.write_bytes(work.path / report.PAGE, html(result).encode())
        measured.unlink(missing_ok=True)
        chosen.unlink(missing_ok=True)
        work.finish()
        return result

    def _quantize(self, work: WorkFolder, calibration: Tensor | None) -> list[LayerResult]:
        self._quantize_layers(work, calibration)
        self._write_rest(work)
        self._round_for_acceptance(work, calibration)
        return [result for layer in work.results for result in layer]

    def _quantize_by_gptqmodel(self, work: WorkFolder, calibration: Tensor | None) -> list[LayerResult]:
        assert calibration is not None
        self._note("gptqmodel quantizes the whole model at once: it shows no layers and cannot be resumed")
        by_gptqmodel.quantize(self.config, self.plan, calibration, work.path)
        layers = []
        for result in by_gptqmodel.results(self.source, work.path):
            layers.append(result)
            self._on_result(result)
        return layers

    def _choose_method(self, calibration: Tensor, file: Path) -> Tensor | None:
        """Settle what "auto" stands for; the calibration rows that it reads."""
        method, self.tried = auto.choose(self.config, self.plan, self.source, calibration, file, self._note)
        self.config = replace(self.config, method=method)
        self.pipeline = LayerPipeline(self.config, self.plan, self.transform, self._on_result)
        return calibration[: self.pipeline.num_samples] if self.pipeline.calibrated else None

    def _rows(self, path: Path, num_rows: int, seed: int | None) -> Tensor:
        tokenizer = data.load_tokenizer(self.config.model)
        eos = next(iter(self.source.config.eos_ids), None)
        length = min(self.config.seq_len, self.source.config.max_positions)
        calibrating = seed is not None
        texts = self._documents(path) if calibrating else data.load_documents(path)
        rows = data.token_rows(texts, tokenizer, eos, length, num_rows, seed)
        if calibrating and rows.shape[1] < length:
            raise ModelError(
                f"the calibration text {path} has {rows.shape[1]} tokens, and one row takes {length}",
                hint="give more text, or lower --seq-len",
            )
        if calibrating and len(rows) < num_rows and self.config.calibration is not None:
            self._say("note", f"the calibration text fills {len(rows)} of {num_rows} rows")
        if int(rows.max()) >= self.source.config.vocab_size:
            raise ModelError(f"the tokenizer in {self.config.model} has tokens that the model's vocabulary lacks")
        return rows

    def _documents(self, path: Path) -> Sequence[data.Document]:
        """The calibration text, in the model's chat template where it is a chat and there is one."""
        column = self.config.calibration_column if self.config.calibration is not None else None
        return data.load_documents(path, column, data.chat_of(self.config.model))

    def _quantize_layers(self, work: WorkFolder, calibration: Tensor | None) -> None:
        hidden = None if calibration is None else self.source.embed(calibration)
        if hidden is not None and self.transform is not None:
            hidden = self.transform.hidden(hidden)
        finished = work.results
        if finished:
            self.done = sum(len(results) for results in finished)
            self._say("resume", f"resuming after {len(finished)} of {self.source.config.num_layers} layers")
        with deferred_interrupt() as interrupted:
            for index in range(self.source.config.num_layers):
                if index < len(finished):
                    if hidden is not None:
                        self._advance(self._finished_layer(work, index), hidden)
                else:
                    self._quantize_layer(work, index, hidden)
                if interrupted():
                    raise KeyboardInterrupt

    def _finished_layer(self, work: WorkFolder, index: int) -> DecoderLayer:
        store = TensorStore(work.path, [work.shard(index)])
        weights = layer_weights(store, self.source.config, index, self.plan.quantization, self.config.device)
        return DecoderLayer(self.source.config, index, weights)

    def _advance(self, layer: DecoderLayer, hidden: Tensor) -> None:
        for batch in batches(hidden):
            batch.copy_(layer.forward(batch.to(self.config.device)))

    def _quantize_layer(self, work: WorkFolder, index: int, hidden: Tensor | None) -> None:
        """Quantize decoder layer ``index``, record it, and move ``hidden [S, T, H]`` (in place) past it."""
        work.record(*self.pipeline.quantize(self.source.layer(index), index, self.source.store, hidden))

    def _on_result(self, result: LayerResult) -> None:
        self.done += 1
        give_back_the_rest()
        self._say("layer", result=result)
        if result.fallback_reason:
            self._say("note", f"{result.name}: round-to-nearest, because {result.fallback_reason}")
        for transform, found in result.scaled.items():
            if isinstance(found, str) and found not in self.told:
                self.told.add(found)
                self._say("note", f"{transform} leaves the inputs of {result.name} and its like alone: {found}")

    def _write_rest(self, work: WorkFolder) -> None:
        """Write all tensors outside the decoder layers, and the small files."""
        model = self.source
        prefixes = tuple(layer_prefix(index) for index in range(model.config.num_layers))
        names = [name for name in model.store if not name.startswith(prefixes)]
        if model.config.tied and HEAD in names:  # a stale copy that loaders of tied models warn about
            names.remove(HEAD)
        # What is only copied never enters memory: for a large vocabulary it is more than a decoder layer.
        tensors: dict[str, Tensor | TensorInfo] = {name: model.store.info(name) for name in names}
        raw = read_config(self.config.model)
        if self.transform is not None:
            tensors |= self.transform.rest({name: model.store.get(name) for name in names})
            raw = self.transform.config(raw, work.path)
        if self.config.kv_cache_dtype != "auto":
            raw |= {KV_CALIBRATED: True}
        dtype = str(tensors[EMBEDDING].dtype).removeprefix("torch.")
        vocabulary = vocabulary_schemes(self.config, bool(raw.get("tie_word_embeddings", False)), dtype)
        for module, scheme in vocabulary.items():
            stored = tensors.pop(f"{module}.weight")
            weight = model.store.get(f"{module}.weight") if isinstance(stored, TensorInfo) else stored
            tensors |= checkpoint.vocabulary_tensors(module, weight, scheme, self.plan.format)
        if EMBEDDING_MODULE in vocabulary:
            self._say("note", "its embedding is quantized: quantspec reads that, other engines do not")
        atomic.save_tensors(work.shard(model.config.num_layers), tensors)
        plan = replace(self.plan, vocabulary=vocabulary)
        checkpoint.write_small_files(self.config.model, work.path, raw, plan)

    def _round_for_acceptance(self, work: WorkFolder, calibration: Tensor | None) -> None:
        """The last stage of a drafter, unless an interrupted run has done it."""
        target, config = self.config.target, self.config
        if target is None:
            return
        assert calibration is not None
        if config.calibration is None:
            self._note("the bundled text is not the target's own: give text that it wrote as --calibration")
        if work.acceptance is None:
            self._say("evaluate", f"rounding for acceptance by {target}")
            quantized, found = tune(work.path, target, calibration, config.options, config.seed, config.device)
            shards = []
            for index in range(self.source.config.num_layers):
                store = TensorStore(work.path, [work.shard(index)])
                tensors = {name: store.get(name) for name in store}
                for name in quantized.keys() & self.plan.schemes.keys():
                    if name.startswith(layer_prefix(index)):
                        stored = checkpoint.STORED[self.plan.format](quantized[name])
                        tensors |= {f"{name}.{suffix}": tensor.cpu() for suffix, tensor in stored.items()}
                shards.append(tensors)
            work.replace_layers(shards, found)
        assert work.acceptance is not None
        self._note(
            f"acceptance on calibration text kept apart: {work.acceptance.before:.1%} before the last stage, "
            f"{work.acceptance.after:.1%} after it; errors of layers are from before"
        )

    def _report(
        self, work: WorkFolder, layers: list[LayerResult], calibration: Tensor | None, held_out: Tensor | None
    ) -> QuantizeReport:
        config, after = self.config, TensorStore(work.path)
        peak, measured = peak_bytes(), {}
        if held_out is not None:
            self._say("evaluate", f"comparing both models on {held_out.numel()} held-out tokens")
            measured = report.against_parent(config, work.path, held_out, self._note)
            if config.kv_cache_dtype != "auto":
                self._say("evaluate", f"measuring what keys and values in {config.kv_cache_dtype} cost")
            measured["kv_cache"] = report.of_kv_cache(config, work.path, held_out, self._note)
        return QuantizeReport(
            out=str(config.out),
            bytes_before=self.source.store.nbytes(),
            bytes_after=after.nbytes(),
            peak_bytes=peak,
            tensor_bytes=self.pipeline.tensor_bytes,
            bits_per_weight=None if self.plan.nf4 else mean_bits(self.plan.schemes, linear_sizes(self.source)),
            sensitivity=self.sensitivity,
            tried=self.tried,
            layers=layers,
            bytes_by_part=report.bytes_by_part(self.source.store, after),
            settings=report.settings(config),
            calibration=report.text_report(config.calibration, calibration),
            held_out=report.text_report(config.held_out, held_out),
            seconds=time.perf_counter() - self.started,
            notes=self.notes,
            acceptance=work.acceptance,
            **measured,
        )

    def _note(self, message: str) -> None:
        self._say("note", message)

    def _say(self, stage: Stage, message: str = "", result: LayerResult | None = None) -> None:
        if stage == "note":
            self.notes.append(message)
        self.on_event(Event(stage, self.done, len(self.plan.schemes), result, message))


def _finished(out: Path, seal: str) -> QuantizeReport:
    """The report of an output that the same settings have already made. Raises ``UsageError`` for anything else
    there."""
    try:
        found, finished = report.read_report(out / report.REPORT)
        same = found == seal and atomic.verify_manifest(out)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ModelError):
        same = False
    if not same:
        raise UsageError(f"{out} exists already and is not empty", hint="remove it, or choose another --out")
    with atomic.writing(out):
        (out / atomic.PROGRESS).unlink(missing_ok=True)  # of a run that was killed after it had renamed the folder
    return finished
