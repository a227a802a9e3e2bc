"""A target that is loaded once, and the drafters that are set beside it in turn."""

from __future__ import annotations

from dataclasses import replace

from quantspec.engine.auto import applied
from quantspec.engine.build import equip, load_draft_model
from quantspec.engine.config import EngineConfig
from quantspec.engine.costs import Profile, Setting
from quantspec.engine.engine import Engine
from quantspec.models.base import CausalModel


class Workbench:
    """``plain`` decodes without a drafter. ``notices`` are what the newest engine had to say."""

    def __init__(self, plain: Engine) -> None:
        self.plain, self.notices = plain, list[str]()
        self._draft_models: dict[str, CausalModel] = {}

    def engine(self, setting: Setting, profile: Profile | None = None) -> Engine:
        """An engine that decodes as the setting says; with what is known of it, as ``auto`` would by a profile that
        chose it. Raises as ``build`` does for the parts."""
        self.notices.clear()
        config, tokenizer = self._config(setting), self.plain.tokenizer
        if profile is not None:
            profile = replace(profile, chosen=setting)
            config = applied(profile, setting, self.plain.config)
        assert tokenizer is not None, "build loads one"
        draft = None if config.draft_model is None else self.draft_model(setting)
        return equip(config, self.plain.model, tokenizer, self.notices.append, draft, profile)

    def draft_model(self, setting: Setting) -> CausalModel:
        """The setting's draft model, loaded once."""
        name = setting.parts["draft_model"]
        if name not in self._draft_models:
            self._draft_models[name] = load_draft_model(self._config(setting), self.notices.append)
        return self._draft_models[name]

    def failure(self, engine: Engine, setting: Setting) -> str | None:
        """Why the engine does without the setting's drafter, or its drafter's first complaint."""
        lost = engine.config.method != setting.method or (engine.drafter.name == "none") != (setting.method == "none")
        failed = (line for line in self.notices if line.startswith("drafter ") and " failed" in line)
        return next(failed, self.notices[-1] if lost else None)

    def _config(self, setting: Setting) -> EngineConfig:
        return replace(self.plain.config, method=setting.method, **setting.parts, **setting.options)  # type: ignore[arg-type]
