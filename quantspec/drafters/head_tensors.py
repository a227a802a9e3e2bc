"""Tensors of a drafter's folder, dense or quantized (``quantspec quantize``), by the names of an unquantized head."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from quantspec.errors import ModelError
from quantspec.models.config import config_source, read_config
from quantspec.models.quantization_config import read_quantization
from quantspec.models.stored import LAYOUTS, quantized_parts, read_quantized
from quantspec.models.tensors import TensorStore
from quantspec.models.weights import to_dense
from quantspec.numerics.affine import QuantizedWeight

Matrix = Tensor | QuantizedWeight
"""A weight ``[N, K]`` as it is stored."""
_WEIGHT = ".weight"


class HeadTensors(dict[str, Tensor]):
    """Dense tensors by name. ``packed`` has those that are stored quantized as they are; under their names stands what
    they are worth, in fp32."""

    def __init__(self, tensors: Mapping[str, Tensor], packed: Mapping[str, QuantizedWeight]) -> None:
        super().__init__(tensors)
        self.packed = dict(packed)


def stored(tensors: Mapping[str, Tensor], name: str) -> Matrix:
    """One weight, quantized where its file has it so."""
    packed = tensors.packed if isinstance(tensors, HeadTensors) else {}
    return packed.get(name, tensors[name])


class HeadStore:
    """The tensors of a folder: ``x.weight`` also where it is stored in quantized parts. Raises ``ModelError`` as
    ``TensorStore`` and ``read_quantized`` do."""

    def __init__(self, folder: Path, files: Sequence[Path] | None = None) -> None:
        self.folder, self._store = folder, TensorStore(folder, files)
        self._packed: dict[str, QuantizedWeight] = {}
        quantization, parts = read_quantization(read_config(folder), config_source(folder)), set[str]()
        first = tuple(f".{layout.parts[0]}" for layout in LAYOUTS.values())
        for name in self._store:
            module = next((name.removesuffix(end) for end in first if name.endswith(end)), None)
            weight = None if module is None else read_quantized(self._store, module, quantization)
            if module is None or weight is None:
                continue
            if not torch.isfinite(weight.scale).all():
                raise ModelError(f"{folder}: the scales of {module} are not finite", hint="quantize the head again")
            self._packed[module + _WEIGHT] = weight
            parts.update(f"{module}.{suffix}" for suffix in quantized_parts(self._store, module))
        self._dense = [name for name in self._store if name not in parts]

    def __iter__(self) -> Iterator[str]:
        yield from (*self._dense, *self._packed)

    def __contains__(self, name: object) -> bool:
        return name in self._dense or name in self._packed

    def shape(self, name: str) -> tuple[int, ...]:
        """Raises ``ModelError``: there is no such tensor."""
        weight = self._packed.get(name)
        return self._store.shape(name) if weight is None else tuple(weight.codes.shape)

    def read(self, names: Mapping[str, str]) -> HeadTensors:
        """Tensors by the names they are to have; ``names`` maps these to those in the folder. Raises ``ModelError``: a
        weight or bias that is not of finite numbers, with which a head runs and is never right."""
        packed = {own: self._packed[name] for own, name in names.items() if name in self._packed}
        dense = {own: self._store.get(name) for own, name in names.items() if own not in packed}
        for own, tensor in dense.items():
            # isfinite knows no 8-bit floats.
            numbers = tensor.float() if tensor.element_size() == 1 else tensor
            if tensor.dtype == torch.float64:
                dense[own] = tensor.float()
            if not own.endswith((_WEIGHT, ".bias")):
                continue
            if not tensor.is_floating_point():
                kind = str(tensor.dtype).removeprefix("torch.")
                raise ModelError(f"{self.folder}: tensor {names[own]} has {kind} values, which no weight can have")
            if not numbers.isfinite().all():
                hint = "train the head again with a lower --lr, or download it again"
                raise ModelError(f"{self.folder}: tensor {names[own]} does not hold finite numbers", hint=hint)
        return HeadTensors({**dense, **{own: to_dense(weight) for own, weight in packed.items()}}, packed)
