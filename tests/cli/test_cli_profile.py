"""Where ``generate`` finds the profile that ``tune`` wrote, and when it looks."""

from __future__ import annotations

from pathlib import Path

import pytest

from quantspec.cli.places import profiles, with_profile
from quantspec.engine import here
from quantspec.engine.build import target_folder
from quantspec.engine.config import EngineConfig
from quantspec.engine.costs import file_name
from quantspec.models.fingerprint import fingerprint


def test_generate_takes_the_profile_of_its_model_and_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config = EngineConfig()
    assert with_profile(config) == config, "nothing was tuned"
    profiles().mkdir(parents=True)
    (profiles() / "other.json").write_text("{}")
    assert with_profile(config).profile is None, "another model was tuned"
    path = profiles() / file_name(fingerprint(target_folder(config)), here.machine(config))
    path.write_text("{}")
    assert with_profile(config).profile == str(path)
    assert with_profile(EngineConfig(method="auto")).profile == str(path)
    assert with_profile(EngineConfig(method="lookup")).profile is None
    assert with_profile(EngineConfig(tree_depth=2)).profile is None, "an option asks for a method"
    assert with_profile(EngineConfig(device="abacus")).profile is None, "loading says better what is wrong"
    assert with_profile(EngineConfig(profile="mine.json")).profile == "mine.json"
    assert with_profile(EngineConfig(threads=1000)).profile is None, "as if another machine"
    assert with_profile(EngineConfig(model=str(tmp_path / "none"))).profile is None
