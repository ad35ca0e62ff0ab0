"""Ways to change an alignment file, with digests that fit the change or not."""

from __future__ import annotations

import copy
import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import torch as safetensors_torch
from torch import Tensor

from mergekit_symalign.alignments.numbers import ENTRY, sealed
from mergekit_symalign.sealed.text import digest

Content = dict[str, Any]
Tensors = dict[str, Tensor]
_Place = tuple[Any, ...]
_COMPLEX = (torch.complex64,) if hasattr(safetensors_torch, "_TYPES") and "C64" in safetensors_torch._TYPES else ()


def changed(rng: random.Random, raw: bytes, content: Content, tensors: Tensors, path: Path) -> str:
    """Write a file that differs from a valid one; returns how.

    Args:
        rng: decides.
        raw, content, tensors: of the valid file: its bytes, its text as JSON and its tensors.
        path: of the file to write.
    """
    if rng.random() < 0.2:
        how = rng.choice(_BYTES)
        path.write_bytes(how(rng, raw))
        return how.__name__
    content, tensors = copy.deepcopy(content), dict(tensors)
    changes = [rng.choice(_CHANGES) for _ in range(rng.choice((1, 1, 1, 2, 3)))]
    for change in changes:
        change(rng, content, tensors)
    seal = rng.choice(_SEALS)
    text = json.dumps(seal(content, tensors))
    if rng.random() < 0.1:
        text = rng.choice(_TEXTS)(rng, text)
    safetensors_torch.save_file(tensors, path, metadata={ENTRY: text})
    return f"{' and '.join(change.__name__ for change in changes)}, {seal.__name__}"


# How the digest is treated.


def _sealed(content: Content, tensors: Tensors) -> Content:
    """The digests of a file that its author has changed."""
    return sealed(content, tensors)


def _tidied(content: Content, tensors: Tensors) -> Content:
    """The same without tensors and facts that no block has any more: only the change itself is wrong."""
    blocks = content.get("blocks")
    used = {x for place in _places(blocks) if isinstance(x := _at(blocks, place), str)}
    for name in [name for name in tensors if name not in used]:
        del tensors[name]
    if isinstance(blocks, dict) and isinstance(content.get("facts"), dict):
        content["facts"] = {block: x for block, x in content["facts"].items() if block in blocks}
    return sealed(content, tensors)


def _text_sealed(content: Content, tensors: Tensors) -> Content:
    """Only the text's own digest."""
    return content | {"sha256": digest(content)}


def _first_format(content: Content, tensors: Tensors) -> Content:
    """The format that had no digest of its text."""
    whole = {name: value for name, value in content.items() if name != "tensors"} | {"format": 1}
    saved = safetensors_torch.save({name: tensors[name] for name in sorted(tensors)})
    return whole | {"sha256": hashlib.sha256(saved).hexdigest()}


def _as_it_was(content: Content, tensors: Tensors) -> Content:
    return content


_SEALS = (_sealed, _tidied, _tidied, _tidied, _text_sealed, _first_format, _first_format, _as_it_was)


# Bytes of the file.


