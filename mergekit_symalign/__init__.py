"""Align models by the exact symmetries of their architecture, then merge them with MergeKit."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "install": "hook",
    "SymalignError": "errors",
    "resolve": "families.resolve",
    "supported_architectures": "families.resolve",
    "BlockElement": "symmetry.element",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
