"""The house has floors: each imports what lies below it or beside it, never what lies above."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = [
    ("pallas_kernels",),
    ("l4jax.ops",),
    ("l4jax.model",),
    ("l4jax.checkpoint", "l4jax.data", "l4jax.processing", "l4jax.report"),
    ("l4jax.train", "l4jax.inference", "l4jax.topology"),
    ("l4jax.demo", "l4jax.sweep", "l4jax.doctor", "l4jax.plan", "l4jax.cli", "l4jax.__main__", "l4jax.__init__"),
]
EVERYWHERE = ("l4jax.chips", "l4jax.config", "l4jax.settings", "l4jax.sharding", "l4jax.host", "l4jax.__version__")


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def floor_of(module: str) -> int | None:
    """The floor that a module lives on; None for what every floor may use."""
    if re.match("|".join(map(re.escape, EVERYWHERE)), module):
        return None
    module = "l4jax.__init__" if module == "l4jax" else module
    rooms = {room: floor for floor, names in enumerate(FLOORS) for room in names}
    room = next((room for room in rooms if module == room or module.startswith(room + ".")), None)
    assert room, f"{module} is on no floor; add it to FLOORS"
    return rooms[room]


def imports(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            if node.module == "l4jax":
                yield from (f"l4jax.{alias.name}" for alias in node.names)
            else:
                yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


SOURCES = [*ROOT.glob("l4jax/**/*.py"), *ROOT.glob("pallas_kernels/**/*.py")]


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_imports_point_down(path):
    here = floor_of(module_of(path))
    for name in imports(path):
        if not name.startswith(("l4jax", "pallas_kernels")):
            continue
        if name.startswith("pallas_kernels"):
            assert module_of(path).startswith(("pallas_kernels", "l4jax.ops")), f"only ops may import {name}"
        there = floor_of(name)
        if there is not None:
            assert here is not None, f"{module_of(path)} is for every floor and may not import {name}"
            assert there <= here, f"{module_of(path)} (floor {here}) imports {name} (floor {there})"


def test_kernels_know_only_jax():
    for path in ROOT.glob("pallas_kernels/**/*.py"):
        foreign = {name.split(".")[0] for name in imports(path)} - {"jax", "jaxtyping", "numpy", "pallas_kernels"}
        standard = {"collections", "dataclasses", "functools", "logging", "math", "typing", "itertools"}
        assert not foreign - standard, (path, foreign)
