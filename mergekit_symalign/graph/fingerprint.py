"""Which checkpoint an alignment belongs to: a hash that is cheap to take and changes with the weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from mergekit.common import ModelReference
from mergekit.io.lazy_tensor_loader import ShardedTensorIndex
from mergekit.io.tasks import LoaderCache

from mergekit_symalign.graph.headers import read_entries

_WINDOWS = 8  # of each tensor
_BYTES = 4096  # in each window


def fingerprint(index: ShardedTensorIndex) -> str:
    """SHA-256 over every tensor's name, dtype, shape and a sample of its bytes.

    The sample is up to 8 evenly spaced windows of 4 KiB of each tensor: under 10 MB of an 8B model with its 291
    tensors, instead of the 16 GB that a hash of everything would read. Training moves the weights of a tensor
    everywhere, so a sample tells checkpoints apart; an edit of a few single weights may stay unseen. How the tensors
    are spread over files does not matter, except for PyTorch's pickles, whose files are sampled as a whole.
    """
    digest = hashlib.sha256()
    for _, described, path, start, length in sorted(_pieces(index)):
        digest.update(described.encode())
        with path.open("rb") as file:
            for offset in _offsets(length):
                file.seek(start + offset)
                digest.update(file.read(min(_BYTES, length - offset)))
    return digest.hexdigest()


def fingerprint_of(model: ModelReference) -> str:
    """The same of a model's checkpoint, as `LoaderCache` has it."""
    return fingerprint(LoaderCache().get(model).index)


def _pieces(index: ShardedTensorIndex) -> Iterator[tuple[str, str, Path, int, int]]:
    """Name, description, file, first byte and length of everything that is sampled."""
    for shard in set(index.tensor_paths.values()):
        path = Path(index.base_path) / shard
        if path.suffix != ".safetensors":
            yield shard, shard, path, 0, path.stat().st_size
            continue
        data, entries = read_entries(path)
        for name, entry in entries.items():
            start, end = entry["data_offsets"]
            yield name, json.dumps([name, entry["dtype"], entry["shape"]]), path, data + start, end - start


def _offsets(length: int) -> list[int]:
    last = max(0, length - _BYTES)
    return sorted({last * i // (_WINDOWS - 1) for i in range(_WINDOWS)})
