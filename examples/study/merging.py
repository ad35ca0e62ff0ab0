"""Merges of small models through MergeKit's YAML configurations, and distances between checkpoints.

A configuration is written to disk and merged in this process by ``run_merge``, which is what ``mergekit-yaml`` calls;
a process for each of some thousand merges would take hours of imports. A test compares both.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions

from mergekit_symalign.methods import ALIGNMENT_NAMES

from .models import State, load_state
from .settings import HERE

MERGES = HERE / "merges"
PLAIN = {"aligned_task_arithmetic": "task_arithmetic", "rotation_match": "linear"}
OPTIONS: dict[str, Any] = {"copy_tokenizer": False, "quiet": True, "write_model_card": False}


def variants() -> dict[str, dict[str, Any] | None]:
    """Name -> parameters that are added to a merge; None: MergeKit's own method."""
    content: dict[str, dict[str, Any] | None] = yaml.safe_load((MERGES / "variants.yml").read_text("utf-8"))
    return content


def available(variant: str) -> bool:
    """Whether the installed mergekit-symalign knows all parameters of a variant."""
    return set(variants()[variant] or {}) <= ALIGNMENT_NAMES


@dataclass(frozen=True)
class Merger:
    """Runs the merges of one set of models.

    Attributes:
        models: what the names in the configurations stand for.
        work: where configurations and merges are written.
        prompts: file for matching from activations.
    """

    models: Mapping[str, Path]
    work: Path
    prompts: Path

    def merge(self, merge: str, variant: str, weights: Sequence[float] | None = None) -> State:
        """Run ``merges/<merge>.yml`` as this variant, and load its result.

        Args:
            weights: in place of those in the file, one for each listed model.
        """
        return load_state(self._run(self.config(merge, variant, weights), self.work / "merged"))

    def aligned(self, variant: str) -> Merger:
        """The same models with the target rewritten in the reference's coordinates; plain merges of them are aligned.

        Each rewritten target has a directory of its own: MergeKit keeps files open by their path.
        """
        if variant == "plain":
            return self
        folder = self.work / f"{self.models['target'].name}-{variant}"
        return replace(self, models={**self.models, "target": self._run(self.config("rewrite", variant), folder)})

    def _run(self, config: dict[str, Any], out: Path) -> Path:
        return run(config, self.work, out)

    def config(self, merge: str, variant: str, weights: Sequence[float] | None = None) -> dict[str, Any]:
        """The configuration, with directories for names."""
        config: dict[str, Any] = yaml.safe_load((MERGES / f"{merge}.yml").read_text("utf-8"))
        added = variants()[variant]
        for i, entry in enumerate(config["models"]):
            entry["model"] = str(self.models[entry["model"]])
            if weights is not None:
                entry["parameters"]["weight"] = weights[i]
        config["base_model"] = str(self.models[config["base_model"]])
        if added is not None:
            filled = {key: str(self.prompts) if key == "calibration" else value for key, value in added.items()}
            return config | {"parameters": filled}
        return _plain(config)


def run(config: dict[str, Any], work: Path, out: Path, **options: Any) -> Path:
    """Write the configuration to ``work/config.yml``, and merge what is read from there into ``out``."""
    work.mkdir(parents=True, exist_ok=True)
    path = work / "config.yml"
    path.write_text(yaml.safe_dump(config, sort_keys=False), "utf-8")
    shutil.rmtree(out, ignore_errors=True)
    content = MergeConfiguration.model_validate(yaml.safe_load(path.read_text("utf-8")))
    log = logging.getLogger("mergekit_symalign")
    level = log.level
    log.setLevel(logging.ERROR)  # without the warning of rotation: full, each time
    try:
        run_merge(content, str(out), MergeOptions(**OPTIONS | options))
    finally:
        log.setLevel(level)
    return out


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    for entry in config["models"]:
        entry.get("parameters", {}).pop("align", None)
    method = PLAIN[config["merge_method"]]
    if method == "linear":
        del config["base_model"]
    return config | {"merge_method": method}


def distances(anchor: State, state: State) -> dict[str, float]:
    """Frobenius norms of the difference: all tensors, those that alignment can move, query and key projections."""
    square = {name: float((x.double() - state[name].double()).square().sum()) for name, x in anchor.items()}

    def norm(*parts: str) -> float:
        return float(sum(s for name, s in square.items() if any(part in name for part in parts))) ** 0.5

    return {
        "total_distance": norm(""),
        "blocks_distance": norm("_proj."),
        "query_key_distance": norm("q_proj.", "k_proj."),
    }


def moved_neurons(before: State, after: State) -> float:
    """The share of MLP neurons that stand elsewhere: their gate rows differ (no variant here scales those)."""
    gates = [name for name in before if name.endswith("gate_proj.weight")]
    moved = torch.cat([(before[name] != after[name]).any(1) for name in gates])
    return float(moved.float().mean())


def moved_heads(before: State, after: State, head_dim: int) -> float:
    """The share of KV heads that stand elsewhere: the Gram matrix of their value rows is no longer their own.

    A rotation keeps it up to rounding, a scale up to a factor.
    """
    values = [name for name in before if name.endswith("v_proj.weight")]
    pairs = [(before[name].unflatten(0, (-1, head_dim)), after[name].unflatten(0, (-1, head_dim))) for name in values]
    grams = [tuple((x.mT @ x).flatten(1) for x in pair) for pair in pairs]
    kept = torch.cat([torch.cosine_similarity(x, y, dim=1) > 0.999 for x, y in grams])
    return float((~kept).float().mean())
