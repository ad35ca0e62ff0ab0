"""Where the numbers of a file of statistics lie: one safetensors file, or shards with an index beside them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from mergekit_symalign.errors import OtherStatisticsError, StatisticsFileError
from mergekit_symalign.hub.address import called
from mergekit_symalign.sealed.text import NewerFormatError, loaded, shown
from mergekit_symalign.statistics.schema import ENTRY, MOST_TEXT

REMEDY = "Give a file that mergekit-symalign measure wrote"
INDEX = ".index.json"
_MOST_INDEX = 2 * MOST_TEXT  # bytes; the text is escaped in it


def index_path(path: Path) -> Path:
    """Of the shards that stand for ``NAME.safetensors``."""
    return path.with_name(path.name + INDEX)


def numbered_shard(path: Path, number: int, count: int) -> Path:
    """``NAME-00001-of-00003.safetensors``, as checkpoints call theirs."""
    return path.with_name(f"{path.stem}-{number:05d}-of-{count:05d}{path.suffix}")


def plain_path(path: Path) -> Path:
    """``NAME.safetensors``, also where its index was named."""
    return path.with_name(path.name.removesuffix(INDEX)) if path.name.endswith(INDEX) else path


def read_text(path: Path) -> tuple[str, dict[str, Path]]:
    """The text of a file, and the file of each of its tensors (none named: all are in one).

    Raises:
        StatisticsFileError: if it cannot be read, or holds no statistics.
    """
    with reading(path):
        if path.name.endswith(INDEX) or (not path.exists() and index_path(path).exists()):
            return _from_index(path if path.name.endswith(INDEX) else index_path(path))
        with opened(path) as file:
            text = (file.metadata() or {}).get(ENTRY)
            names = list(file.keys())
        if text is None:
            raise ValueError("it is a safetensors file, but not one of statistics")
        return text, dict.fromkeys(names, path)


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    if not path.is_file():
        raise OtherStatisticsError(f"statistics {called(path)}", "it cannot be read (there is no such file)", REMEDY)
    with safe_open(path, framework="pt") as file:
        yield file


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Whatever goes wrong while a file is read, as one error that names it."""
    where = f"statistics {called(path)}"
    try:
        yield
    except NewerFormatError as error:
        raise StatisticsFileError(where, str(error), "Install a newer mergekit-symalign") from error
    except (OSError, SafetensorError) as error:
        raise StatisticsFileError(where, f"it cannot be read ({shown(error, 200)})", REMEDY) from error
    except (ValueError, RecursionError) as error:
        raise StatisticsFileError(where, shown(error, 300), REMEDY) from error


def _from_index(index: Path) -> tuple[str, dict[str, Path]]:
    if not index.is_file():
        raise OtherStatisticsError(f"statistics {called(index)}", "it cannot be read (there is no such file)", REMEDY)
    if index.stat().st_size > _MOST_INDEX:
        raise ValueError(f"its index has more than the {_MOST_INDEX} bytes that any file of statistics needs")
    raw = loaded(index.read_bytes().decode(), _MOST_INDEX, "index")
    metadata, table = raw.get("metadata"), raw.get("weight_map")
    text = metadata.get(ENTRY) if isinstance(metadata, Mapping) else None
    if not isinstance(text, str):
        raise ValueError("it is an index, but not one of statistics")
    if not isinstance(table, Mapping):
        raise ValueError("its index has no weight_map")
    return text, {name: _shard(index, shard) for name, shard in table.items()}


def _shard(index: Path, shard: Any) -> Path:
    """
    Raises:
        ValueError: if it is not called as a shard of this index: an index names no other files.
    """
    plain = plain_path(index)
    pattern = re.escape(plain.stem) + r"-\d{5}-of-\d{5}" + re.escape(plain.suffix)
    if not isinstance(shard, str) or re.fullmatch(pattern, shard) is None:
        raise ValueError(f"its index names {shown(shard)}, which is not one of its shards")
    return index.with_name(shard)


def index_text(text: str, table: Mapping[str, str], size: int) -> str:
    """What an index holds.

    Args:
        text: of the file.
        table: the shard of each tensor.
        size: of all tensors, in bytes.
    """
    return json.dumps({"metadata": {"total_size": size, ENTRY: text}, "weight_map": dict(table)})
