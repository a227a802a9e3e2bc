"""From a configuration to a running engine: the only module that names concrete drafters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from quantspec.core.drafter import Drafter, NoDrafter, TargetParts
from quantspec.core.prove_draws import draws_agree
from quantspec.core.verify import Verifier
from quantspec.drafters.cascade import Cascade
from quantspec.drafters.config import CascadeOptions, EagleOptions, LookupOptions
from quantspec.drafters.draft_model import draft_model
from quantspec.drafters.eagle import Eagle
from quantspec.drafters.eagle3 import Eagle3
from quantspec.drafters.eagle3_files import is_eagle3
from quantspec.drafters.lookup import PromptLookup
from quantspec.drafters.medusa import Medusa
from quantspec.drafters.medusa_files import is_medusa
from quantspec.drafters.peagle import PEagle
from quantspec.drafters.peagle_files import is_peagle
from quantspec.drafters.tau import taus_of_model
from quantspec.engine import auto, memory
from quantspec.engine.causes import Subject
from quantspec.engine.config import HEAD_METHODS, EngineConfig
from quantspec.engine.costs import Profile
from quantspec.engine.engine import Engine, is_out_of_memory
from quantspec.engine.planner import outlook
from quantspec.engine.stats import TimedVerifier
from quantspec.engine.watch import InnerWatch
from quantspec.errors import ModelError, ResourceError, UsageError
from quantspec.kernels.cpu import library
from quantspec.kernels.cuda import library as cuda_library
from quantspec.kernels.dispatch import NATIVE
from quantspec.models.base import CausalModel, DrawingModel
from quantspec.models.config import read_config
from quantspec.models.load import load_model
from quantspec.models.resolve import resolve
from quantspec.models.tokenizer import Tokenizer
from quantspec.types import Budget

NEEDED = {
    "none": (),
    "lookup": (),
    "draft": ("draft_model",),
    "eagle": ("head",),
    "eagle3": ("head",),
    "peagle": ("head",),
    "medusa": ("head",),
    "cascade": ("draft_model", "head"),
}
"""The parts, as fields of ``EngineConfig``, that each method is made of."""

DEFAULT_TARGET = "default/target-w4"
FAMILY = {
    "draft": {"draft_model": "default/intermediate-w4"},
    "eagle": {"head": "default/eagle-target"},
    "eagle3": {"head": "default/eagle3-target"},
    "peagle": {"head": "default/peagle-target"},
    "medusa": {"head": "default/medusa-target"},
    "cascade": {"draft_model": "default/intermediate-w4", "head": "default/eagle-intermediate"},
}
"""What ``default`` means here: the quantized target, and for each method the family's own parts."""


def build(config: EngineConfig, notice: Callable[[str], None]) -> Engine:
    """Load the target and its drafters.

    Raises ``UsageError`` for parts that do not make the method, ``ModelError`` for a model that is missing or damaged
    or does not fit its target, ``ResourceError`` if the target does not fit into memory. ``notice`` gets one line for
    each thing that is not as asked for.
    """
    notice = _once(notice)
    library.announce(notice)
    if config.device != "cpu":
        cuda_library.announce(notice)
    asked = config
    config, folder, profile = _resolved(config, notice)
    config = memory.fit(config, folder, notice)
    if config.threads:
        torch.set_num_threads(config.threads)
    model = _target(config, folder, notice)
    if profile and not auto.holds(profile, model, config, notice):
        config, _, profile = _resolved(replace(asked, method=None, profile=None), notice)
    return equip(config, model, Tokenizer(folder), notice, profile=profile)


def price(config: EngineConfig, notice: Callable[[str], None]) -> memory.Load:
    """What ``build`` would load, priced; nothing is loaded. Raises as ``build`` does for what headers and configs
    tell."""
    return memory.price(*_resolved(config, notice)[:2])


def target_folder(config: EngineConfig) -> Path:
    """Where the target lies. Raises ``ModelError``."""
    return resolve(DEFAULT_TARGET if config.model == "default" else config.model)


def _resolved(config: EngineConfig, notice: Callable[[str], None]) -> tuple[EngineConfig, Path, Profile | None]:
    """The configuration with its method and parts named, the target's folder, and the profile that chose them."""
    folder = target_folder(config)
    config, profile = auto.settle(config, folder, notice)
    asked, config = config.method, with_parts(config, notice)
    if asked is None and config.method == "eagle" and config.head and is_medusa(read_config(resolve(config.head))):
        config = replace(config, method="medusa")
    return config, folder, profile


