"""Where things are kept between runs."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from quantspec.errors import QuantSpecError

if TYPE_CHECKING:
    from quantspec.engine.config import EngineConfig


def cache() -> Path:
    """``$XDG_CACHE_HOME/quantspec``, or the same below ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "quantspec"


def profiles() -> Path:
    """Of what ``quantspec tune`` has measured."""
    return cache() / "profiles"


def with_profile(config: EngineConfig) -> EngineConfig:
    """With the profile that ``quantspec tune`` made of this model on this machine, where it did and a profile is what
    decides."""
    if config.profile is not None or not any(profiles().glob("*.json")):
        return config
    from quantspec.engine.auto import instead
    from quantspec.engine.build import target_folder
    from quantspec.engine.costs import file_name
    from quantspec.engine.here import machine
    from quantspec.models.fingerprint import fingerprint

    if instead(config):
        return config
    try:
        path = profiles() / file_name(fingerprint(target_folder(config)), machine(config))
    except QuantSpecError:  # which loading it says better
        return config
    return replace(config, profile=str(path)) if path.is_file() else config
