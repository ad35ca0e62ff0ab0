"""Writing statistics as they are measured: to a hidden folder first, under their name when all are there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from mergekit_symalign.errors import ConfigError
from mergekit_symalign.sealed.tensors import bytes_digest, described, raw_bytes
from mergekit_symalign.statistics.places import index_path, index_text, plain_path, shard_path
from mergekit_symalign.statistics.schema import ENTRY, MOST_TEXT, Measured, Origin, Tokens, parsed, sealed
from mergekit_symalign.whole_file import written_whole

SHARD_SIZE = 5 * 10**9  # bytes
_SUFFIX = ".safetensors"
_ALIGNMENT = 8  # of the data in a safetensors file


@dataclass
class _Shard:
    """The data of some tensors, one after another, in a file without a header."""

    path: Path
    tensors: dict[str, tuple[str, list[int], int]] = field(default_factory=dict)  # dtype, shape, bytes
    size: int = 0

    def append(self, name: str, x: Tensor) -> None:
        data = raw_bytes(x)
        with self.path.open("ab") as file:
            file.write(data)
        self.tensors[name] = (*described(x), len(data))
        self.size += len(data)

    def copy_to(self, out: Path, text: str) -> None:
        """Write a safetensors file: its header, and the data behind it."""
        header, at = {"__metadata__": {"format": "pt", ENTRY: text}}, 0
        entries: dict[str, object] = dict(header)
        for name, (dtype, shape, size) in self.tensors.items():
            entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
            at += size
        encoded = json.dumps(entries, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % _ALIGNMENT)
        with out.open("xb") as file:
            file.write(len(encoded).to_bytes(8, "little") + encoded)
            if self.size:
                with self.path.open("rb") as data:
                    shutil.copyfileobj(data, file, 1 << 24)


class StatisticsWriter:
    """Takes statistics one after another, in any order, and keeps none of them in memory.

    Args:
        path: of the file, ``NAME.safetensors``.
        folder: for its parts while it is written.
        shard_size: bytes of one file at most; a single tensor may be larger.
    """

    def __init__(self, path: Path, folder: Path, shard_size: int = SHARD_SIZE) -> None:
        self._path, self.folder, self._shard_size = path, folder, shard_size
        self._shards: list[_Shard] = []
        self._statistics: dict[str, dict[str, str]] = {}
        self._tokens: dict[str, Tokens] = {}
        self._digests: dict[str, str] = {}

    def put(self, kind: str, names: tuple[str, ...], x: Tensor) -> None:
        """Store one statistic that these tensors of the model share.

        Args:
            kind: one of `KINDS`.
            names: of the model's tensors.
            x: float32; its shape is what `StatisticsFile.read` gives.
        """
        stored = f"{kind} {names[0]}"
        assert stored not in self._digests
        shard = self._shard_for(x.numel() * x.element_size())
        shard.append(stored, x)
        self._digests[stored] = bytes_digest(x)
        for name in names:
            self._statistics.setdefault(name, {})[kind] = stored

    def count(self, names: tuple[str, ...], tokens: Tokens, *, unless_known: bool = False) -> None:
        """Note how many tokens reached these tensors; one number for each expert where they hold several."""
        noted = dict.fromkeys(names, tokens)
        self._tokens = {**noted, **self._tokens} if unless_known else {**self._tokens, **noted}

    def finish(self, origin: Origin, measured: Measured) -> list[Path]:
        """Write the file, or its shards and their index, which comes last.

        Returns:
            What was written; the index first.
        """
        tensors = {name: (*t[:2], self._digests[name]) for shard in self._shards for name, t in shard.tensors.items()}
        text = json.dumps(
            sealed(
                {
                    "origin": origin.model_dump(),
                    "measured": measured.model_dump(),
                    "statistics": self._statistics,
                    "tokens": self._tokens,
                    "tensors": tensors,
                }
            ),
            allow_nan=False,
        )
        assert len(text) <= MOST_TEXT
        parsed(text)
        remove_statistics(self._path)
        shards = self._shards or [_Shard(self.folder / "0")]
        if len(shards) == 1:
            self._place(shards[0], self._path, text)
            return [self._path]
        paths = [shard_path(self._path, i, len(shards)) for i in range(1, len(shards) + 1)]
        for shard, path in zip(shards, paths, strict=True):
            self._place(shard, path, json.dumps({"part_of": self._path.name}))
        table = {name: path.name for shard, path in zip(shards, paths, strict=True) for name in shard.tensors}
        with written_whole(index_path(self._path)) as scratch:
            scratch.write_text(index_text(text, table, sum(shard.size for shard in shards)), "utf-8")
        return [index_path(self._path), *paths]

    def _shard_for(self, size: int) -> _Shard:
        if not self._shards or (self._shards[-1].size and self._shards[-1].size + size > self._shard_size):
            self._shards.append(_Shard(self.folder / str(len(self._shards))))
        return self._shards[-1]

    def _place(self, shard: _Shard, path: Path, text: str) -> None:
        with written_whole(path) as scratch:
            shard.copy_to(scratch, text)
        shard.path.unlink(missing_ok=True)


@contextmanager
def writing(path: Path, shard_size: int = SHARD_SIZE) -> Iterator[StatisticsWriter]:
    """A writer whose parts lie in a hidden folder beside ``path``, which is gone at the end.

    What a killed run left there is removed first.
    """
    path = plain_path(path)
    folder = parts_folder(path)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield StatisticsWriter(path, folder, shard_size)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def parts_folder(path: Path) -> Path:
    """The hidden folder for the parts of a file, named after it."""
    return path.with_name(f".{path.name}.parts")


def write_statistics(
    path: Path,
    origin: Origin,
    measured: Measured,
    statistics: Mapping[str, Mapping[str, Tensor]],
    tokens: Mapping[str, Tokens],
    *,
    shard_size: int = SHARD_SIZE,
) -> list[Path]:
    """Write statistics that are in memory.

    Args:
        path: of the file, ``NAME.safetensors``.
        origin, measured: what they are of, and how they were measured.
        statistics: by name of the model's tensor and kind; the same tensor object is stored once.
        tokens: that reached each of the model's tensors.
        shard_size: bytes of one file at most; a single tensor may be larger.

    Returns:
        What was written; the index first where there are shards.
    """
    shared: dict[tuple[str, int], list[str]] = {}
    numbers: dict[tuple[str, int], Tensor] = {}
    for name, kinds in statistics.items():
        for kind, x in kinds.items():
            shared.setdefault((kind, id(x)), []).append(name)
            numbers[kind, id(x)] = x
    with writing(path, shard_size) as writer:
        for (kind, at), names in shared.items():
            writer.put(kind, tuple(names), numbers[kind, at])
        for name, count in tokens.items():
            writer.count((name,), count)
        return writer.finish(origin, measured)


def require_statistics_or_nothing(path: Path, what: str = "output") -> None:
    """
    Raises:
        ConfigError: if the name has another ending, or there is a file that is none of statistics.
    """
    path = plain_path(path)
    if path.suffix != _SUFFIX:
        raise ConfigError(f"{what} {path}", f"its name does not end in {_SUFFIX}", f"Name it {path.name}{_SUFFIX}")
    for there in filter(Path.exists, (path, index_path(path))):
        if not _holds_statistics(there):
            raise ConfigError(
                f"{what} {there}", "a file is there that holds no statistics", "Name another file, or remove it"
            )


def remove_statistics(path: Path) -> None:
    """Take away the file, or the index and its shards, that a new one of this name replaces; the index first."""
    old = list(path.parent.glob(f"{glob_escape(path.stem)}-?????-of-?????{path.suffix}"))
    index_path(path).unlink(missing_ok=True)
    for shard in filter(_holds_statistics, old):
        shard.unlink()
    if path.exists():
        path.unlink()


def _holds_statistics(path: Path) -> bool:
    try:
        if path.suffix == ".json":
            return ENTRY in path.read_text("utf-8")
        with safe_open(path, framework="pt") as file:
            return ENTRY in (file.metadata() or {})
    except (OSError, ValueError, SafetensorError):
        return False


def glob_escape(text: str) -> str:
    """The text itself, not a pattern."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in text)
