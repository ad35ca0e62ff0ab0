"""What MergeKit's architecture files get wrong about the names of whole modules."""

from __future__ import annotations

from mergekit.architecture import ModelArchitecture
from mergekit.architecture.base import ModuleDefinition


def with_dots(arch: ModelArchitecture) -> ModelArchitecture:
    """The same architecture, whose modules' prefixes end with a dot.

    MergeKit 0.1.5 asks for ``model.decoderlayers.0.…`` in Whisper, so its own merges of it fail.
    """
    return arch.model_copy(update={"modules": {name: _with_dot(module) for name, module in arch.modules.items()}})


def _with_dot(module: ModuleDefinition) -> ModuleDefinition:
    prefix = module.weight_prefix
    return module.model_copy(update={"weight_prefix": f"{prefix}."}) if prefix and not prefix.endswith(".") else module
