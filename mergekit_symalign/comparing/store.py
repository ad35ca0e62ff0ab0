"""What was measured, on disk: a run that was stopped goes on with what is missing."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergekit_symalign.errors import ConfigError
from mergekit_symalign.whole_file import written_whole

RESULTS = "results.json"
_FORMAT = 1


def digest(*parts: Any) -> str:
    """SHA-256 of whatever JSON can hold."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        for chunk in iter(lambda: file.read(2**20), b""):
            found.update(chunk)
    return found.hexdigest()


class Store:
    """The file ``results.json`` of a folder; written as a whole after each measurement.

    Two kinds of entries, each by a digest of all that it depends on: costs of merges, and measurements.
    """

    def __init__(self, folder: Path) -> None:
        """
        Raises:
            ConfigError: if there is a file of that name that is not one of ours.
        """
        self._path = folder / RESULTS
        self._known: dict[str, Any] = {"format": _FORMAT, "costs": {}, "measured": {}}
        if self._path.exists():
            self._known = self._read()

    def cost(self, key: str) -> Mapping[str, Any] | None:
        return self._known["costs"].get(key)  # type: ignore[no-any-return]

    def measured(self, key: str) -> Mapping[str, Any] | None:
        return self._known["measured"].get(key)  # type: ignore[no-any-return]

    def put_cost(self, key: str, cost: Mapping[str, Any]) -> None:
        self._put("costs", key, cost)

    def put_measured(self, key: str, found: Mapping[str, Any]) -> None:
        self._put("measured", key, found)

    def _put(self, kind: str, key: str, value: Mapping[str, Any]) -> None:
        self._known[kind][key] = dict(value)
        with written_whole(self._path) as scratch:
            scratch.write_text(json.dumps(self._known) + "\n", "utf-8")

    def _read(self) -> dict[str, Any]:
        try:
            found = json.loads(self._path.read_text("utf-8"))
            kinds = [type(found[name]) for name in ("costs", "measured")]
        except (OSError, ValueError, KeyError, TypeError):
            found, kinds = {}, []
        if kinds != [dict, dict] or found.get("format") != _FORMAT:
            reason = "it was not written by this version of compare"
            raise ConfigError(f"results {self._path}", reason, "Remove it to measure anew, or name another --out")
        return found  # type: ignore[no-any-return]