def equip(
    config: EngineConfig,
    model: CausalModel,
    tokenizer: Tokenizer,
    notice: Callable[[str], None],
    draft: CausalModel | None = None,
    profile: Profile | None = None,
) -> Engine:
    """An engine around a target that is loaded. ``config`` has its method resolved and its parts named; ``draft`` is
    its draft model, where that is loaded too; by the ``profile`` that chose its method drafts get their widths. Raises
    as ``build`` for the parts."""
    try:
        draft = draft or (load_draft_model(config, notice) if config.draft_model else None)
        drafter, head_bytes = _drafter(config, model, draft, notice)
        drafter.prepare(TargetParts(model, tokenizer))
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        notice(f"out of memory: going on without the drafter of method {config.method}")
        config, drafter, draft, head_bytes = replace(config, method="none"), NoDrafter(), None, 0
    models = [each for each in (model, draft) if each is not None]
    verifier = TimedVerifier(model, rule=config.rule, prefill_chunk=config.prefill_chunk)
    _prove_draws(verifier, notice)
    return Engine(
        config=config,
        model=model,
        tokenizer=tokenizer,
        verifier=verifier,
        drafter=drafter,
        eos_ids=frozenset(tokenizer.eos_ids),
        weight_bytes=sum(each.weight_bytes for each in models) + head_bytes,
        tell=notice,
        torch_threads=_torch_threads(models, config.threads),
        outlook=outlook(profile, steady=config.device != "cpu") if profile and config.method != "none" else None,
    )


def _once(tell: Callable[[str], None]) -> Callable[[str], None]:
    """``tell`` without what was told before: two models on one machine have the same to say."""
    told: set[str] = set()

    def once(line: str) -> None:
        if line not in told:
            told.add(line)
            tell(line)

    return once


def _target(config: EngineConfig, folder: Path, notice: Callable[[str], None]) -> CausalModel:
    load = partial(load_model, folder, device=config.device, mode=config.mode, dtype=_dtype(config))
    try:
        model = load(
            backend=config.backend, activations=config.activations, head_bits=config.head_bits,
            kv_cache_dtype=config.kv_cache_dtype,
        )  # fmt: skip
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise ResourceError(f"{config.model} does not fit into memory", hint="quantize it first") from error
    for line in model.notes:
        notice(line)
    if config.mode == "exact" and not model.row_invariant:
        notice(f"{config.model} cannot run in exact mode: its text equals plain decoding up to rounding")
    return model


def _prove_draws(verifier: Verifier, notice: Callable[[str], None]) -> None:
    """Have the host draw the text's tokens where the model's device draws others."""
    if verifier.rule == "ratio" or not isinstance(verifier.model, DrawingModel):
        return
    try:
        wrong = None if draws_agree(verifier.model) else "its device draws others than it should"
    except Exception as error:  # of a compiler or device that may never have been seen
        wrong = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    if wrong:
        verifier.draw_on_host()
        notice(f"the CPU draws the tokens of {verifier.model.backend}: {wrong}")


def load_draft_model(config: EngineConfig, notice: Callable[[str], None]) -> CausalModel:
    """The draft model or intermediate, on the target's kernels where it can."""
    assert config.draft_model is not None, "named by with_parts"
    folder = resolve(config.draft_model)
    if folder.is_dir() and any(kind(read_config(folder)) for kind in (is_medusa, is_peagle, is_eagle3)):
        hint = "name it with --head, or give speculative_config its method"
        raise ModelError(f"{config.draft_model} is a drafter's head, not a draft model", hint=hint)
    # The text does not depend on a drafter, so its rows need no fixed bits.
    load = partial(load_model, folder, device=config.device, mode="fast")
    try:
        model = load(backend=config.backend, activations=config.activations, dtype=_dtype(config))
    except UsageError as error:
        if not (config.backend or config.activations or _dtype(config)):
            raise
        model = load()
        notice(f"{config.draft_model} runs on {model.backend}: {error}")
    for line in model.notes:
        notice(line)
    return model


def _dtype(config: EngineConfig) -> str | None:
    return None if config.dtype == "auto" else config.dtype


def _torch_threads(models: Sequence[CausalModel], threads: int | None) -> int | None:
    """How many threads torch may use in a step; None: as many as it has."""
    native = [model.backend in NATIVE for model in models]
    if threads and any(native):
        library.set_threads(threads)
    return 1 if all(native) else None


