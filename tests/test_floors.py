"""A room imports only from floors below it (and from itself)."""

from __future__ import annotations

import ast
from pathlib import Path

import lissom

FLOORS = (
    ("errors",),
    ("files",),
    ("sealed",),
    ("kernels",),
    ("devices",),  # measures the machine as the kernels use it
    ("plugin",),
    ("hook",),
    ("models",),
    ("training_plugin",),
    ("diffusers_plugin",),
    ("attention", "diffusion", "kv", "rl", "weights"),
    ("decode", "train"),  # decode runs over the storage of kv
    ("recipes", "export"),
    ("evals",),  # also of what was exported
    ("evolve",),
    ("report",),
    ("cli",),
)
LEVEL = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def imports(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("lissom."):
            found.add(node.module.split(".")[1])
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("lissom.")}
    return found


def test_imports_point_downwards():
    root = Path(lissom.__file__).parent
    seen = 0
    for file in root.rglob("*.py"):
        room = file.relative_to(root).parts[0].removesuffix(".py")
        if room in ("__init__", "__main__"):
            continue
        for other in imports(file):
            seen += 1
            assert other == room or LEVEL[other] < LEVEL[room], f"{file.relative_to(root)} imports {other}"
    assert seen > 50
