"""``method="auto"``: the way to decode that a profile says is fastest, as a configuration; and why not, where it cannot
be had."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantspec.engine import here
from quantspec.engine.config import EngineConfig
from quantspec.engine.costs import PLAIN, Profile, Setting
from quantspec.errors import ModelError, QuantSpecError, UsageError
from quantspec.models.fingerprint import fingerprint
from quantspec.models.resolve import resolve

if TYPE_CHECKING:
    from quantspec.models.base import CausalModel

AUTO = "auto"
CHOSEN = (
    "num_speculative_tokens", "min_draft", "tree_nodes", "tree_depth", "tree_top_k", "prompt_lookup_max",
    "prompt_lookup_min",
)  # fmt: skip
"""What the planner sets."""
_PARTS = ("draft_model", "head")


def settle(
    config: EngineConfig, folder: Path, notice: Callable[[str], None]
) -> tuple[EngineConfig, Profile | None]:  # fmt: skip
    """The configuration with the method, parts and options that ``config.profile`` says are best for the target in
    ``folder``, and the profile, with the setting made of the parts that the user named as its choice: for
    ``method="auto"``, and for no method where no option asks for one.

    Where it does not hold here, the method is None, as if there were no profile, and ``notice`` gets a line. Raises
    ``UsageError`` for options that ``auto`` chooses itself.
    """
    asked = instead(config)
    if config.method == AUTO and asked == "rule":
        raise UsageError("method auto drafts for the exact rule", hint="leave out rule, or name a method")
    if config.method == AUTO and asked:
        raise UsageError(f"method auto chooses {asked} itself", hint=f"leave out {asked}, or name a method")
    if asked:
        if config.profile is not None:
            notice(f"the profile {config.profile} is not used: {asked} {getattr(config, asked)} was asked for")
        return config, None
    default = replace(config, method=None)
    if config.profile is None:
        if config.method == AUTO:
            notice(f"no profile of {config.model} on this machine: decoding as without auto; quantspec tune makes one")
        return default, None
    try:
        profile = Profile.load(config.profile)
    except ModelError as error:
        notice(f"{error}: decoding as without it; {error.hint}")
        return default, None
    setting = _fitting(profile, config)
    refusal = profile.refusal(here.machine(config), fingerprint(folder), profile.kernels)
    if refusal is None and setting is None:
        refusal = "it knows no drafter of these parts"
    if refusal or setting is None:
        _refuse(config, refusal, notice)
        return default, None
    try:
        return applied(profile, setting, config), replace(profile, chosen=setting)
    except QuantSpecError as error:
        _refuse(config, error, notice)
        return default, None


def instead(config: EngineConfig) -> str | None:
    """The field that says how to decode in place of a profile, if one does."""
    if config.method not in (None, AUTO):
        return "method"
    return next((name for name in (*CHOSEN, "rule") if getattr(config, name) != _DEFAULTS[name]), None)


def holds(profile: Profile, model: CausalModel, config: EngineConfig, notice: Callable[[str], None]) -> bool:
    """Whether the profile was measured with the kernels that run the target; ``notice`` hears why not."""
    refusal = profile.refusal(profile.machine, profile.model, here.kernels_of(model, config))
    if refusal:
        _refuse(config, refusal, notice)
    return refusal is None


def _refuse(config: EngineConfig, why: object, notice: Callable[[str], None]) -> None:
    notice(f"the profile {config.profile} is not used: {why}; quantspec tune makes a new one")


def applied(profile: Profile, setting: Setting, config: EngineConfig) -> EngineConfig:
    """The configuration with the setting, as ``auto`` runs it. Raises ``ModelError`` for a drafter that is gone or
    another one since it was measured, and ``UsageError`` for options that somebody wrote into the file."""
    candidate = profile.candidate(setting)
    if setting.method != PLAIN.method and candidate is None:
        raise ModelError(f"it holds nothing of the {setting.method} that it chose")
    for part, name in setting.parts.items():
        if candidate and fingerprint(resolve(name)) != candidate.weights.get(part):
            raise ModelError(f"{name} has other weights than were measured")
    changes: dict[str, Any] = {"method": setting.method, **setting.parts, **_options(profile, setting, config)}
    return replace(config, **changes)


def _fitting(profile: Profile, config: EngineConfig) -> Setting | None:
    """The best setting that is made of the parts that the user named, if any."""
    given = {name: resolve(getattr(config, name)) for name in _PARTS if getattr(config, name) is not None}
    return next((setting for setting in _best_first(profile) if _made_of(setting, given)), None)


def _best_first(profile: Profile) -> Iterator[Setting]:
    yield profile.chosen
    for measured in sorted(profile.measured, key=lambda each: -each.tokens_per_second):
        yield measured.setting


def _made_of(setting: Setting, given: dict[str, Path]) -> bool:
    try:
        return all(name in setting.parts and resolve(setting.parts[name]) == path for name, path in given.items())
    except ModelError:
        return False


def _options(profile: Profile, setting: Setting, config: EngineConfig) -> dict[str, int]:
    """Of the setting; on a CPU drafts may be as wide as was measured, for the controller narrows each of them. A GPU
    has graphs of one width."""
    candidate = profile.candidate(setting)
    if setting.method == PLAIN.method or candidate is None:
        return {}
    options = {name: value for name, value in setting.options.items() if name in CHOSEN}
    if config.device == "cpu":
        free = ("num_speculative_tokens", "min_draft") if candidate.inner else CHOSEN
        options |= {name: value for name, value in candidate.options.items() if name in free}
    return options


_DEFAULTS = {field.name: field.default for field in fields(EngineConfig)}
