"""Text that a model writes itself, with its features, to distil drafters from.

A fixed number of slots decode side by side. Each slot feeds its prompt token by token, then samples; when its text ends
it starts over with the next prompt. So there is no padding, no separate prefill, and every forward has the same shape.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import safe_open
from torch.nn import functional as F

from quantspec.calibrate.train import workers
from quantspec.calibrate.train.checkpoint import load_net
from quantspec.calibrate.train.config import RolloutConfig
from quantspec.calibrate.train.net import LlamaNet
from quantspec.calibrate.train.prompts import Prompt, prompts_of
from quantspec.calibrate.train.state import atomic_tensors
from quantspec.errors import ModelError, UsageError
from quantspec.models.atomic import make_folder
from quantspec.models.fingerprint import fingerprint as fingerprint
from quantspec.models.tensors import TensorStore
from quantspec.models.tokenizer import Tokenizer
from quantspec.types import Tap

_CHECKED = 4096  # rows of features in memory at a time
_COLUMNS = ("ids", "features", "starts", "prompt_lens", "temperatures")


@dataclass(frozen=True)
class Rollout:
    """`ids [n]` with the prompt first; `features [n, hidden]` fp16, the last row zero (that token was never fed)."""

    ids: torch.Tensor
    features: torch.Tensor
    prompt_len: int
    temperature: float


def run(config: RolloutConfig) -> dict[str, Any]:
    """Generate until the budget is spent and write the folder `config.out`; returns the numbers of texts and tokens."""
    if workers.wanted(config):
        return workers.launch(run, config)
    torch.set_num_threads(1 if workers.world() > 1 else config.run.threads)
    part = config.out / f"part-{workers.rank()}.safetensors"
    left_out = 0
    if not part.exists():
        make_folder(config.out)
        written, left_out = _write_texts(config)
        write_rollouts(part, written, fingerprint(config.model), language(config.model))
    workers.agreed(0.0)  # wait for the slower parts
    texts = read_rollouts(config.out)
    result = {"texts": len(texts), "tokens": len(texts.ids)}
    return result | {"prompts_left_out": left_out} if left_out else result


def _write_texts(config: RolloutConfig) -> tuple[list[Rollout], int]:
    """This process's share of the texts, and how many prompts no answer would fit behind."""
    tokenizer = Tokenizer(config.model)
    prompts, left_out = prompts_of(config, tokenizer)
    net = load_net(config.model, config.run.device)
    if tokenizer.vocab_size > net.vocab:
        raise ModelError(f"the tokenizer in {config.model} has tokens that the model's vocabulary lacks")
    if config.max_len > net.shape.max_positions:
        what = f"{config.model} has {net.shape.max_positions} positions, and a text may take {config.max_len}"
        raise UsageError(what, hint="lower --max-len")
    prompts = islice(prompts, workers.rank(), config.texts or None, workers.world())
    deadline = time.monotonic() + 60 * config.minutes if config.minutes else float("inf")
    done: list[Rollout] = []
    total = 0
    for text in generate(net, prompts, config, tokenizer.eos_ids):
        done.append(text)
        total += len(text.ids)
        if not config.texts and (total * workers.world() >= config.tokens or time.monotonic() > deadline):
            break
    if not done:
        raise UsageError(f"more processes than the {config.texts or 'few'} texts", hint="lower --processes")
    return done, left_out


@torch.no_grad()
def generate(
    net: LlamaNet, prompts: Iterator[Prompt], config: RolloutConfig, eos_ids: Sequence[int]
) -> Iterator[Rollout]:
    """Decode `config.slots` prompts at a time; yields each text when it ends (with one of `eos_ids`, or at `max_len`).

    A finite `prompts` is used up and every text of it is yielded.
    """
    device = net.model.norm.weight.device
    slots, generator = config.slots, torch.Generator().manual_seed(config.seed * 1009 + workers.rank())
    cache = net.new_cache(slots, config.max_len)
    texts = torch.zeros(slots, config.max_len, dtype=torch.long)
    features = torch.zeros(slots, config.max_len, net.shape.hidden, dtype=torch.float16)
    ends = torch.tensor(eos_ids, dtype=torch.long)  # a model may name none
    lens, at = torch.zeros(slots, dtype=torch.long), torch.zeros(slots, dtype=torch.long)
    heat = torch.zeros(slots)
    live: list[Prompt | None] = [None] * slots

    def start(slot: int) -> None:
        prompt = next(prompts, None)
        live[slot], at[slot], texts[slot, 0] = prompt, 0, 0
        if prompt is not None:
            lens[slot], heat[slot] = len(prompt.ids), prompt.temperature
            texts[slot, : lens[slot]] = torch.from_numpy(prompt.ids.astype(np.int64))

    for slot in range(slots):
        start(slot)
    rows = torch.arange(slots)
    while any(p is not None for p in live):
        hidden = net.decode(texts[rows, at].to(device), at.to(device), cache)
        features[rows, at] = hidden.half().cpu()
        at += 1
        due = at >= lens  # their next token is not in the prompt
        texts[rows[due], at[due]] = sample(net.head(hidden[due.to(device)]).cpu(), heat[due], generator)
        over = due & (torch.isin(texts[rows, at], ends) | (at == config.max_len - 1))
        for slot in over.nonzero().flatten().tolist():
            prompt, size = live[slot], int(at[slot]) + 1
            features[slot, size - 1] = 0
            if prompt is not None:
                text = texts[slot, :size].int(), features[slot, :size].clone()
                yield Rollout(*text, len(prompt.ids), prompt.temperature)
            start(slot)


