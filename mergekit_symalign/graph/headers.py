"""What the headers of checkpoint files tell, without reading a tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from mergekit_symalign.graph.damaged import JSON_LIMIT, damaged, describe, parsed_object, shown
from mergekit_symalign.graph.pickles import is_pickle, read_pickle
from mergekit_symalign.graph.weight_files import index_of, main_file, weight_map

_FLOATS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}  # of the types that safetensors has had from the start; newer ones are left to safetensors itself


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

    @property
    def size(self) -> int:
        """Bytes, where a number has a byte if nothing else is known of it."""
        bits = self.dtype.itemsize * 8 if self.dtype is not None else _BITS.get(self.stored, 8)
        return _size(list(self.shape)) * bits // 8


@dataclass(frozen=True)
class Headers:
    """Of all files of a checkpoint.

    Attributes:
        listed: of the tensors that MergeKit finds, by name.
        unlisted: of those that the files hold and their index does not name.
    """

    listed: Mapping[str, Header]
    unlisted: Mapping[str, Header]


def read_headers(folder: Path) -> Headers:
    """Headers of all tensors of a checkpoint (safetensors or PyTorch files, sharded or not).

    Raises:
        ModelError: if the directory holds no weights that MergeKit reads.
        CheckpointError: naming the file that is damaged, or that lacks a tensor which the index promises.
    """
    main = main_file(folder)
    index = index_of(main)
    return _of_shards(folder, weight_map(index)) if index.exists() else Headers(shard_headers(main), {})


def shards_of(folder: Path) -> list[Path]:
    """The files that hold a checkpoint's weights."""
    main = main_file(folder)
    index = index_of(main)
    return [folder / shard for shard in sorted(set(weight_map(index).values()))] if index.exists() else [main]


def _of_shards(folder: Path, file_of: Mapping[str, str]) -> Headers:
    listed: dict[str, Header] = {}
    unlisted: dict[str, Header] = {}
    names_in: dict[str, list[str]] = {}
    for name, shard in file_of.items():
        names_in.setdefault(shard, []).append(name)
    for shard, names in sorted(names_in.items()):
        found = shard_headers(folder / shard)
        if missing := next((name for name in names if name not in found), None):
            raise damaged(folder / shard, f"it lacks tensor {shown(missing)}, which the index places in it")
        listed |= {name: found.pop(name) for name in names}
        unlisted |= found
    return Headers(listed, {name: header for name, header in unlisted.items() if name not in listed})


def shard_headers(path: Path) -> dict[str, Header]:
    """Headers of one file.

    Raises:
        CheckpointError: naming the file.
    """
    if is_pickle(path):
        return {name: _of_tensor(x) for name, x in read_pickle(path).items()}
    return {
        name: Header(_FLOATS.get(entry["dtype"]), entry["dtype"], tuple(entry["shape"]))
        for name, entry in read_entries(path)[1].items()
    }


def read_entries(path: Path) -> tuple[int, dict[str, Any]]:
    """Where the data of a safetensors file begin, and its header's entry for each tensor.

    What comes back is what safetensors reads: every entry has a ``dtype``, a ``shape`` and ``data_offsets`` that fit
    each other and the file. No more memory is taken than the header's own size asks for.

    Raises:
        CheckpointError: if the file is no safetensors file, is cut short, or contradicts itself.
    """
    try:
        start, entries = _entries(path)
        with safe_open(path, framework="pt"):  # whatever else safetensors itself does not read
            return start, entries
    except (OSError, ValueError, SafetensorError) as error:
        raise damaged(path, f"its header cannot be read ({describe(error)})") from error


def _entries(path: Path) -> tuple[int, dict[str, Any]]:
    whole = path.stat().st_size
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if not 0 < size <= min(whole - 8, JSON_LIMIT):
            raise ValueError("not a safetensors file, or cut short")
        entries = parsed_object(file.read(size))
    entries.pop("__metadata__", None)
    for name, entry in entries.items():
        _check_entry(name, entry)
    _check_layout(sorted((*entry["data_offsets"],) for entry in entries.values()), whole - 8 - size)
    return 8 + size, entries


def _check_entry(name: str, entry: Any) -> None:
    name = shown(name)
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
        raise ValueError(f"the entry of {name} has no dtype")
    shape, offsets = _counts(entry.get("shape")), _counts(entry.get("data_offsets"))
    if shape is None:
        raise ValueError(f"the shape of {name} is not a list of lengths")
    if offsets is None or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"the data_offsets of {name} are not a beginning and an end")
    bits = _BITS.get(entry["dtype"])
    if bits is not None and 8 * (offsets[1] - offsets[0]) != bits * _size(shape):
        raise ValueError(f"the shape, dtype and data_offsets of {name} contradict each other")


def _counts(value: Any) -> list[int] | None:
    """The value, if it is a list of numbers that count something."""
    right = isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value)
    return value if right else None


def _size(shape: list[int]) -> int:
    """How many numbers a tensor has, as long as a file can have as many."""
    size = 1
    for length in shape:
        size *= length
        if size >= 2**63:
            raise ValueError("a shape has more numbers than any file can hold")
    return size


def _check_layout(spans: list[tuple[int, int]], length: int) -> None:
    """The tensors lie one behind the other, from the first byte of the data to the last."""
    if any(first[1] != second[0] for first, second in pairwise([(0, 0), *spans])):
        raise ValueError("its tensors overlap, or leave a gap")
    if (spans[-1][1] if spans else 0) != length:
        raise ValueError("the file is shorter or longer than its header says")


def _of_tensor(x: torch.Tensor) -> Header:
    plain = x.layout is torch.strided and x.dtype in _FLOATS.values()
    return Header(x.dtype if plain else None, str(x.dtype if x.layout is torch.strided else x.layout), tuple(x.shape))
