"""The architecture as a test: a module imports only lower floors, and files stay short enough to be read.

The table is the one in CONTRIBUTING.md. Imports are read from the syntax tree, so that lazy imports inside functions
and those for type checkers count too: an arrow that points up is one wherever it stands.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LINKED = ("kernels", "calibrate", "cli", "benchmarks")
FLOORS = {
    "errors": 0,
    "types": 0,
    "numerics": 1,
    "kernels": 2,
    "models": 3,
    "core": 4,
    "drafters": 5,
    "engine": 6,
    "calibrate": 7,
    "cli": 8,
    "benchmarks": 9,
}
FACADE = FLOORS["engine"] + 0.5
"""``import quantspec`` hands out ``load`` lazily, so it stands just above the engine."""
SAME_DRAFTER = {("draft_model", "cascade"), ("eagle_triton", "eagle"), ("peagle", "eagle3")}
"""A draft model *is* a cascade, one with nothing below it: that file only names its settings. There is one EAGLE, on
other kernels, and P-EAGLE is an EAGLE-3 that drafts all at once. All else in ``drafters`` that is no drafter, a class
with a name, is there for drafters to share."""
BENCH = "bench"
"""What the names of the modules of ``cli`` begin with that may import ``benchmarks``: `quantspec bench` runs them."""
MAX_LINES = 400


def modules() -> Iterator[tuple[str, Path]]:
    """Every module of the package with its dotted name below ``quantspec`` ("" for the package itself)."""
    for place in (ROOT / "quantspec", *(ROOT / name for name in LINKED)):
        prefix = () if place.name == "quantspec" else (place.name,)
        for path in sorted(place.rglob("*.py")):
            parts = (*prefix, *path.relative_to(place).with_suffix("").parts)
            if not prefix and parts[0] in LINKED:
                continue  # the link; the folder itself is walked on its own
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


MODULES = list(modules())


def is_drafter(path: Path) -> bool:
    """Whether a class of the file says the name of a drafter."""
    classes = [node for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.ClassDef)]
    named = [part.targets[0] for node in classes for part in node.body if isinstance(part, ast.Assign)]
    return any(isinstance(target, ast.Name) and target.id == "name" for target in named)


DRAFTERS = {name.partition(".")[2] for name, path in MODULES if name.startswith("drafters.") and is_drafter(path)}


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything a file imports; ``from a import b`` counts as ``a`` and as ``a.b``."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: import absolutely"
            assert node.module is not None
            yield node.lineno, node.module
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}"


def inner(name: str) -> tuple[str, ...] | None:
    """The parts of a dotted name below ``quantspec``, or None for somebody else's module."""
    parts = name.split(".")
    return tuple(parts[1:]) if parts[0] == "quantspec" else None


def runs_benchmarks(module: tuple[str, ...]) -> bool:
    return len(module) > 1 and module[0] == "cli" and module[1].startswith(BENCH)


def floor(parts: tuple[str, ...]) -> float:
    return FLOORS[parts[0]] if parts and parts[0] in FLOORS else FACADE


def violations(module: str, path: Path) -> list[str]:
    own = tuple(module.split(".")) if module else ()
    found = []
    for line, name in imports(path):
        if name.split(".")[0] in LINKED:
            found.append(f"{path}:{line}: bare {name!r}; import quantspec.{name}")
        target = inner(name)
        if target is None:
            continue
        if floor(target) > floor(own) and not (runs_benchmarks(own) and target[0] == "benchmarks"):
            found.append(f"{path}:{line}: {module or 'quantspec'} imports {name}, which stands higher")
        if own[:1] == target[:1] == ("drafters",) and len(target) > 1:
            allowed = target[1] not in DRAFTERS or (own[-1], target[1]) in SAME_DRAFTER
            if not allowed:
                found.append(f"{path}:{line}: drafter {own[-1]} imports {name}; only engine.build combines drafters")
    return found


def test_every_folder_has_a_floor() -> None:
    assert {name.split(".")[0] for name, _ in MODULES if name} <= set(FLOORS)


def test_drafters_are_found() -> None:
    assert {"cascade", "eagle", "eagle3", "lookup"} <= DRAFTERS
    assert not DRAFTERS & {"tree", "feature_tree", "config"}


def test_no_import_points_up() -> None:
    assert [line for name, path in MODULES for line in violations(name, path)] == []


def test_package_files_are_short() -> None:
    long = {
        str(path.relative_to(ROOT)): lines
        for path in (*(path for _, path in MODULES), *(ROOT / "tests").rglob("*.py"))
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > MAX_LINES
    }
    assert long == {}


def test_package_inits_are_inert() -> None:
    """Only ``quantspec/__init__`` may import, and at its top only floor 0: `--help` passes through every one."""
    for name, path in MODULES:
        if path.name != "__init__.py":
            continue
        body = ast.parse(path.read_text(encoding="utf-8")).body
        imported = [
            found
            for node in body
            if isinstance(node, ast.Import | ast.ImportFrom)
            for found in ([node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
        ]
        allowed = {"__future__", "typing"} | ({"quantspec.errors", "quantspec.types"} if not name else set())
        assert set(imported) <= allowed, path


@pytest.mark.parametrize(
    "module, source, complaint",
    [
        ("core.step", "from quantspec.engine import generate", "stands higher"),
        ("numerics.pack", "def f():\n    import quantspec.kernels.cpu", "stands higher"),
        ("models.load", "import kernels", "bare 'kernels'"),
        (
            "drafters.eagle",
            "from quantspec.drafters import cascade",
            "drafter eagle imports quantspec.drafters.cascade",
        ),
        ("engine.build", "from quantspec import load", "stands higher"),
    ],
)
def test_the_check_catches(tmp_path: Path, module: str, source: str, complaint: str) -> None:
    path = tmp_path / "module.py"
    path.write_text(source)
    assert any(complaint in line for line in violations(module, path))


def test_the_check_lets_lower_floors_pass(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text("from quantspec.core import step\nfrom quantspec.drafters.tree import grow\nimport torch\n")
    assert violations("drafters.cascade", path) == []
