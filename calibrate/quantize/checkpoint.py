"""The quantized checkpoint's small files: config, index and sidecars, in compressed-tensors ``pack-quantized`` form."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quantspec.models import atomic
from quantspec.models.tensors import INDEX, read_header
from quantspec.numerics.scheme import CHANNEL, Scheme

_SIDECARS = (".json", ".jinja", ".txt", ".model")
_OWN = ("config.json", INDEX, atomic.MANIFEST)


def quantization_config(scheme: Scheme, ignore: Sequence[str]) -> dict[str, Any]:
    """What vLLM, SGLang and transformers read. ``ignore`` names real modules. No ``actorder`` key: the order was
    static, and naming it makes loaders look for indices."""
    weights: dict[str, Any] = {"num_bits": scheme.bits, "type": "int", "symmetric": scheme.symmetric, "dynamic": False}
    if scheme.group_size == CHANNEL:
        weights |= {"strategy": "channel"}
    else:
        weights |= {"strategy": "group", "group_size": scheme.group_size}
    group = {"targets": ["Linear"], "input_activations": None, "output_activations": None, "weights": weights}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "kv_cache_scheme": None,
        "ignore": list(ignore),
        "config_groups": {"group_0": group},
    }


def write_small_files(model: Path, folder: Path, raw: dict[str, Any], scheme: Scheme, ignore: Sequence[str]) -> None:
    """Write ``config.json`` (``raw`` is the dense model's), the shard index and copies of the model's tokenizer,
    template and licence files."""
    atomic.write_json(folder / "config.json", raw | {"quantization_config": quantization_config(scheme, ignore)})
    weight_map, size = {}, 0
    for shard in sorted(folder.glob("model-*.safetensors")):
        for name, info in read_header(shard).items():
            weight_map[name] = shard.name
            size += info.end - info.begin
    atomic.write_json(
        folder / INDEX, {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    )
    for path in sorted(model.iterdir()):
        wanted = path.suffix in _SIDECARS or path.name.startswith(("LICENSE", "NOTICE"))
        if path.is_file() and wanted and path.name not in _OWN:
            atomic.copy_file(path, folder / path.name)
