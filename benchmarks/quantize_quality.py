"""How much held-out loss quantization costs, each method against round-to-nearest, on the same tokens.

    python -m quantspec.benchmarks.quantize_quality MODEL_FOLDER --bits 4 3 --methods mse gptq

prints one JSON object. Per width and method: the loss increase over the dense model (nats per token), its share of
round-to-nearest's and that ratio's 95% interval. The interval is a percentile bootstrap over rows of text (512 tokens
each), which keeps the pairing: every resample weighs the same rows for the dense model and for both methods.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantspec.calibrate import data
from quantspec.calibrate.quantize.config import RECIPES, MethodName, QuantizeConfig
from quantspec.calibrate.quantize.evaluate import hidden_states, log_probs
from quantspec.calibrate.quantize.run import run
from quantspec.calibrate.quantize.stream import StreamedModel
from quantspec.models.config import ModelConfig

_RESAMPLES = 10_000


@torch.no_grad()
def losses(folder: Path, rows: Tensor, device: str) -> Tensor:
    """Negative log-likelihood in nats of each token but the first of ``rows [S, T]``: ``[S, T - 1]``."""
    model = StreamedModel(folder, device)
    states = hidden_states(model, rows)
    head = model.head()
    found = []
    for row, ids in zip(states, rows, strict=True):
        logs = log_probs(row[:-1].to(device), head)
        found.append(-logs.gather(1, ids[1:, None].to(device))[:, 0].cpu())
    return torch.stack(found)


def ratio_interval(increase: Tensor, rtn: Tensor, seed: int = 0) -> tuple[float, float]:
    """95% bootstrap interval of ``increase.mean() / rtn.mean()`` for paired loss increases per row ``[S]``."""
    picks = torch.randint(len(rtn), (_RESAMPLES, len(rtn)), generator=torch.Generator().manual_seed(seed))
    ratios = increase[picks].mean(1) / rtn[picks].mean(1)
    low, high = ratios.quantile(ratios.new_tensor([0.025, 0.975])).tolist()
    return low, high


def compare_methods(
    config: QuantizeConfig, methods: Sequence[MethodName], rows: Tensor, dense: Tensor
) -> dict[str, Any]:
    """Methods at one width, each against round-to-nearest; ``dense [S, T - 1]`` are the parent's losses on
    ``rows [S, T]``."""
    increase = {}
    for method in dict.fromkeys(("rtn", *methods)):
        with tempfile.TemporaryDirectory() as folder:
            rotate = config.rotate and method != "rtn"  # the measure of all
            run(replace(config, method=method, rotate=rotate, out=Path(folder) / "out"))
            after = losses(Path(folder) / "out", rows, config.device)
        increase[method] = (after - dense).double().mean(1)
        print(f"{method}, {config.bits} bits: +{increase[method].mean():.5f} nats per token", file=sys.stderr)
    rtn = increase["rtn"]
    return {
        "bits": config.bits,
        "group_size": config.group_size,
        "methods": {
            method: {
                "increase": float(rise.mean()),
                "ratio": float(rise.mean() / rtn.mean()),
                "ratio_95": ratio_interval(rise, rtn),
            }
            for method, rise in increase.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3])
    parser.add_argument("--methods", choices=list(RECIPES), nargs="+", default=["mse", "gptq"])
    parser.add_argument("--rows", type=int, default=128, help="held-out rows of --seq-len tokens")
    parser.add_argument("--held-out", type=Path, default=data.HELD_OUT)
    parser.add_argument("--rotate", action="store_true", help="as `quantspec quantize --rotate`, but round-to-nearest")
    for name in ("group_size", "calibration", "num_samples", "seq_len", "device"):
        default = getattr(QuantizeConfig, name)
        kind = Path if default is None else type(default)
        parser.add_argument("--" + name.replace("_", "-"), type=kind, default=default)
    given = vars(parser.parse_args())
    model, widths, methods = given.pop("model"), given.pop("bits"), given.pop("methods")
    count, held_out = given.pop("rows"), given.pop("held_out")
    config = QuantizeConfig(model, Path(), eval_samples=0, **given)

    eos = next(iter(ModelConfig.load(model).eos_ids), None)
    texts, tokenizer = data.load_texts(held_out), data.load_tokenizer(model)
    rows = data.token_rows(texts, tokenizer, eos, config.seq_len, count, None)
    dense = losses(model, rows, config.device)
    results = [compare_methods(replace(config, bits=bits), methods, rows, dense) for bits in widths]
    found = {"model": str(model), "tokens": dense.numel(), "loss_before": float(dense.mean()), "results": results}
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