def _flipped(rng: random.Random, raw: bytes) -> bytes:
    changed, header = bytearray(raw), int.from_bytes(raw[:8], "little") + 8
    for _ in range(rng.choice((1, 1, 4))):
        changed[rng.randrange(rng.choice((8, header, len(raw))))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _cut(rng: random.Random, raw: bytes) -> bytes:
    return raw[: rng.randrange(len(raw))]


def _longer(rng: random.Random, raw: bytes) -> bytes:
    at = rng.randrange(len(raw))
    return raw[:at] + rng.randbytes(rng.choice((1, 8, 4096))) + raw[at:]


def _header(rng: random.Random, raw: bytes) -> bytes:
    """The table of tensors that safetensors keeps, changed in one place."""
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    _json(rng, header, {})
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + raw[8 + size :]


def _length(rng: random.Random, raw: bytes) -> bytes:
    return rng.choice((0, 1, 2**20, 2**31, 2**63 - 1, 2**64 - 1)).to_bytes(8, "little") + raw[8:]


_BYTES: tuple[Callable[[random.Random, bytes], bytes], ...] = (_flipped, _cut, _longer, _header, _header, _length)


# Text of the metadata, as JSON's syntax admits it or not.


def _doubled_key(rng: random.Random, text: str) -> str:
    return '{"blocks": {}, ' + text[1:] if rng.random() < 0.5 else text[:-1] + ', "sha256": "0"}'


def _nested(rng: random.Random, text: str) -> str:
    deep = rng.choice((20, 1000, 300_000))
    return (
        text[:-1]
        + ', "more": '
        + rng.choice(("[" * deep + "]" * deep, '{"a":' * deep + "0" + "}" * deep, "[" * deep))
        + "}"
    )


def _odd_number(rng: random.Random, text: str) -> str:
    return text.replace("1.0", rng.choice(("NaN", "-Infinity", "1e999", "9" * 5000, "1" + "0" * 400)), 1)


_TEXTS = (_doubled_key, _nested, _odd_number)


# Fields of the text.

_VALUES: tuple[Any, ...] = (
    *(None, True, False, "", "x", "layer 0 mlp", "full", "F64", "\x1b[2J", "y" * 5000, "\ud800"),
    *(0, 1, -1, 2, 3, 8, 10**9, 2**31, 2**63, 10**30, -(10**9), 0.5, -0.0, 1e308, float("nan"), float("inf")),
    *([], {}, [[]], [["permutation", []]], {"a": {"b": {}}}, ["x", 10**9]),
)


def _places(node: Any, path: _Place = ()) -> list[_Place]:
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [place for key, value in items for place in ((*path, key), *_places(value, (*path, key)))]


def _at(content: Any, path: _Place) -> Any:
    for key in path:
        content = content[key]
    return content


def _parent(content: Any, path: _Place) -> Any:
    return _at(content, path[:-1])


def _json(rng: random.Random, content: Content, tensors: Tensors) -> None:
    """One field deleted, doubled, renamed, swapped with another or of another type and value."""
    places = _places(content)
    if not places:
        return
    path = rng.choice(places)
    parent, key = _parent(content, path), path[-1]
    what = rng.randrange(5)
    if what == 0:
        del parent[key]
    elif what == 1 and isinstance(parent, list):
        parent.insert(key, parent[key])
    elif what == 1:
        parent[rng.choice(("x", "gate", "query", "layer 7 mlp", "layer 0 mlp"))] = parent[key]
    elif what == 2 and isinstance(parent, dict):
        parent[rng.choice(("x", "up", "layer 00 mlp", "layer 9 mlp"))] = parent.pop(key)
    elif what == 3:
        other = rng.choice([place for place in places if len(place) == len(path)])
        home, name = _parent(content, other), other[-1]
        parent[key], home[name] = home[name], parent[key]
    else:
        parent[key] = copy.deepcopy(rng.choice(_VALUES))


def _axes(content: Content) -> list[tuple[str, str]]:
    """Block and axis of everything in a file that is still whole there."""
    blocks = content.get("blocks")
    found = blocks.items() if isinstance(blocks, dict) else ()
    return [(block, axis) for block, axes in found if isinstance(axes, dict) for axis in axes]


def _other_axis(rng: random.Random, content: Content, tensors: Tensors) -> None:
    """An axis takes what another one has: of its block, or of another layer."""
    axes = _axes(content)
    if axes:
        (block, axis), (other, source) = rng.choice(axes), rng.choice(axes)
        source = rng.choice((axis, source))
        content["blocks"][block][axis] = copy.deepcopy(content["blocks"][other].get(source, []))


def _without_axis(rng: random.Random, content: Content, tensors: Tensors) -> None:
    axes = _axes(content)
    if axes:
        block, axis = rng.choice(axes)
        del content["blocks"][block][axis]


def _other_block(rng: random.Random, content: Content, tensors: Tensors) -> None:
    """A block is left out, emptied, or takes what another one has."""
    blocks = content.get("blocks")
    if isinstance(blocks, dict) and blocks:
        block, other = rng.choice(list(blocks)), rng.choice(list(blocks))
        new = rng.choice((None, {}, copy.deepcopy(blocks[other])))
        if new is None:
            del blocks[block]
        else:
            blocks[block] = new


_KINDS = ("permutation", "scaling", "head_rotation", "plane_rotation", "interleaved_plane_rotation", "chain")
_KINDS += ("rotation", "head_matrix")


def _other_steps(rng: random.Random, content: Content, tensors: Tensors) -> None:
    """The steps of an axis in another order, twice, or of another kind."""
    axes = _axes(content)
    if axes:
        block, axis = rng.choice(axes)
        steps = content["blocks"][block][axis]
        if isinstance(steps, list) and steps:
            other = [[rng.choice(_KINDS), step[-1]] for step in steps if isinstance(step, list) and step]
            new = rng.choice((steps[::-1], steps * 2, steps * 50, other))
            content["blocks"][block][axis] = copy.deepcopy(new)


def _repeats(rng: random.Random, content: Content, tensors: Tensors) -> None:
    places = [p for p in _places(content.get("blocks", {})) if len(p) == 6 and p[-1] == 1]
    if places:
        path = rng.choice(places)
        _parent(content["blocks"], path)[1] = rng.choice((0, 1, 2, 3, 64, 1000, 10**6, 10**9, 2**62, -1, 1.5, "2"))


# The tensors.


def _values(rng: random.Random, content: Content, tensors: Tensors) -> None:
    """A few numbers of one tensor."""
    name = rng.choice(sorted(tensors))
    x = tensors[name].clone()
    if x.numel() == 0 or x.dtype not in (torch.float32, torch.float64, torch.int32, torch.int64):
        return
    flat = x.view(-1)
    at = [rng.randrange(len(flat)) for _ in range(rng.choice((1, 2, len(flat))))]
    if x.is_floating_point():
        odd = (float("nan"), float("inf"), 0.0, 1e30, 1e-30, 1e300, -1.0, 2.0, 1.001, 1 + 1e-9)
        factor = rng.choice(odd)
        for i in at:
            flat[i] = rng.choice((factor, float(flat[i]) * factor))
    else:
        for i in at:
            flat[i] = rng.choice((0, 1, -1, len(flat), 2**31 - 1, -(2**31), int(flat[at[0]])))
    tensors[name] = x


def _order(rng: random.Random, content: Content, tensors: Tensors) -> None:
    """The rows of one tensor in another order."""
    name = rng.choice(sorted(tensors))
    x = tensors[name]
    if x.ndim:
        tensors[name] = x[torch.tensor(rng.sample(range(len(x)), len(x)), dtype=torch.int64)].contiguous()


def _exchanged(rng: random.Random, content: Content, tensors: Tensors) -> None:
    one, other = rng.choice(sorted(tensors)), rng.choice(sorted(tensors))
    tensors[one], tensors[other] = tensors[other].clone(), tensors[one].clone()


def _shape(rng: random.Random, content: Content, tensors: Tensors) -> None:
    name = rng.choice(sorted(tensors))
    x = tensors[name]
    shapes: tuple[Callable[[], Tensor], ...] = (
        lambda: x.flatten(),
        lambda: x.unsqueeze(0),
        lambda: x.unsqueeze(-1),
        lambda: x[:-1] if x.ndim else x,
        lambda: x[:0] if x.ndim else x,
        lambda: torch.cat((x, x)) if x.ndim else x,
        lambda: x.flatten()[0] if x.numel() else x,
        lambda: x.mT if x.ndim > 1 else x,
    )
    tensors[name] = rng.choice(shapes)().clone().contiguous()


def _dtype(rng: random.Random, content: Content, tensors: Tensors) -> None:
    name = rng.choice(sorted(tensors))
    dtypes = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int8, torch.int32, torch.int64)
    more = (torch.bool, torch.uint8, torch.int16, *_COMPLEX, torch.float8_e4m3fn)
    tensors[name] = tensors[name].to(rng.choice(dtypes + more))


def _more_tensors(rng: random.Random, content: Content, tensors: Tensors) -> None:
    tensors["more"] = torch.zeros(3)


_CHANGES = (
    *(_json, _json, _json, _other_axis, _other_axis, _without_axis, _other_block, _other_steps, _repeats),
    *(_values, _values, _values, _order, _exchanged, _shape, _dtype, _more_tensors),
)
