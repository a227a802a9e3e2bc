"""Peak memory of learning P-EAGLE from one long text, by the number of parts that it is learned in.

    python -m quantspec.benchmarks.peagle_memory --length 1024 --parts 1 2 4 8 16

Each number of parts runs in a process of its own: a random base of 256 channels, a head of four layers and eight
depths, one text of random tokens, loss and gradients once. Told are the memory above what stood before (the most that
the process or the GPU ever held), the time, and how far the gradients are from those of the whole text: the largest
relative distance of any weight's gradient.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from quantspec.calibrate.train.config import PEagleConfig, Shape
from quantspec.calibrate.train.methods.peagle import PEagleMethod
from quantspec.calibrate.train.net import LlamaNet
from quantspec.calibrate.train.rollout import Batch, Rollouts
from quantspec.kernels.memory import peak_bytes

SHAPE, VOCAB, NOWHERE = Shape(hidden=256, layers=3, heads=4, kv_heads=2, mlp=768), 4096, Path()
MIB = 2**20


def setting(length: int, parts: int, device: str) -> tuple[PEagleMethod, Batch]:
    """A head with weights away from their start, and a text of ``length`` tokens with its base's streams."""
    generator = torch.Generator().manual_seed(0)
    base = LlamaNet(SHAPE, VOCAB).init_weights(0).requires_grad_(False)
    ids = torch.randint(2, VOCAB, (length,), generator=generator)
    streams = base.streams(ids[None], (0, 1, 2, "norm"))
    texts = Rollouts(ids, streams.pop("norm")[0], torch.tensor([0, length]), torch.tensor([8]), torch.zeros(1))
    config = PEagleConfig(NOWHERE, NOWHERE, NOWHERE, layer_ids=(0, 1, 2), partitions=parts)
    method = PEagleMethod(config, base.to(device), texts)
    for p in method.net.parameters():
        p.data.add_(0.02 * torch.randn(p.shape, generator=generator).to(device))
    whole = texts.batch([0])
    return method, Batch(whole.ids, whole.features, whole.lens, whole.prompt_lens, streams).to(device)


def measure(length: int, parts: int, device: str, threads: int) -> tuple[dict[str, float], list[torch.Tensor]]:
    """Memory in MiB and seconds of one loss with its gradients, and these."""
    torch.set_num_threads(threads)
    method, batch = setting(length, parts, device)
    _reset_peak(device)
    before, began = _peak(device), time.perf_counter()
    loss, _ = method.loss(batch, 0.5, torch.Generator().manual_seed(1))
    loss.backward()
    seconds = time.perf_counter() - began
    figures = {"peak_mib": (_peak(device) - before) / MIB, "seconds": seconds, "loss": float(loss.detach())}
    return figures, [p.grad.cpu() for p in method.net.parameters() if p.grad is not None]


def _reset_peak(device: str) -> None:
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts anew from what is held now


def _peak(device: str) -> int:
    """Bytes."""
    return torch.cuda.max_memory_allocated() if device != "cpu" else peak_bytes()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=1024, help="tokens of the text")
    parser.add_argument("--parts", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    whole: list[torch.Tensor] = []
    for parts in options.parts:
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            figures, gradients = pool.submit(measure, options.length, parts, options.device, options.threads).result()
        whole = whole or gradients
        distance = max(float((a - b).norm() / a.norm()) for a, b in zip(whole, gradients, strict=True))
        rows.append({"parts": parts, **figures, "gradient_distance": distance})
        print(json.dumps(rows[-1]), flush=True)


if __name__ == "__main__":
    main()
