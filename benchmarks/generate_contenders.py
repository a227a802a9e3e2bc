"""Who takes part in ``bench generate``: methods of this package with their parts and settings, and other engines."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from quantspec.benchmarks.config import WIDTHS
from quantspec.benchmarks.generate_config import COMPILED, DTYPES, GenerateBench, engine_setting
from quantspec.benchmarks.generate_figures import CURVE
from quantspec.benchmarks.generate_rows import PLAIN
from quantspec.benchmarks.peers import llama_cpp
from quantspec.benchmarks.peers.process import Contender
from quantspec.calibrate.cost.found import Found, find
from quantspec.calibrate.export.config import ExportConfig
from quantspec.engine.auto import AUTO
from quantspec.engine.build import DEFAULT_TARGET, FAMILY, NEEDED
from quantspec.engine.config import METHODS, EngineConfig, did_you_mean
from quantspec.errors import QuantSpecError, Unavailable, UsageError
from quantspec.models import atomic
from quantspec.models.config import config_source, read_config
from quantspec.models.gguf.reader import is_gguf
from quantspec.models.quantization_config import read_quantization
from quantspec.models.resolve import resolve

Note = Callable[[str], None]
OURS = "quantspec.benchmarks.peers.ours"
HF, HF_COMPILED = "quantspec.benchmarks.peers.hf", "quantspec.benchmarks.peers.hf_compiled"
LOOKUP_TOKENS = 10
"""What transformers' documentation suggests for ``prompt_lookup_num_tokens``."""


@dataclass(frozen=True)
class Setting:
    """What the workers of other engines are made for: the models' folders, and ``work`` for files made of them."""

    target: Path
    draft_model: Path | None
    work: Path
    device: str
    threads: int
    context: int
    llama_server: Path | None
    note: Note

    @cached_property
    def dense_target(self) -> Path:
        """The target unquantized, in the model's own type."""
        return self._dense(self.target, "target-dense")

    @cached_property
    def dense_draft_model(self) -> Path:
        """Likewise the draft model. Raises ``UsageError`` where none was named."""
        if self.draft_model is None:
            raise UsageError("an assistant needs a draft model", hint="name it with --draft-model")
        return self._dense(self.draft_model, "draft-dense")

    def _dense(self, model: Path, name: str) -> Path:
        if not is_gguf(model) and read_quantization(read_config(model), config_source(model)) is None:
            return model
        out = self.work / name
        if not (out / atomic.MANIFEST).is_file():
            from quantspec.calibrate.export.run import run

            self.note(f"dequantizing {model} for other engines")
            run(ExportConfig(model=model, to="transformers", out=out, dequantize=True))
        return out


def methods(config: GenerateBench, threads: int, note: Note) -> list[Contender]:
    """Plain decoding first, then what ``config.methods`` names, or every method and named head that is there.

    Raises ``UsageError`` for an unknown method or setting, or a method whose parts were not named.
    """
    there = find(config.model, config.draft_model, config.head, note)
    if config.profile is not None:
        there.append(Found(AUTO, {"method": AUTO, "profile": config.profile}))
    specs = config.methods or tuple(one.name for one in there)
    return [_ours(config, spec, there, threads) for spec in (PLAIN, *(spec for spec in specs if spec != PLAIN))]


def _ours(config: GenerateBench, spec: str, there: Sequence[Found], threads: int) -> Contender:
    """``spec`` is a method, or the name of a head, and settings: ``eagle:tree_depth=4:num_speculative_tokens=12``."""
    name, *settings = spec.split(":")
    by_name = [one for one in there if one.name == name]
    by_method = [one for one in there if one.options.get("method") == name]
    found = next(iter((*by_name, *by_method)), None)
    if found is None and name == AUTO:
        raise UsageError("method auto needs a profile", hint="make one with quantspec tune, or name it with --profile")
    if found is None and name in METHODS:
        parts = " and ".join(f"--{part.replace('_', '-')}" for part in NEEDED[name])
        raise UsageError(f"method {name} lacks its parts", hint=f"name them with {parts}")
    if found is None:
        known = (*METHODS, *(one.name for one in there if one.name not in METHODS))
        raise UsageError(f"there is no method {name!r}", hint=did_you_mean(name, known) or f"one of {', '.join(known)}")
    if found.error:
        return Contender(name=spec, kind="ours", error=found.error)
    options = {**found.options, **dict(engine_setting(spec, each) for each in settings), "device": config.device}
    EngineConfig(model=config.model, threads=threads, **options)  # says now what is wrong with a value
    options |= {"model": config.model, "threads": threads}
    return Contender(name=spec, kind="ours", module=OURS, options=options)


def curve_of(plain: Contender) -> Contender:
    """A process beside the others that times the target's forwards: it holds more memory than plain decoding does."""
    return replace(plain, name=CURVE, options={**plain.options, "curve": WIDTHS})


def setting_of(config: GenerateBench, work: Path, threads: int, context: int, note: Note) -> Setting:
    """Where the models of ``config`` lie; texts and their prompts have up to ``context`` tokens."""
    named = config.draft_model or (FAMILY["draft"]["draft_model"] if config.model == "default" else None)
    return Setting(
        target=target_folder(config),
        draft_model=None if named is None else resolve(named),
        work=work,
        device=config.device,
        threads=threads,
        context=context,
        llama_server=config.llama_server,
        note=note,
    )


def target_folder(config: GenerateBench) -> Path:
    """The target's folder or GGUF file."""
    return resolve(DEFAULT_TARGET if config.model == "default" else config.model)


def peers(config: GenerateBench, setting: Setting) -> Iterator[Contender]:
    """Other engines in the order they were named; what is not installed, or cannot be made ready, says why."""
    for name in config.peer_names:
        try:
            yield _peer(name, setting)
        except QuantSpecError as error:
            yield Contender(name=name, error=str(error))


def _peer(name: str, setting: Setting) -> Contender:
    if name == llama_cpp.NAME:
        return llama_cpp.contender(setting.target, setting.context, setting.threads, setting.llama_server)
    if find_spec("transformers") is None:
        raise Unavailable("transformers is not installed")
    options: dict[str, Any] = {"folder": str(setting.dense_target), "device": setting.device}
    if name == COMPILED:
        if setting.device == "cpu":
            raise Unavailable("it is for a GPU", hint="--device cuda")
        return Contender(
            name=name, module=HF_COMPILED, options={**options, "dtype": "bfloat16", "context": setting.context}
        )
    dtype, _, way = name.removeprefix("transformers-").partition("-")
    options |= {
        "dtype": DTYPES[dtype],
        "threads": setting.threads,
        "assistant": str(setting.dense_draft_model) if way == "assisted" else None,
    }
    ask = {"prompt_lookup_num_tokens": LOOKUP_TOKENS} if way == "lookup" else {}
    return Contender(name=name, module=HF, options=options, ask=ask)
