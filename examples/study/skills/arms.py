"""The ways of merging that are compared, and the MergeKit configuration of each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from ..merging import MERGES

GROUPS = ("few", "many", "all")  # each holds the ones before it


@dataclass(frozen=True)
class Arm:
    """One way of merging.

    Attributes:
        method: of MergeKit's or ours; parameters: for all models.
        base: whether the method gets the base model.
        statistics: the set of statistics that it reads.
    """

    name: str
    group: str
    method: str
    base: bool
    statistics: str | None
    parameters: Mapping[str, Any]

    def config(
        self, base: Path, models: Sequence[Path], weights: Sequence[float], files: Sequence[Path]
    ) -> dict[str, Any]:
        """The merge of these models; ``files`` are their statistics where the arm reads some."""
        entries = [
            {"model": str(model), "parameters": {"weight": weight * len(models)}}
            for model, weight in zip(models, weights, strict=True)
        ]
        for entry, file in zip(entries, files, strict=False):
            entry["parameters"]["statistics"] = str(file)
        config = {
            "merge_method": self.method,
            "models": entries,
            "parameters": dict(self.parameters),
            "dtype": "float32",
        }
        return config | ({"base_model": str(base)} if self.base else {})


@cache
def arms(group: str) -> tuple[Arm, ...]:
    """The arms of a group and of those that it holds, scans written out, in the order of the file."""
    content: dict[str, dict[str, Any]] = yaml.safe_load((MERGES / "arms.yml").read_text("utf-8"))
    wanted = GROUPS[: GROUPS.index(group) + 1]
    return tuple(arm for name, entry in content.items() if entry["group"] in wanted for arm in _scanned(name, entry))


def _scanned(name: str, entry: Mapping[str, Any]) -> Iterator[Arm]:
    parameters: dict[str, Any] = entry.get("parameters", {})
    facts = (entry["group"], entry["merge_method"], entry.get("base", True), entry.get("statistics"))
    if "scan" not in entry:
        yield Arm(name, *facts, parameters)
        return
    ((scanned, values),) = entry["scan"].items()
    for value in values:
        yield Arm(f"{name} {scanned}={value}", *facts, parameters | {scanned: value})
