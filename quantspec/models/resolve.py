"""Where a model name leads: a folder, a member of the default family that ships in the package, or a hub id."""

from __future__ import annotations

from pathlib import Path

from quantspec.errors import ModelError

FAMILY = Path(__file__).parent.parent / "assets"
"""Folders of the default family."""
DEFAULT = "default"
"""The name of the family and of its target; its other members are ``default/<folder>``."""
_PATTERNS = ["*.safetensors", "*.json", "*.jinja"]


def resolve(name: str | Path) -> Path:
    """The folder that ``name`` stands for, downloaded first (safetensors and JSON alone) if it is a hub id.

    A local folder wins over a hub id of the same name. Raises ``ModelError`` when there is nothing under that name.
    """
    path, name = Path(name).expanduser(), str(name)
    if name == DEFAULT or name.startswith(DEFAULT + "/"):
        return _family(name)
    if path.is_dir():
        return path
    if path.exists():
        raise ModelError(f"{name} is a file, not a model folder", hint="give the folder that holds config.json")
    parts = name.split("/")
    if path.is_absolute() or len(parts) != 2 or not all(parts) or parts[0].startswith((".", "~")):
        hint = "give a folder with config.json, or a hub id such as org/name"
        raise ModelError(f"no model folder at {name}", hint=hint)
    return _download(name)


def _family(name: str) -> Path:
    member = name.removeprefix(DEFAULT).lstrip("/") or "target"
    known = sorted(path.parent.name for path in FAMILY.glob("*/config.json"))
    if member not in known:
        hint = f"it has {', '.join(known) or 'no weights installed'}"
        raise ModelError(f"the default family has no {member!r}", hint=hint)
    return FAMILY / member


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    hint = "check the spelling, or the network; a local folder needs no download"
    try:
        return Path(snapshot_download(name, allow_patterns=_PATTERNS))
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        raise ModelError(f"{name} is neither a folder nor a model that could be downloaded", hint=hint) from error
