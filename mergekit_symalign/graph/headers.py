"""What the headers of checkpoint files tell, without reading a tensor."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mergekit.io.lazy_tensor_loader import ShardedTensorIndex

from mergekit_symalign.errors import CheckpointError

_FLOATS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}


@dataclass(frozen=True)
class Header:
    """One stored tensor.

    Attributes:
        dtype: None if it is not an ordinary floating-point type (quantised weights, indices).
        stored: the dtype as the file names it.
        shape: as stored.
    """

    dtype: torch.dtype | None
    stored: str
    shape: tuple[int, ...]


def read_headers(index: ShardedTensorIndex) -> dict[str, Header]:
    """Headers of all tensors of a checkpoint, by name (safetensors or PyTorch files, sharded or not)."""
    headers: dict[str, Header] = {}
    for shard in sorted(set(index.tensor_paths.values())):
        headers |= _shard_headers(Path(index.base_path) / shard)
    return headers


def _shard_headers(path: Path) -> dict[str, Header]:
    try:
        return _safetensors(path) if path.suffix == ".safetensors" else _pickle(path)
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(str(path), f"its header cannot be read ({error})", "Download the file again") from error


def read_entries(path: Path) -> tuple[int, dict[str, Any]]:
    """Where the data of a safetensors file begin, and its header's entry for each tensor.

    Raises:
        ValueError: if the file is no safetensors file, or is cut short.
    """
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if not 0 < size < path.stat().st_size:
            raise ValueError("not a safetensors file, or cut short")
        entries = json.loads(file.read(size))
    entries.pop("__metadata__", None)
    end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    if 8 + size + end != path.stat().st_size:
        raise ValueError("the file is shorter or longer than its header says")
    return 8 + size, entries


def _safetensors(path: Path) -> dict[str, Header]:
    return {
        name: Header(_FLOATS.get(entry["dtype"]), entry["dtype"], tuple(entry["shape"]))
        for name, entry in read_entries(path)[1].items()
    }


def _pickle(path: Path) -> dict[str, Header]:
    state = torch.load(path, map_location="meta", weights_only=True)
    state = state.get("state_dict", state)
    return {
        name: Header(x.dtype if x.dtype in _FLOATS.values() else None, str(x.dtype), tuple(x.shape))
        for name, x in state.items()
    }
