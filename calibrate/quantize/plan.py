"""What will be quantized, decided and checked before any work is done."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from quantspec.calibrate.quantize.config import QuantizeConfig
from quantspec.calibrate.quantize.layer import PROJECTIONS, STAGES
from quantspec.calibrate.quantize.stream import StreamedModel, layer_prefix
from quantspec.errors import ModelError, UsageError
from quantspec.numerics.scheme import CHANNEL, Scheme


@dataclass(frozen=True)
class Plan:
    """``schemes`` says how each linear layer is quantized, by its full name; ``ignored`` names those kept as they are.
    ``scheme`` is what all share."""

    scheme: Scheme
    schemes: Mapping[str, Scheme]
    ignored: frozenset[str]

    @classmethod
    def of(cls, config: QuantizeConfig, model: StreamedModel) -> Plan:
        """Raises ``ModelError`` or ``UsageError`` when model and options do not go together."""
        if model.config.quantization is not None:
            raise ModelError(f"{config.model} is quantized already", hint="give its bf16 or fp16 parent")
        names = [layer_prefix(i) + name for i in range(model.config.num_layers) for name in PROJECTIONS]
        ignored = frozenset(name for name in names if any(fnmatchcase(name, pattern) for pattern in config.ignore))
        for pattern in config.ignore:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise UsageError(f"no linear layer matches --ignore {pattern}", hint=f"names look like {names[0]}")
        for i in range(model.config.num_layers):
            for stage in STAGES:
                fused = {layer_prefix(i) + name for name in stage}
                if 0 < len(fused & ignored) < len(fused):
                    raise UsageError(
                        f"--ignore splits {', '.join(sorted(fused))}, which inference engines fuse",
                        hint="ignore all or none",
                    )
        if len(ignored) == len(names):
            raise UsageError("--ignore leaves nothing to quantize")
        dtype = str(model.store.info(f"{names[0]}.weight").dtype).removeprefix("torch.")
        scheme = Scheme(config.bits, config.group_size, config.symmetric, dtype)
        for name in names:
            k = model.store.shape(f"{name}.weight")[1]
            if scheme.group_size != CHANNEL and k % scheme.group_size and name not in ignored:
                raise UsageError(
                    f"{name} has {k} input features, not a multiple of the group size {scheme.group_size}",
                    hint="choose a --group-size that divides them, or -1 for one scale per channel",
                )
        return cls(scheme, {name: scheme for name in names if name not in ignored}, ignored)
