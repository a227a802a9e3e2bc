"""Whole or absent: atomic files, the manifest, and one-line errors for disks that refuse."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch

from quantspec.errors import ModelError, ResourceError
from quantspec.models import atomic


def fail_with(code: int):  # type: ignore[no-untyped-def]
    def fail(*args: object) -> None:
        raise OSError(code, os.strerror(code))

    return fail


def test_saved_tensors_are_read_by_the_safetensors_library(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    tensors = {
        "b": torch.randn(3, 5).bfloat16(),
        "a": torch.arange(7, dtype=torch.int64),
        "odd": torch.tensor([True, False, True]),
        "transposed": torch.randn(4, 6).T,
        "empty": torch.empty(0, 4),
        "scalar": torch.tensor(3.5, dtype=torch.float16),
    }
    atomic.save_tensors(tmp_path / "x.safetensors", tensors)
    loaded = load_file(tmp_path / "x.safetensors")
    assert loaded.keys() == tensors.keys()
    assert all(
        loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor) for name, tensor in tensors.items()
    )
    before = (tmp_path / "x.safetensors").read_bytes()
    atomic.save_tensors(tmp_path / "x.safetensors", dict(reversed(tensors.items())))
    assert (tmp_path / "x.safetensors").read_bytes() == before


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT])
def test_a_failed_write_keeps_the_old_file_and_leaves_nothing(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    atomic.write_bytes(tmp_path / "f", b"old")
    monkeypatch.setattr(os, "fsync", fail_with(code))
    with pytest.raises(ResourceError) as caught:
        atomic.write_bytes(tmp_path / "f", b"new")
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "f") in str(caught.value)
    assert caught.value.hint
    assert caught.value.exit_code == 4
    assert [path.name for path in tmp_path.iterdir()] == ["f"]
    assert (tmp_path / "f").read_bytes() == b"old"


def test_a_real_full_disk(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full on this system")
    (tmp_path / ".f.tmp").symlink_to("/dev/full")  # where the temporary file goes: every write there finds no space
    with pytest.raises(ResourceError, match="no space left"):
        atomic.write_bytes(tmp_path / "f", b"x" * 100_000)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="cannot write"):
        atomic.make_folder(tmp_path / "file" / "out")
    with pytest.raises(ResourceError, match="cannot write"):
        atomic.make_folder(Path("/proc/quantspec"))


def test_ctrl_c_while_writing_leaves_nothing(tmp_path: Path) -> None:
    def interrupted() -> None:
        with atomic.atomic_file(tmp_path / "f") as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


class TestManifest:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        (tmp_path / "sub").mkdir()
        (tmp_path / "a.json").write_text("{}")
        (tmp_path / "sub" / "b.bin").write_bytes(bytes(1000))
        atomic.write_manifest(tmp_path)
        return tmp_path

    def test_holds_sums_and_sizes(self, folder: Path) -> None:
        files = json.loads((folder / atomic.MANIFEST).read_text())["files"]
        assert files.keys() == {"a.json", "sub/b.bin"}
        assert files["sub/b.bin"]["size"] == 1000
        assert atomic.verify_manifest(folder)

    def test_no_manifest_is_no_error(self, tmp_path: Path) -> None:
        assert not atomic.verify_manifest(tmp_path)

    @pytest.mark.parametrize("damage", ["missing", "cut", "changed", "garbage"])
    def test_damage_is_found(self, folder: Path, damage: str) -> None:
        target = folder / "sub" / "b.bin"
        if damage == "missing":
            target.unlink()
        elif damage == "cut":
            target.write_bytes(bytes(999))
        elif damage == "changed":
            target.write_bytes(bytes(999) + b"\1")
        else:
            target = folder / atomic.MANIFEST
            target.write_text("[]")
        with pytest.raises(ModelError, match=target.name):
            atomic.verify_manifest(folder)
