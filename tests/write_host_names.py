"""Writes ``mergekit_symalign/host_names.json``: every name of MergeKit's that our sources import or touch.

`make host-names` runs it; tests/test_host.py compares the file with what is derived here.

What is touched is not known to a parser, so more is listed rather than less. Starting from what our sources import, a
member of one of MergeKit's classes is listed if its name occurs in our sources as an attribute, an argument, a field, a
method or a string. A class that such a member's annotation names is looked at in the same way.
"""

from __future__ import annotations

import ast
import json
import re
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from mergekit_symalign.host import TABLE, Names, bound_by, members_of, names_in, source_of, statements

PACKAGE = Path(__file__).parent.parent / "mergekit_symalign"
_MODULE = re.compile(r"mergekit(\.\w+)+")
_NEVER = frozenset(
    ("self", "cls", *(name for name in dir(tuple) if name.startswith("__")), "__post_init__", "__call__")
)
Place = tuple[str, str]  # a module and what it binds
Table = dict[str, dict[str, list[str]]]


def sources(folder: Path = PACKAGE) -> list[ast.Module]:
    return [ast.parse(file.read_text("utf-8")) for file in sorted(folder.rglob("*.py"))]


def derived(trees: list[ast.Module]) -> Table:
    """The table for these sources: {module: {name: its parameters that occur in the sources}}."""
    nodes = [node for tree in trees for node in ast.walk(tree)]
    words = {word for node in nodes for word in _words(node)} - _NEVER | {"__init__"}
    places = {place for node in nodes for place in _imports(node)}
    for module in {module for node in nodes for module in _modules(node)}:
        places |= {(module, name) for name in _bindings(module) if name in words and _is_its_own(module, name)}
    table: dict[str, dict[str, list[str]]] = defaultdict(dict)
    waiting, seen = list(places), set()
    for place in places:
        _list(table, place, words)
    while waiting:
        place = waiting.pop()
        if place in seen:
            continue
        seen.add(place)
        module, node = _definition(place) or (place[0], None)
        if isinstance(node, ast.ClassDef):
            used = [name for name in members_of(node) if name in words]
            for name in used:
                _list(table, (module, f"{node.name}.{name}"), words)
            waiting += [found for name in used for found in _annotated(module, node, name)]
            waiting += [found for base in node.bases for found in _named(module, base)]
        elif node is not None:
            waiting += list(_named(module, node.returns if isinstance(node, ast.FunctionDef) else node))
    return {module: dict(sorted(names.items())) for module, names in sorted(table.items())}


def _list(table: dict[str, dict[str, list[str]]], place: Place, words: set[str]) -> None:
    module, name = place
    parameters = _names(module).get(name, frozenset()) & words
    table[module][name] = sorted(parameters)
    owner = name.partition(".")[0]
    if owner != name:
        table[module].setdefault(owner, [])


def _words(node: ast.AST) -> list[str]:
    """Every word under which a piece of our source may touch something of another object."""
    if isinstance(node, ast.Attribute):
        return [node.attr]
    if isinstance(node, (ast.arg, ast.keyword)):
        return [node.arg] if node.arg else []
    if isinstance(node, ast.FunctionDef):
        return [node.name]
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        return [node.target.id]
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        parts = node.value.split(".")
        return parts if all(part.isidentifier() for part in parts) else []
    return []


def _imports(node: ast.AST) -> Iterator[Place]:
    if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] == "mergekit":
        yield from (
            (node.module, alias.name) for alias in node.names if source_of(f"{node.module}.{alias.name}") is None
        )


def _modules(node: ast.AST) -> Iterator[str]:
    """Modules of MergeKit's that are imported as a whole, or named in a string."""
    names = []
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom) and node.module:
        names = [f"{node.module}.{alias.name}" for alias in node.names]
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        names = [node.value]
    yield from (name for name in names if _MODULE.fullmatch(name) and source_of(name) is not None)


@cache
def _tree(module: str) -> ast.Module:
    source = source_of(module)
    if source is None:
        raise LookupError(f"{module} is not a module of the installed MergeKit")
    return ast.parse(source)


@cache
def _names(module: str) -> Names:
    return names_in(_tree(module))


@cache
def _bindings(module: str) -> dict[str, ast.stmt]:
    return {name: node for node in statements(_tree(module).body) for name in bound_by(node)}


def _is_its_own(module: str, name: str) -> bool:
    """Whether a module defines a name, or imports it from another module of MergeKit's."""
    node = _bindings(module)[name]
    if isinstance(node, ast.ImportFrom):
        return _absolute(module, node).partition(".")[0] == "mergekit"
    return not isinstance(node, ast.Import)


def _definition(place: Place) -> tuple[str, ast.stmt] | None:
    """Where something is defined, through all imports inside MergeKit."""
    module, name = place
    node = _bindings(module).get(name)
    if not isinstance(node, ast.ImportFrom):
        return None if node is None or isinstance(node, ast.Import) else (module, node)
    origin = _absolute(module, node)
    alias = next(alias.name for alias in node.names if (alias.asname or alias.name) == name)
    return _definition((origin, alias)) if _MODULE.fullmatch(origin) and source_of(origin) is not None else None


def _absolute(module: str, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    return ".".join([*module.split(".")[: -node.level], node.module or ""])


def _annotated(module: str, owner: ast.ClassDef, member: str) -> Iterator[Place]:
    """What the annotation of a field, or of a method's result, names."""
    for node in statements(owner.body):
        if isinstance(node, ast.AnnAssign) and member in bound_by(node):
            yield from _named(module, node.annotation)
        elif isinstance(node, ast.FunctionDef) and node.name == member:
            yield from _named(module, node.returns)


def _named(module: str, node: ast.AST | None) -> Iterator[Place]:
    """Everything of MergeKit's that an expression in one of its modules names."""
    for part in ast.walk(node) if node is not None else ():
        name = part.id if isinstance(part, ast.Name) else part.value if isinstance(part, ast.Constant) else None
        if isinstance(name, str) and name in _bindings(module):
            yield module, name


def written(table: Table) -> str:
    """As JSON, one name a line."""
    modules = (
        f"{json.dumps(module)}: {{\n"
        + ",\n".join(f"  {json.dumps(name)}: {json.dumps(parameters)}" for name, parameters in names.items())
        + "\n}"
        for module, names in table.items()
    )
    return "{" + ",\n".join(modules) + "}\n"


if __name__ == "__main__":
    (PACKAGE / TABLE).write_text(written(derived(sources())), "utf-8")
