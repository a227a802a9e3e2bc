"""One decoder layer through the pipeline: transform it, then, stage by stage, observe inputs, round, and run on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace

from torch import Tensor

from quantspec.calibrate.quantize.checkpoint import STORED
from quantspec.calibrate.quantize.config import LayerResult, QuantizeConfig
from quantspec.calibrate.quantize.evaluate import batches
from quantspec.calibrate.quantize.layer import PROJECTIONS, STAGES, DecoderLayer
from quantspec.calibrate.quantize.methods.base import ForeignSolution, Solution, all_finite
from quantspec.calibrate.quantize.methods.registry import METHODS
from quantspec.calibrate.quantize.observe import Statistics
from quantspec.calibrate.quantize.plan import Plan
from quantspec.calibrate.quantize.stream import layer_prefix
from quantspec.calibrate.quantize.transforms.base import ModelTransform
from quantspec.calibrate.quantize.transforms.registry import LAYER_TRANSFORMS
from quantspec.errors import ModelError
from quantspec.models.tensors import TensorStore
from quantspec.numerics.affine import dequantize
from quantspec.numerics.scheme import Scheme


class LayerPipeline:
    """Quantizes decoder layers in order. ``tensor_bytes`` is the largest sum of weights, Hessian and activations that
    was held; ``on_result`` hears of every linear layer."""

    def __init__(
        self,
        config: QuantizeConfig,
        plan: Plan,
        model_transform: ModelTransform | None,
        on_result: Callable[[LayerResult], None],
    ) -> None:
        self.config, self.plan, self.on_result = config, plan, on_result
        self.method = METHODS[config.recipe.rounding]
        self.transforms = {name: LAYER_TRANSFORMS[name] for name in config.transforms}
        self.model_transform = model_transform
        self.tensor_bytes = 0

    @property
    def num_samples(self) -> int:
        """Calibration rows to read."""
        limit = None if self.transforms else self.method.max_samples
        return min(self.config.num_samples, limit or self.config.num_samples)

    @property
    def calibrated(self) -> bool:
        """Whether calibration text is read at all."""
        return bool(self.method.needs or self.transforms or self.config.bits_per_weight)

    def quantize(
        self, layer: DecoderLayer, index: int, store: TensorStore, hidden: Tensor | None
    ) -> tuple[dict[str, Tensor], list[LayerResult]]:
        """The tensors to store for decoder layer ``index`` (``store`` holds the original's) and how its linear layers
        came out. ``layer`` ends with the weights as stored, and ``hidden [S, T, H]`` (in place) past the layer.
        """
        changed, scaled = self._transform(layer, index, hidden)
        tensors = self._kept(layer, index, store, changed)
        results: list[LayerResult] = []
        # zip asks for the stage after the last, with which the states move past the layer.
        inputs = stage_inputs(layer, hidden, self.config.device) if hidden is not None else [None] * len(STAGES)
        for stage, batches_in in zip(STAGES, inputs, strict=True):
            started = time.perf_counter()
            statistics = self._observe(layer, stage, hidden, batches_in)
            for short in stage:
                name = layer_prefix(index) + short
                if name not in self.plan.schemes:
                    continue
                scheme = self.plan.schemes[name]
                weight = layer.weights[f"{short}.weight"]
                solution = self.method.quantize_linear(name, weight, scheme, statistics, self.config.options)
                layer.weights[f"{short}.weight"], stored = self._as_stored(solution)
                tensors |= {f"{name}.{suffix}": tensor for suffix, tensor in stored.items()}
                seconds, started = time.perf_counter() - started, time.perf_counter()
                results.append(replace(solution.result(name, seconds), scaled=scaled[short]))
                self.on_result(results[-1])
        if hidden is not None and not all_finite(hidden):
            raise ModelError(f"layer {index} of {self.config.model} gives NaN or Inf on the calibration text")
        return tensors, results

    def _as_stored(self, solution: Solution | ForeignSolution) -> tuple[Tensor, dict[str, Tensor]]:
        """The weight that it stands for, and the tensors that hold it, by their suffix."""
        if isinstance(solution, ForeignSolution):
            return solution.dense, solution.tensors
        return dequantize(solution.quantized), STORED[self.plan.format](solution.quantized)

    def _transform(
        self, layer: DecoderLayer, index: int, hidden: Tensor | None
    ) -> tuple[set[str], dict[str, dict[str, float | str]]]:
        """Apply all transforms to ``layer``; the tensors that they changed, and ``LayerResult.scaled`` by linear
        layer."""
        changed: set[str] = set()
        scaled: dict[str, dict[str, float | str]] = {name: {} for name in PROJECTIONS}
        if self.model_transform is not None:
            changed |= set(self.model_transform.layer(layer))

        def scheme_of(short: str) -> Scheme | None:
            return self.plan.schemes.get(layer_prefix(index) + short)

        for name, transform in self.transforms.items():
            assert hidden is not None
            folded = transform(layer, hidden, scheme_of, self.config.options)
            changed |= folded.changed
            for linear, found in folded.sites.items():
                scaled[linear][name] = found
        return changed, scaled

    def _kept(self, layer: DecoderLayer, index: int, store: TensorStore, changed: set[str]) -> dict[str, Tensor]:
        """The tensors of the layer that stay unquantized, in their stored type; ``layer`` computes with what is
        stored."""
        prefix, schemes, tensors = layer_prefix(index), self.plan.schemes, {}
        for name in store:
            if not name.startswith(prefix) or (name.endswith(".weight") and name.removesuffix(".weight") in schemes):
                continue
            short = name.removeprefix(prefix)
            if short in changed:
                tensors[name] = layer.weights[short].to("cpu", store.info(name).dtype)
                layer.weights[short] = tensors[name].to(layer.weights[short])
            else:
                tensors[name] = store.get(name)
        return tensors

    def _observe(
        self, layer: DecoderLayer, stage: tuple[str, ...], hidden: Tensor | None, inputs: Iterator[Tensor] | None
    ) -> Statistics:
        """What the method needs of a stage's inputs, which all run by."""
        if hidden is None or inputs is None:
            return Statistics()
        k = layer.weights[f"{stage[0]}.weight"].shape[1]
        rows = hidden.shape[0] * hidden.shape[1]
        statistics = Statistics.of(self.method.needs, k, self.config.device, rows).add_all(inputs)
        held = sum(weight.nbytes for weight in layer.weights.values()) + statistics.nbytes + 2 * hidden.nbytes
        self.tensor_bytes = max(self.tensor_bytes, held)
        return statistics


def stage_inputs(layer: DecoderLayer, hidden: Tensor, device: str) -> Iterator[Iterator[Tensor]]:
    """For each of ``STAGES``, the batches its linear layers read.

    Whoever takes a stage's batches puts the quantized weights into ``layer`` before taking the next stage's, which pass
    through them. ``hidden [S, T, H]`` moves, in place, past the attention and, when all stages are taken, past the
    layer.
    """
    config = layer.config
    attended = hidden.new_empty(*hidden.shape[:2], config.num_heads * config.head_dim)

    def attention_outputs(attended: Tensor) -> Iterator[Tensor]:
        for states, out in zip(batches(hidden), batches(attended), strict=True):
            out.copy_(layer.attend(layer.attention_input(states.to(device))))
            yield out.to(device)

    def mlp_inputs(attended: Tensor) -> Iterator[Tensor]:
        for states, out in zip(batches(hidden), batches(attended), strict=True):
            states.copy_(states.to(device) + layer.linear("self_attn.o_proj", out.to(device)))
            yield layer.mlp_input(states.to(device))

    yield (layer.attention_input(states.to(device)) for states in batches(hidden))
    yield attention_outputs(attended)
    yield mlp_inputs(attended)
    room = attended.nbytes
    del attended  # the widest Hessian, of the last stage, takes its place
    # Inputs of down_proj are read twice, to quantize it and to run it: those that have room are not computed anew.
    kept: dict[int, Tensor] = {}

    def down_inputs() -> Iterator[Tensor]:
        for number, states in enumerate(batches(hidden)):
            inputs = layer.gated(layer.mlp_input(states.to(device)))
            if not kept or (len(kept) + 1) * inputs.nbytes <= room:
                kept[number] = inputs
            yield inputs

    yield down_inputs()
    for number, states in enumerate(batches(hidden)):
        inputs = kept.pop(number) if number in kept else layer.gated(layer.mlp_input(states.to(device)))
        states.copy_(states.to(device) + layer.linear("mlp.down_proj", inputs))
