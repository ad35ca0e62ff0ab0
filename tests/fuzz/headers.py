"""Fuzzing the headers and indexes of checkpoints: each mutant is refused by name or read as safetensors reads it."""

from __future__ import annotations

import json
import random
import tempfile
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from mergekit.io.lazy_tensor_loader import ShardedTensorIndex
from safetensors import safe_open
from safetensors.torch import save_file

from mergekit_symalign.errors import CheckpointError, ModelError
from mergekit_symalign.graph.fingerprint import fingerprint
from mergekit_symalign.graph.headers import read_headers

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
NUMBERS = (0, 1, -1, 2, 3, 4, 24, 2**31, 2**62, 2**63, 2**64, 10**9, 640 * 10**9, 1.5, 1e308)
DTYPES = ("F32", "F16", "F64", "I8", "F8_E4M3", "F4", "BOOL", "Q4_K")
PATHS = ("../x", "/etc/hostname", "..\\x", "C:\\x", *SHARDS, SINGLE, INDEX, "a" * 300, "\0", ".", "", "\ud800")
NESTED: tuple[Any, ...] = (None, True, False, [], [0], [1, 2], [4, 0], [0, 24], [[]], {}, {"a": 1})
VALUES: tuple[Any, ...] = (*NUMBERS, *DTYPES, *PATHS, *NESTED)
KEYS = ("a", "__metadata__", "dtype", "zz", "é", "b.weightx")
NO_JSON = (b"NaN", b"-Infinity", b"1e999", b"9" * 5000, b"[" * 20000, b'{"a":' * 20000, b"\xff\xfe", b"01", b"")
MEMORY = 64, 2**20  # bytes that reading may take for each byte of the files, and beside them
Mutation = Callable[[random.Random, Path], None]


def sweep(count: int, seed: int) -> dict[str, int]:
    """Mutate sound checkpoints.

    Returns:
        How many were ``tried``; how many of them were ``refused`` by name, or read as safetensors reads them
        (``exact``); and how many ended in ``other`` ways: an error that is not ours, a header that safetensors or
        MergeKit does not read so, more memory than the files' size justifies.
    """
    found = Counter(tried=0, refused=0, exact=0, other=0)
    for i in range(count):
        with tempfile.TemporaryDirectory() as folder:
            found[_outcome(random.Random(f"{seed}-{i}"), Path(folder))] += 1
    return {**found, "tried": count}


def _outcome(rng: random.Random, folder: Path) -> str:
    rng.choice((_single, _single, _sharded))(rng, folder)
    tracemalloc.start()
    outcome = _read(folder)
    taken = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    allowed = MEMORY[0] * sum(file.stat().st_size for file in folder.iterdir()) + MEMORY[1]
    return outcome if taken <= allowed else "other"


def _read(folder: Path) -> str:
    try:
        headers = read_headers(folder)
        index = ShardedTensorIndex.from_disk(str(folder))  # MergeKit opens whatever we let pass
        fingerprint(index)
    except (CheckpointError, ModelError) as error:
        return "refused" if str(folder) in str(error) and error.remedy else "other"
    except Exception:  # what a fuzzer is for
        return "other"
    mine = {name: (header.stored, list(header.shape)) for name, header in headers.listed.items()}
    same = mine == _as_safetensors_reads(folder) and mine.keys() == index.tensor_paths.keys()
    return "exact" if same else "other"


def _as_safetensors_reads(folder: Path) -> dict[str, tuple[str, list[int]]] | None:
    """Type and shape of every tensor; None where safetensors refuses."""
    index, found = folder / INDEX, {}
    files = set(json.loads(index.read_text("utf-8"))["weight_map"].values()) if index.exists() else {SINGLE}
    listed = json.loads(index.read_text("utf-8"))["weight_map"] if index.exists() else None
    try:
        for file in files:
            with safe_open(folder / file, framework="pt") as shard:
                names = [n for n in shard.keys() if listed is None or listed.get(n) == file]  # noqa: SIM118
                slices = {name: shard.get_slice(name) for name in names}
                found |= {name: (part.get_dtype(), list(part.get_shape())) for name, part in slices.items()}
    except Exception:  # safetensors' own, which has several
        return None
    return found


