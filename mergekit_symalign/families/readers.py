"""``read_by: [mlp.*]`` in a family file: all tensors of a layer that fit a pattern and read the residual stream."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

_STREAM = "residual"
_WRITERS = ("attended", "down")
_READERS = ("query", "key", "value", "gate", "up", "expert")


def with_readers(raw: Mapping[str, Any]) -> dict[str, Any]:
    """A family file with the names that its patterns of readers mean, in the order of the file."""
    layer = raw.get("layer")
    if not isinstance(layer, Mapping):
        return dict(raw)
    return {**raw, "layer": {name: _expanded(spec, layer) for name, spec in layer.items()}}


def _expanded(spec: Any, layer: Mapping[str, Any]) -> Any:
    readers = spec.get("read_by") if isinstance(spec, Mapping) else None
    if not isinstance(readers, list) or not any("*" in str(one) for one in readers):
        return spec
    return {**spec, "read_by": list(dict.fromkeys(name for one in readers for name in _meant(str(one), layer)))}


def _meant(reader: str, layer: Mapping[str, Any]) -> Iterator[str]:
    if "*" not in reader:
        yield reader
    else:
        yield from (name for name, spec in layer.items() if fnmatchcase(name, reader) and _reads(name, spec))


def _reads(name: str, spec: Any) -> bool:
    """Whether a tensor is a matrix that reads the stream; among `other` axes the last one is read."""
    axes = spec.get("axes") if isinstance(spec, Mapping) else None
    if not isinstance(axes, list) or len(axes) < 2 or _STREAM not in axes or name.endswith("bias"):
        return False
    names = {str(name).rpartition(".")[2] for axis in axes for name in (axis if isinstance(axis, list) else [axis])}
    return not names & set(_WRITERS) and (bool(names & set(_READERS)) or axes[-1] == _STREAM)
