"""Results as one JSON file, one row for each thing measured, written after each: a killed study goes on from there."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Row = dict[str, Any]
KEY = ("part", "seed", "arm", "variant")


@dataclass(frozen=True)
class Store:
    """The rows of a results file, by what identifies them."""

    path: Path
    settings: dict[str, Any]
    rows: dict[tuple[Any, ...], Row]

    @staticmethod
    def open(path: Path, settings: DataclassInstance) -> Store:
        """Start a results file, or go on with one.

        Raises:
            ValueError: if the file was measured with other settings.
        """
        wanted = json.loads(json.dumps(asdict(settings)))
        if not path.exists():
            return Store(path, wanted, {})
        content = json.loads(path.read_text("utf-8"))
        if content["settings"] != wanted:
            raise ValueError(f"{path} was measured with other settings. Delete it to start again, or restore them.")
        return Store(path, wanted, {_key(row): row for row in content["rows"]})

    def measure(self, identity: Mapping[str, Any], measure: Callable[[], Row]) -> Row:
        """The row of this identity: the stored one, or a new one, which is then written."""
        key = _key(identity)
        if key not in self.rows:
            self.rows[key] = {**dict(zip(KEY, key, strict=True)), **measure()}
            self._write()
        return self.rows[key]

    def has(self, **identity: Any) -> bool:
        return _key(identity) in self.rows

    def _write(self) -> None:
        rows = [{name: _rounded(x) for name, x in row.items()} for row in self.rows.values()]
        content = {"settings": self.settings, "environment": environment()}
        lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
        text = f'{json.dumps(content, indent=1)[:-2]},\n "rows": [\n{lines}\n ]\n}}\n'
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_suffix(".unfinished")
        unfinished.write_text(text, "utf-8")
        unfinished.replace(self.path)


def environment() -> dict[str, str]:
    """What else a result depends on: a text of the study ships with Python, and kernels differ between versions."""
    packages = ("torch", "transformers", "mergekit")
    accelerator = {"accelerator": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return (
        {"python": platform.python_version(), "machine": platform.machine()}
        | accelerator
        | {name: metadata.version(name) for name in packages}
    )


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in KEY)


def _rounded(x: Any) -> Any:
    """Six digits are more than any of these numbers is good for."""
    return float(f"{x:.6g}") if isinstance(x, float) else x
