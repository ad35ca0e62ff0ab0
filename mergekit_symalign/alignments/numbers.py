"""The numbers of an alignment file: how they are stored, read back, and known to be those that were saved."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import gcd
from pathlib import Path
from typing import Any

import torch
from safetensors import torch as safetensors_torch
from torch import Tensor

from mergekit_symalign.alignments.schema import FORMAT, MOST_TEXT
from mergekit_symalign.sealed.tensors import bytes_digest, described
from mergekit_symalign.sealed.text import digest
from mergekit_symalign.symmetry.element import unpack
from mergekit_symalign.symmetry.groups import AxisAction
from mergekit_symalign.whole_file import written_whole

ENTRY = "mergekit_symalign"  # of the metadata of the safetensors file
Steps = Sequence[Sequence[Any]]  # [[kind, [reference, …]], …]; a reference is [tensor's name, repeats]

_INDICES, _NUMBERS = ("I32", "I64"), ("F32", "F64")


@dataclass(frozen=True)
class Stored:
    """One tensor of a file.

    Attributes:
        dtype: as safetensors calls it.
        shape: as stored.
        sha256: of its bytes; None where the file does not say (format 1).
    """

    dtype: str
    shape: tuple[int, ...]
    sha256: str | None = None

    @property
    def is_index(self) -> bool:
        return self.dtype in _INDICES

    def repeated(self, repeats: int) -> tuple[int, ...]:
        """The shape of its rows, so many times each."""
        return (self.shape[0] * repeats, *self.shape[1:]) if self.shape else ()


class Store:
    """Tensors by name, equal ones once."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._names: dict[bytes, str] = {}

    def steps(self, name: str, action: AxisAction) -> Steps:
        parts = [(kind, numbers) for step in action.pack() for kind, numbers in step.items()]
        return [
            [kind, [self._reference(f"{name} {i} {kind} {j}", x) for j, x in enumerate(numbers)]]
            for i, (kind, numbers) in enumerate(parts)
        ]

    def _reference(self, name: str, x: Tensor) -> tuple[str, int]:
        x = x.detach().cpu().to(x.dtype if x.is_floating_point() else torch.int32)
        repeats = _repeats(x)
        x = x.unflatten(0, (-1, repeats)).select(1, 0).contiguous()
        content = safetensors_torch.save({"x": x})
        if content not in self._names:
            self._names[content] = name
            self.tensors[name] = x
        return self._names[content], repeats


def write(path: Path, content: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write a file of this format; it appears under its name only when it is whole.

    Args:
        path: of the file.
        content: its text, without the format and what tells damage.
        tensors: its numbers.
    """
    text = json.dumps(sealed(content, tensors), allow_nan=False)
    assert len(text) <= MOST_TEXT
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as scratch:
        safetensors_torch.save_file(dict(tensors), scratch, metadata={ENTRY: text})


def sealed(content: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The text of a file of this format, as JSON holds it, with the digests that tell damage."""
    table = {name: [*described(x), bytes_digest(x)] for name, x in tensors.items()}
    whole: dict[str, Any] = json.loads(json.dumps({**content, "format": FORMAT, "tensors": table}))
    return whole | {"sha256": digest(whole)}


def headers(file: Any) -> dict[str, Stored]:
    """What an opened file says of its tensors.

    Raises:
        ValueError: if one is of a type that no alignment has.
    """
    found = {}
    for name in file.keys():  # noqa: SIM118
        part = file.get_slice(name)
        found[name] = Stored(str(part.get_dtype()), tuple(part.get_shape()))
        if found[name].dtype not in (*_INDICES, *_NUMBERS):
            raise ValueError(f"numbers of type {found[name].dtype}")
    return found


def first_digest(file: Any) -> str:
    """The digest of format 1: over all numbers at once."""
    tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
    return hashlib.sha256(safetensors_torch.save(tensors)).hexdigest()


def read_action(file: Any, steps: Steps, stored: Mapping[str, Stored]) -> AxisAction:
    """The action of one axis, from an opened file.

    Raises:
        ValueError: if a tensor is not the one that was saved.
    """
    packed = [
        {kind: tuple(_number(tensor(file, name, stored[name]), repeats) for name, repeats in references)}
        for kind, references in steps
    ]
    return unpack(packed)


def tensor(file: Any, name: str, stored: Stored) -> Tensor:
    """One tensor of an opened file.

    Raises:
        ValueError: if it is not the one that was saved.
    """
    x: Tensor = file.get_tensor(name)
    if stored.sha256 is not None and bytes_digest(x) != stored.sha256:
        raise ValueError("its numbers are damaged: they differ from what was saved")
    return x


def _number(x: Tensor, repeats: int) -> Tensor:
    x = x.long() if not x.is_floating_point() else x
    return x.repeat_interleave(repeats, dim=0) if repeats > 1 else x


def _repeats(x: Tensor) -> int:
    """How often every matrix along the first axis is repeated (an action of KV heads, for each query head)."""
    if x.ndim < 2 or len(x) < 2:
        return 1
    changes = (x.narrow(0, 1, len(x) - 1) != x.narrow(0, 0, len(x) - 1)).flatten(1).any(1)
    return gcd(len(x), *(torch.nonzero(changes).flatten() + 1).tolist())
