"""What an interrupted tune has measured, in a file beside the profile, so that the same command goes on from there."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from quantspec.errors import ModelError
from quantspec.models import atomic
from quantspec.models.json_files import read_object


class Work:
    """Finished parts by name, each a JSON value. Parts of a tune with another ``identity`` are dropped: they take
    minutes, and were measured for something else. One run at a time may have the folder."""

    def __init__(self, profile: Path, identity: Mapping[str, Any]) -> None:
        self.path = profile.with_name(profile.name + ".partial")
        self._identity = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()
        self._parts: dict[str, Any] = {}
        atomic.make_folder(self.path.parent)
        with atomic.writing(self.path):
            self._lock = os.open(self.path.parent, os.O_RDONLY)
        try:
            atomic.take_lock(self._lock, self.path.parent)
            self._read()
        except BaseException:
            os.close(self._lock)
            raise
        self.resumed = bool(self._parts)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        os.close(self._lock)

    def get(self, name: str) -> Any:
        """A finished part; None if it is not."""
        return self._parts.get(name)

    def put(self, name: str, value: Any) -> None:
        """Make a part durable."""
        self._parts[name] = value
        atomic.write_json(self.path, {"identity": self._identity, "parts": self._parts})

    def finish(self) -> None:
        """All of it stands in the profile."""
        with atomic.writing(self.path):
            self.path.unlink(missing_ok=True)

    def _read(self) -> None:
        if not self.path.is_file():
            return
        try:
            found = read_object(self.path, "")
        except ModelError:
            return  # of a disk that lost it: it is measured again
        if found.get("identity") == self._identity and isinstance(found.get("parts"), dict):
            self._parts = found["parts"]