def _single(rng: random.Random, folder: Path) -> None:
    _save(rng, folder / SINGLE, ("a", "b.weight", "c"))
    _mutated(rng, folder / SINGLE)


def _sharded(rng: random.Random, folder: Path) -> None:
    weight_map = {}
    for shard, names in zip(SHARDS, (("a", "b.weight"), ("c", "d")), strict=True):
        _save(rng, folder / shard, names)
        weight_map |= dict.fromkeys(names, shard)
    index = {"metadata": {"total_size": 100}, "weight_map": weight_map}
    (folder / INDEX).write_bytes(_text(rng, index, rng.choice((_changed, _same))))
    if rng.random() < 0.3:
        _mutated(rng, folder / rng.choice(SHARDS))


def _save(rng: random.Random, path: Path, names: tuple[str, ...]) -> None:
    dtypes = (torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool)
    shapes = ((2, 3), (4,), (), (0, 3), (1, 2, 2))
    state = {name: torch.zeros(rng.choice(shapes), dtype=rng.choice(dtypes)) for name in names}
    save_file(state, path, metadata=rng.choice((None, {"format": "pt"})))


def _mutated(rng: random.Random, path: Path) -> None:
    rng.choice((_bytes, _length, _size_field, _json, _json, _json, _json))(rng, path)


def _bytes(rng: random.Random, path: Path) -> None:
    data = bytearray(path.read_bytes())
    for _ in range(rng.randint(1, 4)):
        data[rng.randrange(len(data))] = rng.randrange(256)
    path.write_bytes(data)


def _length(rng: random.Random, path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: rng.randrange(len(data))] if rng.random() < 0.7 else data + bytes(rng.randint(1, 99)))


def _size_field(rng: random.Random, path: Path) -> None:
    size = rng.choice((0, 1, 2, 2**31, 640 * 10**9, 2**63, 2**64 - 1, 100_000_001, rng.randrange(400)))
    path.write_bytes(size.to_bytes(8, "little") + path.read_bytes()[8:])


def _json(rng: random.Random, path: Path) -> None:
    """The header changed, with a size field that fits it."""
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    text = _text(rng, json.loads(data[8:end]), _changed)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[end:])


def _same(rng: random.Random, value: Any) -> Any:
    return value


def _text(rng: random.Random, value: Any, change: Callable[[random.Random, Any], Any]) -> bytes:
    """As JSON, changed as a value or, sometimes, as text."""
    text = json.dumps(change(rng, value)).encode()
    if change is _same or rng.random() < 0.8:
        return text
    at = rng.randrange(len(text) + 1)
    if rng.random() < 0.5 and text.startswith(b'{"'):  # the first entry twice
        first = text[1 : text.find(b"}") + 1]
        return b"{" + first + b", " + text[1:]
    return text[:at] + rng.choice(NO_JSON) + text[at + rng.randrange(3) :]


def _changed(rng: random.Random, value: Any) -> Any:
    """A JSON value with one thing in it replaced, removed, added or renamed."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        action = rng.random()
        if action < 0.7:
            return value | {key: _changed(rng, value[key])}
        rest = {k: v for k, v in value.items() if k != key}
        if action < 0.8:
            return rest
        return rest | {
            rng.choice(("a", "__metadata__", "dtype", "zz", "é", key + "x")): rng.choice((value[key], *VALUES))
        }
    if isinstance(value, list) and value and rng.random() < 0.7:
        at = rng.randrange(len(value))
        return [*value[:at], _changed(rng, value[at]), *value[at + 1 :]]
    if type(value) is int and rng.random() < 0.5:
        return value + rng.choice((-8, -4, -1, 1, 4, 8))
    return rng.choice(VALUES)
