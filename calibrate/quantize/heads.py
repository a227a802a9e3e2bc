"""Quantize a drafter's head: every linear layer to a few bits, on inputs that text through its target gives it, and its
LM head to a few bits or to the rows of the commonest tokens.

Layers are rounded in the order they run, each on inputs that passed those before it. The result has the tensors' names
of the original and compressed-tensors' ``pack-quantized`` form, so whatever reads the one reads the other.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from quantspec.calibrate.quantize import checkpoint, report
from quantspec.calibrate.quantize.config import Event, LayerResult, QuantizeReport
from quantspec.calibrate.quantize.head_config import HeadQuantizeConfig
from quantspec.calibrate.quantize.head_kinds import Eagle, Head, open_head
from quantspec.calibrate.quantize.head_text import Text
from quantspec.calibrate.quantize.methods.base import Solution
from quantspec.calibrate.quantize.methods.registry import METHODS
from quantspec.calibrate.quantize.observe import Hessian, Statistics
from quantspec.calibrate.quantize.plan import Plan
from quantspec.calibrate.train.checkpoint import load_net
from quantspec.calibrate.train.net import LlamaNet
from quantspec.calibrate.train.vocabulary import membership, offsets
from quantspec.errors import ModelError, UsageError
from quantspec.kernels.memory import peak_bytes
from quantspec.models import atomic
from quantspec.models.config import read_config
from quantspec.models.load import usable_device
from quantspec.models.quantization import HEAD_MODULE
from quantspec.models.tensors import TensorStore
from quantspec.numerics.affine import dequantize
from quantspec.numerics.packing import pack_weight
from quantspec.numerics.scheme import Scheme

OnEvent = Callable[[Event], None]


@torch.no_grad()
def run(config: HeadQuantizeConfig, on_event: OnEvent | None = None) -> QuantizeReport:
    """Quantize the head ``config.model`` into ``config.out`` and say what came out. Raises ``ModelError`` or
    ``UsageError`` before anything is written."""
    if config.out.exists() and (not config.out.is_dir() or any(config.out.iterdir())):
        raise UsageError(f"{config.out} exists already and is not empty", hint="remove it, or choose another --out")
    device, lowered = usable_device(config.device)
    return _Run(replace(config, device=device), on_event or (lambda event: None), list(lowered)).run()


class _Run:
    def __init__(self, config: HeadQuantizeConfig, on_event: OnEvent, notes: list[str]) -> None:
        self.config, self.on_event, self.notes, self.started = config, on_event, list[str](), time.perf_counter()
        self.raw, self.done = read_config(config.model), 0
        self.samples: list[tuple[Tensor, list[Tensor]]] = []
        if "quantization_config" in self.raw:
            raise ModelError(f"{config.model} is quantized already", hint="give the head that it was made from")
        atomic.verify_manifest(config.model)
        for note in notes:
            self._note(note)
        self.head: Head = open_head(config.model, self.raw)
        self.names: dict[str, str] = {}
        self.rows: Tensor | None = None
        """Those that its vocabulary keeps, if some are dropped."""
        self.base = self._base()
        self.text = self._text()
        self._settle_lm_head()
        self.head.net.to(config.device)
        self.method = self._method()

    def run(self) -> QuantizeReport:
        store, layers = TensorStore(self.config.model), list[LayerResult]()
        self.names = self.head.names(list(store))
        quantized: dict[str, dict[str, Tensor]] = {}
        for stage, scheme in self._stages():
            statistics = self._observe(stage[0])
            for name in stage:
                solution, seconds = self._quantize(name, scheme, statistics)
                module = self._module(name)
                quantized[module] = {part: tensor.cpu() for part, tensor in pack_weight(solution.quantized).items()}
                layers.append(solution.result(module, seconds))
                self.done += 1
                self._say("layer", result=layers[-1])
                if solution.fallback_reason:
                    self._note(f"{module}: round-to-nearest, because {solution.fallback_reason}")
        return self._write(store, quantized, layers)

    def _base(self) -> LlamaNet | None:
        if self.config.target is None:
            return None
        base = load_net(self.config.target, self.config.device)
        found = (base.shape.hidden, base.vocab)
        if found != (self.head.width, self.head.vocab):
            raise ModelError(
                f"{self.config.model} was made for a target of width {self.head.width} and {self.head.vocab} tokens, "
                f"not {found[0]} and {found[1]}",
                hint="give the head's own target as --target",
            )
        return base

    def _text(self) -> Text | None:
        """The calibration text, if anything reads it."""
        config = self.config
        if config.draft_vocab is None and (self.base is None or config.method == "rtn"):
            if config.calibration is not None:
                self._note(f"nothing reads calibration text here: {config.calibration} is left alone")
            return None
        if config.target is None:
            raise UsageError("--draft-vocab counts tokens of the target's text", hint="add --target")
        if config.calibration is None:
            self._note("the bundled text is not the target's own: give text that it wrote as --calibration")
        return Text.read(config.target, config.calibration, config.calibration_column, config.seed, self.head.vocab)

    def _settle_lm_head(self) -> None:
        """Give the head its own copy of its target's LM head where that is to change, and drop rare tokens' rows."""
        config, head = self.config, self.head
        if isinstance(head, Eagle) and head.lm_head is None and (config.head_bits or config.draft_vocab):
            if self.base is None:
                raise UsageError("this head borrows the LM head of its target", hint="add --target")
            head.borrow(self.base.head_weight)
        if config.draft_vocab is None:
            return
        assert self.text is not None
        lm_head = head.lm_head
        if lm_head is None:
            raise UsageError("Medusa heads have their vocabulary from their training", hint="leave --draft-vocab out")
        ids = torch.arange(head.vocab) if head.ids is None else head.ids
        if config.draft_vocab > len(ids):
            raise UsageError(f"a draft vocabulary of {config.draft_vocab} tokens of {len(ids)}", hint="keep fewer")
        counts = self.text.counts[ids]
        rows = counts.sort(descending=True, stable=True).indices[: config.draft_vocab].sort().values
        self._note(
            f"{len(rows)} of {len(ids)} tokens can be drafted, which are "
            f"{float(counts[rows].sum() / counts.sum().clamp(min=1)):.2%} of the text"
        )
        head.ids, self.rows = ids[rows], rows
        lm_head.weight = nn.Parameter(lm_head.weight[rows.to(lm_head.weight.device)], requires_grad=False)

    def _method(self) -> str:
        config = self.config
        if config.method == "rtn" or self.base is not None:
            return config.method
        self._note(f"{config.method} measures inputs, which takes --target: scales are searched on weights alone")
        return "mse"

    def _stages(self) -> list[tuple[tuple[str, ...], Scheme]]:
        config, dtype = self.config, self._dtype()
        scheme = Scheme(config.bits, config.group_size, config.symmetric, dtype=dtype)
        stages = [(stage, scheme) for stage in self.head.stages]
        if config.head_bits is not None:
            stages += [(stage, replace(scheme, bits=config.head_bits)) for stage in self.head.lm_stages]
        return stages

    def _dtype(self) -> str:
        """Of scales: that of the head's own weights."""
        store = TensorStore(self.config.model)
        name = self.names[f"{self.head.stages[0][0]}.weight"]
        return str(store.get(name).dtype).removeprefix("torch.")

    def _module(self, name: str) -> str:
        """What a linear layer of the net is called in the folder."""
        return self.names.get(f"{name}.weight", f"{name}.weight").removesuffix(".weight")

    def _observe(self, name: str) -> Statistics:
        """Statistics of a linear layer's inputs: of all texts, or, where none are known, of inputs that are all alike
        and independent."""
        linear = self.head.net.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        hessian = Hessian(linear.in_features, self.config.device)
        if self.base is None or self.text is None or "hessian" not in METHODS[self.method].needs:
            hessian.add(torch.eye(linear.in_features, device=self.config.device))
            return Statistics(hessian)
        watch = linear.register_forward_pre_hook(lambda module, inputs: hessian.add(inputs[0]))
        try:
            for ids, inputs in self._samples():
                self.head.observe(ids, inputs)
        finally:
            watch.remove()
        return Statistics(hessian)

    def _samples(self) -> list[tuple[Tensor, list[Tensor]]]:
        """Texts and what the target gives the head on them, computed once."""
        if not self.samples and self.base is not None and self.text is not None:
            for text in self.text.samples(self.config.num_samples, self.config.seq_len):
                ids = text.to(self.config.device)[None]
                self.samples.append((ids, self.head.inputs(self.base, ids)))
        return self.samples

    def _quantize(self, name: str, scheme: Scheme, statistics: Statistics) -> tuple[Solution, float]:
        started, linear = time.perf_counter(), self.head.net.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        method = METHODS[self.method].quantize_linear
        solution = method(name, linear.weight.detach(), scheme, statistics, self.config.options)
        assert isinstance(solution, Solution), "methods in foreign formats are not for heads"
        linear.weight = nn.Parameter(dequantize(solution.quantized), requires_grad=False)
        return solution, time.perf_counter() - started

    def _write(
        self, store: TensorStore, quantized: dict[str, dict[str, Tensor]], layers: list[LayerResult]
    ) -> QuantizeReport:
        config, head = self.config, self.head
        work = config.out.with_name(f"{config.out.name}.partial")
        shutil.rmtree(work, ignore_errors=True)
        atomic.make_folder(work)
        tensors = {name: store.get(name) for name in store if name.removesuffix(".weight") not in quantized}
        lm_head = head.lm_head
        if lm_head is not None and HEAD_MODULE not in quantized:
            kept = getattr(torch, self._dtype())
            tensors[f"{HEAD_MODULE}.weight"] = lm_head.weight.detach().to("cpu", kept)
        if self.rows is not None:
            tensors |= {name: tensors[name][self.rows] for name in head.companions}
        if head.ids is not None:
            tensors |= {"d2t": offsets(head.ids), "t2d": membership(head.ids, head.vocab)}
        for module, parts in quantized.items():
            tensors |= {f"{module}.{part}": tensor for part, tensor in parts.items()}
        atomic.save_tensors(work / "model.safetensors", tensors)
        checkpoint.copy_sidecars(config.model, work)
        atomic.write_json(work / "config.json", self._settings())
        result = QuantizeReport(
            out=str(config.out), bytes_before=store.nbytes(), bytes_after=TensorStore(work).nbytes(), layers=layers,
            peak_bytes=peak_bytes(),
            settings=report.settings(config), seconds=time.perf_counter() - self.started, notes=self.notes,
            calibration=None if self.text is None else report.text_report(config.calibration, self.text.shape_of(
                config.num_samples, config.seq_len)),
        )  # fmt: skip
        atomic.write_json(work / report.REPORT, result.to_json())
        atomic.write_manifest(work)
        atomic.rename_folder(work, config.out)
        return result

    def _settings(self) -> dict[str, Any]:
        """config.json: the head's own, and how its weights are stored."""
        last = {name for stage in self.head.lm_stages for name in stage}
        each = {name: scheme for stage, scheme in self._stages() for name in stage}
        schemes = {self._module(name): scheme for name, scheme in each.items() if name not in last}
        vocabulary = {self._module(name): scheme for name, scheme in each.items() if name in last}
        plan = Plan(schemes, frozenset(), vocabulary)
        settings = self.raw | {"quantization_config": checkpoint.quantization_config(plan)}
        if self.head.ids is not None:
            settings["draft_vocab_size"] = len(self.head.ids)
        return settings

    def _note(self, message: str) -> None:
        self._say("note", message)

    def _say(self, stage: Any, message: str = "", result: LayerResult | None = None) -> None:
        if stage == "note":
            self.notes.append(message)
        total = len(self.head.stages) if hasattr(self, "head") else 0
        self.on_event(Event(stage, self.done, total, result, message))