def sample(logits: torch.Tensor, temperatures: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """One token per row of logits [B, V]: argmax where the temperature is 0, else a draw from softmax(logits / T)."""
    drawn, hot = logits.argmax(-1), temperatures > 0
    # Gumbel noise from uniform numbers: three times faster on a CPU than multinomial or exponential_.
    gumbel = -(-torch.rand(int(hot.sum()), logits.shape[1], generator=generator).log()).log()
    drawn[hot] = (logits[hot] / temperatures[hot, None] + gumbel).argmax(-1)
    return drawn


def language(folder: Path) -> dict[str, str]:
    """What a model's token ids and prompts mean: sums over its tokenizer and its chat template."""
    tokenizer = Tokenizer(folder)
    template = hashlib.sha256((tokenizer.chat_template or "").encode()).hexdigest()
    return {"tokenizer": tokenizer.fingerprint(), "chat template": template}


def write_rollouts(path: Path, texts: list[Rollout], model: str, spoken: Mapping[str, str] | None = None) -> None:
    """`model` and `spoken` are the writer's `fingerprint` and `language`."""
    starts = np.cumsum([0, *(len(t.ids) for t in texts)])
    tensors = {
        "ids": torch.cat([t.ids for t in texts]),
        "features": torch.cat([t.features for t in texts]),
        "starts": torch.from_numpy(starts),
        "prompt_lens": torch.tensor([t.prompt_len for t in texts]),
        "temperatures": torch.tensor([t.temperature for t in texts]),
    }
    atomic_tensors(path, tensors, {"model": model, **(spoken or {})})


class Rows(Protocol):
    """A matrix [n, width] of which runs of rows are taken, as a tensor is."""

    def __len__(self) -> int: ...

    @property
    def shape(self) -> Sequence[int]: ...

    def __getitem__(self, rows: slice, /) -> torch.Tensor: ...


class StoredRows:
    """The tensors `name` of several files, one below the other, of which only the rows asked for are read."""

    def __init__(self, files: Sequence[TensorStore], name: str) -> None:
        """Raises `ModelError`: they do not stand below each other."""
        shapes = [file.shape(name) for file in files]
        if any(len(shape) != 2 or shape[1] != shapes[0][-1] for shape in shapes):
            raise ModelError(f"{files[0].folder} holds {name} of shapes {shapes}", hint="write them again")
        self._files, self._name = list(files), name
        self._ends = np.cumsum([shape[0] for shape in shapes]).tolist()
        self.shape = (int(self._ends[-1]), int(shapes[0][1]))

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> torch.Tensor:
        start, stop, _ = rows.indices(len(self))
        found, first = [], 0
        for file, end in zip(self._files, self._ends, strict=True):
            asked = range(max(start, first) - first, min(stop, end) - first)
            if asked or file is self._files[0]:  # the first gives the type where nothing is asked for
                found.append(file.rows(self._name, asked))
            first = end
        return torch.cat(found)


@dataclass(frozen=True)
class Rollouts:
    """Texts joined end to end: `ids [n]`, `features [n, hidden]`; text i lies at `starts[i]:starts[i + 1]`. Features
    take most of the room, and may stay in their files."""

    ids: torch.Tensor
    features: Rows
    starts: torch.Tensor
    prompt_lens: torch.Tensor
    temperatures: torch.Tensor
    model: str = ""
    """Fingerprint of the model that wrote the texts and whose features these are."""
    spoken: Mapping[str, str] = field(default_factory=dict)
    """That model's `language`; empty in files that do not say."""

    def __len__(self) -> int:
        return len(self.starts) - 1

    def batch(self, indices: list[int]) -> Batch:
        """Texts padded on the right to the longest: causal rows never see the padding."""
        spans = [(int(self.starts[i]), int(self.starts[i + 1])) for i in indices]
        width = max(end - start for start, end in spans)
        ids = torch.zeros(len(spans), width, dtype=torch.long)
        features = torch.zeros(len(spans), width, self.features.shape[1])
        for row, (start, end) in enumerate(spans):
            ids[row, : end - start] = self.ids[start:end]
            features[row, : end - start] = self.features[start:end]
        lens = torch.tensor([end - start for start, end in spans])
        return Batch(ids, features, lens, self.prompt_lens[indices], indices=tuple(indices))


@dataclass(frozen=True)
class Batch:
    """`ids [B, T]`, `features [B, T, hidden]` of the model that wrote them, `lens [B]`, `prompt_lens [B]`, and more
    `streams` of that model [B, T, hidden] where they were asked for; `indices` are the texts' numbers."""

    ids: torch.Tensor
    features: torch.Tensor
    lens: torch.Tensor
    prompt_lens: torch.Tensor
    streams: Mapping[Tap, torch.Tensor] = field(default_factory=dict)
    indices: tuple[int, ...] = ()

    def weights(self, prompt_weight: float) -> torch.Tensor:
        """[B, T]: 1 where a row predicts a generated token, `prompt_weight` in the prompt, 0 past the last one."""
        t = torch.arange(self.ids.shape[1])
        answer = t >= self.prompt_lens[:, None] - 1
        return torch.where(answer, 1.0, prompt_weight) * (t < self.lens[:, None] - 1)

    def to(self, device: str) -> Batch:
        streams = {tap: rows.to(device) for tap, rows in self.streams.items()}
        lens, prompt_lens = self.lens.to(device), self.prompt_lens.to(device)
        return Batch(self.ids.to(device), self.features.to(device), lens, prompt_lens, streams, self.indices)


def read_rollouts(folder: Path) -> Rollouts:
    """All parts of a folder as one. Raises `ModelError` where there is none, for a part that is damaged or lacks a
    column, and for parts that two models wrote."""
    parts: dict[str, list[torch.Tensor]] = {name: [] for name in _COLUMNS if name != "features"}
    origins, files = list[dict[str, str]](), list[TensorStore]()
    for path in sorted(folder.glob("part-*.safetensors")):
        try:
            with safe_open(str(path), "pt") as handle:
                origins.append(handle.metadata())
                for name, column in parts.items():
                    column.append(handle.get_tensor(name))
            files.append(TensorStore(folder, [path]))
            files[-1].info("features")
        except Exception as error:
            raise ModelError(f"{path} holds no rollouts: {error}", hint="write them again") from error
    if not origins:
        raise ModelError(f"no rollouts in {folder}", hint="make them with `quantspec train rollout`")
    if len({origin["model"] for origin in origins}) > 1:
        raise ModelError(f"the rollouts in {folder} were written by different models", hint="use a folder for each")
    lens = torch.cat([starts[1:] - starts[:-1] for starts in parts.pop("starts")])
    columns = {name: torch.cat(tensors) for name, tensors in parts.items()}
    features = StoredRows(files, "features")
    spoken = {key: value for key, value in origins[-1].items() if key not in ("model", "format")}
    starts = F.pad(lens.cumsum(0), (1, 0))
    texts = Rollouts(**columns, features=features, starts=starts, model=origins[0]["model"], spoken=spoken)
    flaw = _flaw(texts)
    if flaw:
        raise ModelError(f"the rollouts in {folder} are damaged: {flaw}", hint="write them again")
    return texts


def _flaw(texts: Rollouts) -> str | None:
    """What cannot be in texts that `write_rollouts` wrote."""
    lens, rows = texts.starts.diff(), (len(texts.ids), len(texts.features))
    if rows != (int(texts.starts[-1]),) * 2 or not len(texts) == len(texts.prompt_lens) == len(texts.temperatures):
        return "columns of different lengths"
    if not bool(((texts.prompt_lens > 0) & (texts.prompt_lens < lens)).all()):
        return "a prompt that is empty, or longer than its text"
    if int(texts.ids.min()) < 0:
        return "a token below 0"
    firsts = range(0, len(texts.features), _CHECKED)
    if not all(bool(torch.isfinite(texts.features[first : first + _CHECKED]).all()) for first in firsts):
        return "features that are not finite"
    return None


class RolloutBatches:
    """Batches of texts of similar length, reshuffled every epoch; `step` alone decides the batch."""

    def __init__(self, texts: Rollouts, rows: int, seed: int) -> None:
        self.texts, self.rows, self.seed = texts, rows, seed
        self.lens = (texts.starts[1:] - texts.starts[:-1]).numpy()
        self._epoch: tuple[int, list[list[int]]] = (-1, [])

    def __getitem__(self, step: int) -> Batch:
        per_epoch = max(1, len(self.lens) // self.rows)
        epoch, index = divmod(step, per_epoch)
        if self._epoch[0] != epoch:
            self._epoch = (epoch, self._shuffled(epoch))
        return self.texts.batch(self._epoch[1][index])

    def _shuffled(self, epoch: int) -> list[list[int]]:
        rng = np.random.default_rng([self.seed, epoch])
        # Sorting by a jittered length keeps padding small and the batches different from epoch to epoch.
        order = np.argsort(self.lens * rng.uniform(0.9, 1.1, len(self.lens)))
        batches = [order[i : i + self.rows].tolist() for i in range(0, len(order), self.rows)]
        full = [b for b in batches if len(b) == self.rows] or batches
        return [full[int(i)] for i in rng.permutation(len(full))]
