"""PyTorch's own files: which tensors they hold, and why one cannot be read."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from mergekit.io.loader import LazyPickleLoader

from mergekit_symalign.errors import CheckpointError
from mergekit_symalign.graph.damaged import damaged, describe

_CONVERT = (
    "Write it as safetensors: load it where you trust it, and pass its tensors to safetensors.torch.save_file as "
    "model.safetensors"
)
_FOREIGN = re.compile(r"Unsupported (?:global: GLOBAL|class) ([\w.]+)")


def is_pickle(path: Path) -> bool:
    """Whether MergeKit reads this file by PyTorch's own loader."""
    return path.suffix.lower() != ".safetensors"


def read_pickle(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a file by name, on the device ``meta``; entries that are no tensors (``epoch``) are left out.

    Raises:
        CheckpointError: naming the file, if it is damaged, or holds other objects than tensors and plain values; also
            if its tensors lie inside another entry, where MergeKit does not look.
    """
    state = _loaded(path)
    if not isinstance(state, dict):
        raise CheckpointError(str(path), f"it holds a {type(state).__name__} instead of named tensors", _CONVERT)
    tensors = {name: x for name, x in state.items() if isinstance(name, str) and isinstance(x, torch.Tensor)}
    nested = [name for name, x in state.items() if isinstance(x, dict) and _has_tensor(x)]
    if nested and (not tensors or "state_dict" in nested):
        raise CheckpointError(
            str(path), f"its tensors lie inside the entry {nested[0]!r}, where MergeKit does not read them", _CONVERT
        )
    if not tensors:
        raise CheckpointError(str(path), "it holds no tensors", "Name a checkpoint with weights")
    return tensors


def require_lazily_readable(path: Path) -> None:
    """
    Raises:
        CheckpointError: if MergeKit's ``--lazy-unpickle`` cannot read a file that `read_pickle` can.
    """
    try:
        LazyPickleLoader(str(path))
    except Exception as error:  # an unpickler raises whatever the file leads it to
        raise CheckpointError(
            str(path), f"MergeKit's lazy unpickler cannot read it ({describe(error)})", "Leave out --lazy-unpickle"
        ) from error


def _has_tensor(state: dict[Any, Any]) -> bool:
    return any(isinstance(x, torch.Tensor) for x in state.values())


def _loaded(path: Path) -> Any:
    try:
        return torch.load(path, map_location="meta", weights_only=True)
    except Exception as error:  # an unpickler raises whatever a damaged file leads it to
        foreign = _FOREIGN.search(str(error))
        if foreign is not None:
            raise CheckpointError(
                str(path),
                f"it holds an object of {foreign[1]} beside its tensors, and reading such a file can run foreign code",
                _CONVERT,
            ) from error
        detail = str(error).partition("WeightsUnpickler error: ")[2].splitlines() or [describe(error)]
        reason = detail[0].partition(". ")[0].rstrip(".: ")
        raise damaged(path, f"it cannot be read as a PyTorch file ({reason})") from error
