"""Which of MergeKit's names this package needs, and which of them the installed MergeKit does not have.

`host_names.json` lists every name that our sources import or touch; `make host-names` derives it from them, and a test
keeps it up to date. MergeKit's modules are read here and not run: the whole list is checked before anything is hooked.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterable, Iterator
from functools import cache
from importlib.machinery import ModuleSpec, PathFinder
from importlib.resources import files

Names = dict[str, frozenset[str]]
"""``Class``, ``Class.member`` or ``function``, with the names of its parameters (none for what is no function)."""

TABLE = "host_names.json"
_SHOWN = 3  # of the missing names, in a message


@cache
def problem() -> str | None:
    """What the installed MergeKit lacks, in words, or None."""
    lacking = [name for module, names in needed().items() for name in missing(module, names, source_of(module))]
    if not lacking:
        return None
    more = f" and {len(lacking) - _SHOWN} more" if len(lacking) > _SHOWN else ""
    return f"without {', '.join(lacking[:_SHOWN])}{more}"


def needed() -> dict[str, Names]:
    """The table: for each of MergeKit's modules, what we use of it."""
    raw = json.loads((files(__package__) / TABLE).read_text("utf-8"))
    return {module: {name: frozenset(p) for name, p in names.items()} for module, names in raw.items()}


def missing(module: str, names: Names, source: str | None) -> list[str]:
    """What is not in the source of a module; the module itself if there is no source."""
    if source is None:
        return [module]
    found = names_in(ast.parse(source))
    return [
        lacking for name, wanted in names.items() for lacking in _lacking(f"{module}.{name}", wanted, found.get(name))
    ]


def _lacking(name: str, wanted: frozenset[str], found: frozenset[str] | None) -> list[str]:
    if found is None:
        return [name]
    return [f"{name}({parameter})" for parameter in sorted(wanted - found)]


def source_of(module: str) -> str | None:
    """The source of a module, which is not imported (nor are the packages it is in); None if there is none."""
    spec = _spec_of(module)
    read = getattr(spec.loader, "get_source", None) if spec is not None else None
    source: str | None = read(module) if read is not None else None
    return source


def _spec_of(module: str) -> ModuleSpec | None:
    package, _, _ = module.rpartition(".")
    if not package:
        return PathFinder.find_spec(module)
    parent = _spec_of(package)
    folders = parent.submodule_search_locations if parent is not None else None
    return PathFinder.find_spec(module, folders) if folders is not None else None


def names_in(tree: ast.Module) -> Names:
    """What a module binds: imports, variables, functions, and classes with their members."""
    found: Names = {}
    for node in statements(tree.body):
        found |= dict.fromkeys(bound_by(node), frozenset())
        if isinstance(node, ast.FunctionDef):
            found[node.name] = parameters_of(node)
        elif isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{member}": parameters for member, parameters in members_of(node).items()}
    return found


def members_of(owner: ast.ClassDef) -> Names:
    """Fields, methods, and what the methods assign to ``self``."""
    found: Names = {}
    for node in statements(owner.body):
        found |= dict.fromkeys(bound_by(node), frozenset())
        if isinstance(node, ast.FunctionDef):
            found |= dict.fromkeys(_assigned_to_self(node), frozenset())
            found[node.name] = parameters_of(node)
    return found


def statements(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """All statements of a module's or class's body, those inside ``if``, ``try`` and ``with`` too."""
    for node in body:
        yield node
        if isinstance(node, (ast.If, ast.Try, ast.With)):
            yield from statements(child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt))


def bound_by(node: ast.stmt) -> list[str]:
    """The names that one statement binds."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return [node.name]
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return [alias.asname or alias.name.partition(".")[0] for alias in node.names]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


def parameters_of(function: ast.FunctionDef) -> frozenset[str]:
    of = function.args
    return frozenset(arg.arg for arg in (*of.posonlyargs, *of.args, *of.kwonlyargs))


def _assigned_to_self(function: ast.FunctionDef) -> set[str]:
    return {
        node.attr
        for node in ast.walk(function)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    }
