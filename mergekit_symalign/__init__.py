"""Align models by the exact symmetries of their architecture, then merge them with MergeKit."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_ERRORS = (
    "AlignmentFileError",
    "ArchitectureError",
    "CalibrationError",
    "CheckpointError",
    "ConfigError",
    "GeometryError",
    "HostError",
    "HubError",
    "HubFailureError",
    "ModelError",
    "OtherModelsError",
    "OtherStatisticsError",
    "ParameterError",
    "ShapeError",
    "StatisticsFileError",
    "SymalignError",
    "SymmetryError",
    "UnalignedCallError",
    "UnknownMethodError",
    "ValueInTensorError",
    "WorkerError",
)
_PUBLIC = {
    "install": "hook",
    "resolve": "families.resolve",
    "supported_architectures": "families.resolve",
    "solve_block": "symmetry.solve",
    "Solved": "symmetry.solved",
    "BlockElement": "symmetry.element",
    "TensorAxes": "symmetry.element",
    "HeadShape": "symmetry.options",
    "MlpShape": "symmetry.options",
    "Symmetries": "symmetry.options",
    **dict.fromkeys(_ERRORS, "errors"),
}
"""Each public name and the module it lies in, which is imported when the name is asked for (docs/api.md)."""

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
