"""The architecture that a model's config names."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from mergekit_symalign.errors import ArchitectureError


def named_architecture(config: Any, *, model: str, supported: Callable[[], Collection[str]]) -> str:
    """The one transformers class that a config names as the model's.

    Args:
        config: a transformers config.
        model: the model's name, for errors.
        supported: gives the classes to suggest where none is named.

    Raises:
        ArchitectureError: if none is named, or several are.
    """
    given = getattr(config, "architectures", None)
    names = [name for name in given if isinstance(name, str) and name] if isinstance(given, (list, tuple)) else []
    if len(names) == 1:
        return names[0]
    possible = supported()
    candidates = _candidates(config, possible)
    if names:
        reason = f"its config.json names {len(names)} architectures ({', '.join(map(str, names))}), but a model has one"
        candidates = [name for name in names if name in possible] or candidates
    else:
        reason = "its config.json names no architecture, so nothing says which tensors it has"
    shown = candidates or ["LlamaForCausalLM"]
    example = " or ".join(f'"architectures": ["{name}"]' for name in shown)
    raise ArchitectureError(
        f"model {model}", reason, f"Write {example}{'' if candidates else ' (or the right class)'} into its config.json"
    )


def _candidates(config: Any, supported: Collection[str]) -> list[str]:
    """The supported classes that transformers has for the config's ``model_type``, language models first."""
    from transformers.models.auto import modeling_auto

    model_type = str(getattr(config, "model_type", ""))
    tables = [table for name, table in vars(modeling_auto).items() if name.endswith("MAPPING_NAMES")]
    classes = [found for table in tables if isinstance(found := table.get(model_type), str)]
    causal = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type)
    return sorted({name for name in classes if name in supported}, key=lambda name: (name != causal, name))
