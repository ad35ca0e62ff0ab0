"""Which part of the package may import which: every room stands on rooms that come before it in the list."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "mergekit_symalign"
NAME = "mergekit_symalign"
GROUND = "symmetry/options symmetry/rows symmetry/devices symmetry/threads symmetry/compiled"
ELEMENTS = f"{GROUND} symmetry/fitting symmetry/groups symmetry/element"

# From the ground up: each room, and what it may import.
ROOMS: dict[str, str] = {
    "errors": "",
    "host": "",
    "console": "",
    "method_names": "errors",
    "whole_file": "errors",
    "sealed": "",
    "hub": "errors sealed",
    "statistics": "errors whole_file sealed hub",
    "symmetry/options": "",
    "symmetry/devices": "",
    "symmetry/threads": "symmetry/devices",
    "symmetry/loops": "",
    "symmetry/compiled": "symmetry/devices symmetry/loops",
    "symmetry/rows": "",
    "symmetry/fitting": "errors symmetry/options symmetry/rows",
    "symmetry/groups": "errors symmetry/rows",
    "symmetry/element": "symmetry/groups symmetry/rows",
    "symmetry/solved": "symmetry/element",
    "symmetry/statistics": "errors symmetry/element",
    "symmetry/scale": "symmetry/threads",
    "symmetry/quartic": "symmetry/devices symmetry/scale",
    "symmetry/distance": f"{GROUND} symmetry/groups",
    "symmetry/assignment": "errors symmetry/rows symmetry/devices symmetry/threads symmetry/fitting",
    "symmetry/neurons": f"errors {ELEMENTS} symmetry/scale symmetry/quartic symmetry/distance symmetry/assignment",
    "symmetry/heads": f"errors {ELEMENTS} symmetry/scale symmetry/quartic symmetry/distance symmetry/assignment",
    "symmetry/by_activations": f"errors {ELEMENTS} symmetry/solved symmetry/assignment symmetry/neurons symmetry/heads",
    "symmetry/blocks": f"{ELEMENTS} symmetry/solved symmetry/distance symmetry/neurons symmetry/heads",
    "symmetry/steps": "errors symmetry/groups",
    "symmetry/latent": f"{ELEMENTS} symmetry/distance symmetry/solved symmetry/assignment symmetry/heads "
    "symmetry/steps",
    "symmetry/describe": f"{ELEMENTS} symmetry/distance",
    "symmetry/consensus": f"errors {ELEMENTS}",
    "symmetry/solve": f"errors {ELEMENTS} symmetry/solved symmetry/blocks symmetry/latent symmetry/describe "
    "symmetry/consensus",
    "symmetry/admitted": f"{ELEMENTS} symmetry/heads",
    "symmetry/coordinates": "symmetry/options symmetry/groups symmetry/heads symmetry/admitted symmetry/steps",
    "symmetry/membership": f"errors {ELEMENTS} symmetry/heads symmetry/latent symmetry/admitted symmetry/steps "
    "symmetry/coordinates",
    "symmetry/residual": f"errors {ELEMENTS} symmetry/distance symmetry/assignment symmetry/heads "
    "symmetry/by_activations symmetry/solve symmetry/admitted symmetry/steps",
    "families": "errors symmetry/options symmetry/element symmetry/residual",
    "planting": f"families {ELEMENTS} symmetry/heads symmetry/latent symmetry/residual",
    "trial": "errors families planting symmetry/residual",
    "fusion": f"errors families {ELEMENTS} symmetry/assignment symmetry/heads symmetry/by_activations symmetry/solve",
    "activations": "errors families fusion symmetry/element symmetry/by_activations symmetry/residual",
    "learning": f"errors whole_file sealed activations {ELEMENTS} symmetry/assignment symmetry/heads symmetry/solve "
    "symmetry/admitted symmetry/residual",
    "alignments": f"errors families whole_file sealed hub {ELEMENTS} symmetry/admitted symmetry/membership "
    "symmetry/residual",
    "sharing": "errors hub sealed statistics alignments",
    "planned_methods": "errors families activations",
    "data_methods": "planned_methods",
    "aligned_methods": "activations data_methods planned_methods symmetry/options",
    "methods": "aligned_methods data_methods planned_methods",
    "graph": f"errors families whole_file sealed hub statistics activations alignments sharing methods fusion "
    f"{ELEMENTS} symmetry/heads symmetry/neurons symmetry/by_activations symmetry/solve symmetry/solved "
    "symmetry/consensus symmetry/statistics symmetry/membership symmetry/residual symmetry/latent",
    "card": "hub methods graph",
    "hook": "errors host method_names aligned_methods data_methods graph card",
    "distributed": "errors graph hook",
    "comparing": "errors whole_file activations",
    "demo": "errors console families planting whole_file comparing",
    "commands": "errors host console method_names families whole_file sealed hub statistics activations alignments "
    "sharing learning planned_methods methods graph card hook distributed comparing demo trial symmetry/options "
    "symmetry/element symmetry/describe symmetry/membership symmetry/residual",
    "cli": "errors console hook commands",
}
ONE_ROOM = {"alignment_file": "alignments", "autoload": "hook"}
KNOWS_MERGEKIT = {
    "planned_methods",
    "data_methods",
    "aligned_methods",
    "methods",
    "graph",
    "card",
    "hook",
    "distributed",
    "demo",
    "commands",
    "cli",
}


def _room(parts: tuple[str, ...]) -> str:
    """Of a module, by the parts of its name below the package."""
    name = "/".join(parts[:2]) if parts[0] == "symmetry" else parts[0]
    return ONE_ROOM.get(name, name)


def _imported(tree: ast.Module) -> Iterator[str]:
    """The full names of all modules that a file imports, at its top or inside a function."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            folder = node.module == NAME or PACKAGE.joinpath(*node.module.split(".")[1:]).is_dir()
            inside = node.module.startswith(NAME) and folder
            yield from (f"{node.module}.{alias.name}" for alias in node.names) if inside else (node.module,)


def _imports() -> dict[str, set[str]]:
    """Of every room, the modules that it imports."""
    found = defaultdict(set)
    for file in PACKAGE.rglob("*.py"):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        if parts[-1] != "__init__":
            found[_room(parts)].update(_imported(ast.parse(file.read_text("utf-8"))))
    return dict(found)


IMPORTS = _imports()


def test_every_room_is_in_the_list() -> None:
    assert set(IMPORTS) == set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_stands_on_what_it_may_stand_on(room: str) -> None:
    own = (m.split(".")[1:] for m in IMPORTS[room] if m.startswith(f"{NAME}."))
    used = {_room(tuple(parts)) for parts in own if parts != ["__version__"]}
    assert used - {room} <= set(ROOMS[room].split())


def test_no_room_stands_on_a_later_one() -> None:
    below: set[str] = set()
    for room, may in ROOMS.items():
        assert set(may.split()) <= below, room
        below.add(room)


@pytest.mark.parametrize("room", ROOMS)
def test_who_knows_mergekit(room: str) -> None:
    knows = any(m.split(".")[0] == "mergekit" for m in IMPORTS[room])
    assert not knows or room in KNOWS_MERGEKIT
