"""Files that cannot be read: what they are instead, and JSON that is read strictly."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from reprlib import Repr
from typing import Any

from mergekit_symalign.errors import CheckpointError

JSON_LIMIT = 100_000_000  # bytes; the limit that safetensors has for its headers
_LFS = b"version https://git-lfs"
_SHORT = Repr()
_SHORT.maxstring = 120
_AGAIN = "Download the file again"


def damaged(path: Path, reason: str) -> CheckpointError:
    """The error for a file that is not what its name says."""
    found = _first_bytes(path)
    if found.startswith(_LFS):
        return CheckpointError(
            str(path),
            "it is a Git LFS pointer, a few lines of text in place of the file itself",
            "Fetch the files: git lfs pull in this directory, or hf download",
        )
    if found.startswith(b"GGUF"):
        return CheckpointError(str(path), "it is a GGUF file", "Use the model's safetensors, or convert it to them")
    if found.lstrip()[:1] == b"<":
        return CheckpointError(str(path), "it is a web page, not the file itself", _AGAIN)
    return CheckpointError(str(path), reason, _AGAIN)


def read_json(path: Path, *, strictly: bool = True) -> dict[str, Any]:
    """A JSON file that holds one object.

    Args:
        path: of the file.
        strictly: without names that stand twice and numbers that JSON does not have; transformers' configs may have
            both.

    Raises:
        CheckpointError: naming the file.
    """
    try:
        if path.stat().st_size > JSON_LIMIT:
            raise ValueError(f"it is larger than {JSON_LIMIT} bytes")
        return parsed_object(path.read_bytes(), strictly=strictly)
    except (OSError, ValueError) as error:
        raise damaged(path, f"it cannot be read as JSON ({describe(error)})") from error


def parsed_object(text: bytes, *, strictly: bool = True) -> dict[str, Any]:
    """The JSON object in a text, as `read_json` reads it.

    Raises:
        ValueError: if it is none.
    """
    hooks: dict[str, Any] = {"object_pairs_hook": _unique, "parse_constant": _no_number} if strictly else {}
    try:
        value = json.loads(text.decode("utf-8"), **hooks)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError("it is not a JSON object")
    return value


def describe(error: Exception) -> str:
    """An error's message on one line: its first line, and the next where that one only announces it."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1]).rstrip(".:")


def shown(name: str) -> str:
    """A name from a file, fit for a message: short, and on one line."""
    return _SHORT.repr(name)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"{shown(Counter(name for name, _ in pairs).most_common(1)[0][0])} is given twice")
    return found


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is not a number in JSON")


def _first_bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(len(_LFS))
    except (OSError, ValueError):
        return b""
