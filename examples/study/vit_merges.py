"""Part 6: two vision transformers merged by the mergers of ``merges/vits.yml``, through MergeKit's configurations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from mergekit_symalign.cli import main as symalign

from .digits import processor
from .merging import MERGES, run

PLAIN = "plain"
WITH_BASE = ("task_arithmetic", "regmean_task_arithmetic")
BASELESS = ("fisher", "regmean")
MERGEKITS = ("linear", "task_arithmetic")  # cannot read a ViT; their aligned forms, told not to align, can
WEIGHT = 0.5  # unless a merger has its own
MEASURED = {"gram": ("--gram", "full"), "fisher": ("--gram", "none", "--fisher", "empirical", "--labels")}


@dataclass(frozen=True)
class VitMerger:
    """Two models, and the images from which they are measured and matched.

    Attributes:
        models: directories of `reference`, `target`, and of their `base` if they have one.
        images: for each of `reference` and `target` the images of its statistics; for `both` those to match on.
        work: where statistics, configurations and merges are written.
    """

    models: Mapping[str, Path]
    images: Mapping[str, Path]
    work: Path

    def merge(self, merger: str, match: str) -> Path:
        """Run one merger on matched models, and give the directory of the result.

        A diagonal Fisher belongs to the coordinates it was measured in, so there the target is rewritten, measured
        and merged plainly.
        """
        if merger == "fisher" and match != PLAIN:
            return self.rewritten(match).merge(merger, PLAIN)
        return self._run(self.config(merger, match), "merged")

    def rewritten(self, match: str) -> VitMerger:
        """The same models with the target in the reference's coordinates."""
        anchor, target = (str(self.models[name]) for name in ("reference", "target"))
        config = {"merge_method": "rotation_match", "base_model": anchor, "models": [{"model": target}]}
        out = self._run(
            config | {"parameters": self._filled(_described("matches", match))}, f"{self.models['target'].name}-{match}"
        )
        processor().save_pretrained(out)  # MergeKit copies tokenizers only
        return replace(self, models={**self.models, "target": out})

    def config(self, merger: str, match: str) -> dict[str, Any]:
        """The configuration, with paths for names."""
        asked = {"weight": WEIGHT, "measured": None, "parameters": {}} | _described("mergers", merger)
        method, parameters = asked["merge_method"], self._filled(asked["parameters"])
        base = {"base_model": str(self.models["base" if method in WITH_BASE else "reference"])}
        entries = [self._entry(name, asked["weight"], asked["measured"]) for name in ("reference", "target")]
        if match == PLAIN and method not in MERGEKITS:
            found = {"merge_method": method, "parameters": parameters} | (base if method not in BASELESS else {})
        else:
            aligning = {"align": False} if match == PLAIN else self._filled(_described("matches", match))
            ours = "rotation_match" if method == "linear" else f"aligned_{method}"
            found = {"merge_method": ours, "parameters": parameters | aligning} | base
        return {**found, "models": entries}

    def _entry(self, name: str, weight: float, measured: str | None) -> dict[str, Any]:
        """One model of a configuration."""
        statistics = {} if measured is None else {"statistics": str(self.statistics(name, measured))}
        return {"model": str(self.models[name]), "parameters": {"weight": weight} | statistics}

    def _filled(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        return {name: str(self.images["both"]) if name == "calibration" else x for name, x in parameters.items()}

    def _run(self, config: dict[str, Any], name: str) -> Path:
        return run({**config, "dtype": "float32"}, self.work, self.work / name)

    def statistics(self, name: str, kind: str) -> Path:
        """A model's statistics, measured now if they were not before."""
        path = self.work / f"{self.models[name].name}-{kind}.safetensors"
        if not path.exists():
            command = ("measure", str(self.models[name]), "-o", str(path), "--calibration", str(self.images[name]))
            symalign([*command, *MEASURED[kind], "--quiet"], standalone_mode=False)
        return path


@cache
def _described(what: str, name: str) -> dict[str, Any]:
    """An entry of ``merges/vits.yml``."""
    content = yaml.safe_load((MERGES / "vits.yml").read_text("utf-8"))
    return dict(content[what][name])