def with_parts(config: EngineConfig, notice: Callable[[str], None]) -> EngineConfig:
    """The configuration with its method resolved and the parts of that method named."""
    given = {name: getattr(config, name) for name in ("draft_model", "head") if getattr(config, name) is not None}
    family = FAMILY if config.model == "default" else {}
    method = config.method
    if method is None:
        method = next((each for each in ("cascade", "draft", "eagle") if set(NEEDED[each]) == given.keys()), None)
    if method is None:
        method = "cascade" if _present(family.get("cascade", {})) else "lookup"
        if method == "lookup":
            notice(f"{config.model} comes with no drafter: using prompt lookup")
    parts = {**family.get(method, {}), **given}
    for name in parts:
        if name not in NEEDED[method]:
            raise UsageError(f"method {method} does not use {name}", hint=f"leave out {name}, or choose another method")
    for name in NEEDED[method]:
        if name not in parts:
            option = f"--{name.replace('_', '-')}"
            raise UsageError(f"method {method} needs {name}", hint=f"name it with {option} ({name}= in Python)")
    return replace(config, method=method, **parts)


def _present(parts: dict[str, str]) -> bool:
    try:
        return bool(parts) and all(resolve(name) for name in parts.values())
    except ModelError:
        return False


def _drafter(
    config: EngineConfig, model: CausalModel, draft: CausalModel | None, notice: Callable[[str], None]
) -> tuple[Drafter, int]:
    """The method's drafter, and the bytes of its head."""
    if config.method == "lookup":
        options = LookupOptions(prompt_lookup_max=config.prompt_lookup_max, prompt_lookup_min=config.prompt_lookup_min)
        return PromptLookup(options), 0
    if config.method in HEAD_METHODS:
        return _head(config, model, notice)
    if config.method in ("draft", "cascade"):
        assert config.draft_model is not None, "named by with_parts"
        assert draft is not None, "loaded by build"
        folder = resolve(config.draft_model)
        tokenizer, taus = Tokenizer(folder), taus_of_model(folder)
        if config.method == "draft":
            return draft_model(draft, tokenizer, config.max_nodes, taus), 0
        inner, head_bytes = _head(config, draft, notice)
        budget = Budget(config.tree_nodes, config.tree_depth)
        cascade = Cascade(
            inner,
            Verifier(draft, stage="intermediate", prefill_chunk=config.prefill_chunk),
            CascadeOptions(min_draft=config.min_draft),
            tokenizer=tokenizer,
            inner_budget=lambda session: budget,
            notice=notice,
            watch=InnerWatch(Subject(inner, draft, tokenizer), notice),
            taus=taus,
        )
        return cascade, head_bytes
    return NoDrafter(), 0


def _head(config: EngineConfig, model: CausalModel, notice: Callable[[str], None]) -> tuple[Drafter, int]:
    """The drafter of a head, whose own config says of which kind it is, and the head's bytes. On the device if the
    ``model`` that verifies it draws there, where that kind can."""
    assert config.head is not None, "named by with_parts"
    folder = resolve(config.head)
    options = EagleOptions(top_k=config.tree_top_k, depth=config.tree_depth)
    # Beside a head in training lies what the training goes on from, which no generation reads.
    files = (file for file in folder.glob("*.safetensors") if file.name != "state.safetensors")
    head_bytes = sum(file.stat().st_size for file in files)
    raw, hint = read_config(folder), "use --method eagle, which takes any EAGLE head"
    if is_medusa(raw):
        if config.method not in ("medusa", "cascade"):
            raise ModelError(f"{config.head} holds Medusa heads", hint="use --method medusa")
        return Medusa(folder, options), head_bytes
    if config.method == "medusa":
        raise ModelError(f"{config.head} holds no Medusa heads", hint=hint)
    if is_peagle(raw):
        if config.method == "eagle3":
            raise ModelError(f"{config.head} is a P-EAGLE head", hint="use --method peagle, or parallel_drafting")
        return PEagle(folder, options), head_bytes
    if config.method == "peagle":
        raise ModelError(f"{config.head} is no P-EAGLE head", hint=hint)
    if is_eagle3(raw):
        return Eagle3(folder, options), head_bytes
    if config.method == "eagle3":
        raise ModelError(f"{config.head} is no EAGLE-3 head", hint=hint)
    if not isinstance(model, DrawingModel):
        return Eagle(folder, options), head_bytes
    from quantspec.drafters.eagle_triton import TritonEagle

    return TritonEagle(folder, options, notice), head_bytes
