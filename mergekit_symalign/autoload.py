"""Loads the hook when, and only when, MergeKit is imported. Imports nothing heavy.

`mergekit_symalign.pth` (and `mergekit_symalign.start` from Python 3.15 on, PEP 829) put a finder on ``sys.meta_path``
when the interpreter starts; the first import of one of MergeKit's modules below then comes here.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import sys
from collections.abc import Sequence
from types import ModuleType

MODULES = ("mergekit.merge_methods", "mergekit.plan", "mergekit.merge", "mergekit.scripts.merge_raw_pytorch")


class _Hooked(importlib.abc.Loader):
    """A module's own loader, followed by our hook."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        from mergekit_symalign.hook import on_import

        on_import(module)

    def __getattr__(self, name: str) -> object:
        return getattr(self._loader, name)


def find_spec(name: str, path: Sequence[str] | None) -> importlib.machinery.ModuleSpec | None:
    """The spec that Python's own path finder gives, with our hook behind its loader."""
    spec = importlib.machinery.PathFinder.find_spec(name, path)
    if spec is not None and spec.loader is not None:
        spec.loader = _Hooked(spec.loader)
    return spec


class SymalignFinder(importlib.abc.MetaPathFinder):
    """Stands first on ``sys.meta_path``; answers only for the modules above."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        return find_spec(fullname, path) if fullname in MODULES else None


def start() -> None:
    """Entry point of ``mergekit_symalign.start``: what the line in ``mergekit_symalign.pth`` does."""
    if os.environ.get("MERGEKIT_SYMALIGN_AUTOLOAD") != "0":
        watch()


def watch() -> None:
    """Put the finder first, once."""
    if not any(type(finder).__name__ == "SymalignFinder" for finder in sys.meta_path):
        sys.meta_path.insert(0, SymalignFinder())
