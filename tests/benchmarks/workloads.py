"""The merges that are timed: the same two models merged plainly and aligned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoints import BASE, LLAMA_1B, SMALL, Recipe, Shape, checkpoint

TARGET, SKILL, OTHER = 1, 2, 10  # seeds


@dataclass(frozen=True)
class Workload:
    """One line of the table.

    Attributes:
        name: what it is.
        models: target and skill.
        align_skill: whether the second model is aligned too.
        shape: of all models.
    """

    name: str
    models: tuple[Recipe, Recipe]
    align_skill: bool = True
    shape: Shape = LLAMA_1B

    def configs(self, cache: Path) -> tuple[dict[str, Any], dict[str, Any]]:
        """The plain merge and the aligned one; missing checkpoints are written."""
        folders = [str(checkpoint(cache, self.shape, recipe)) for recipe in (BASE, *self.models)]
        return _config("task_arithmetic", folders), _config("aligned_task_arithmetic", folders, self.align_skill)


def siblings(noise: float, **rest: Any) -> tuple[Recipe, Recipe]:
    return Recipe(TARGET, noise, **rest), Recipe(SKILL, noise)


def workloads(shape: Shape) -> Sequence[Workload]:
    ten = siblings(0.1)
    unrelated = (Recipe(OTHER + 1), Recipe(OTHER + 2))
    return (
        Workload("siblings, 10 % noise", ten, shape=shape),
        Workload("the same, skill with align: false", ten, align_skill=False, shape=shape),
        Workload("target permuted, rotated, rescaled", siblings(0.1, foreign=True), shape=shape),
        Workload("unrelated models", unrelated, shape=shape),
        Workload("siblings, 5 % noise", siblings(0.05), shape=shape),
        Workload("siblings, 30 % noise", siblings(0.3), shape=shape),
    )


def depths(shape: Shape, layers: Sequence[int]) -> Sequence[Workload]:
    """The first workload at several depths."""
    return [Workload(f"{n} layers", siblings(0.1, foreign=True), shape=shape.with_layers(n)) for n in layers]


def shapes(small: bool) -> tuple[Shape, tuple[int, ...]]:
    """The shape of the workloads, and the depths that are compared."""
    return (SMALL, (2,)) if small else (LLAMA_1B, (8, 16, 32))


def _config(method: str, folders: Sequence[str], align_skill: bool = True) -> dict[str, Any]:
    base, target, skill = folders
    models: list[dict[str, Any]] = [{"model": m, "parameters": {"weight": 1.0}} for m in (target, skill)]
    if not align_skill:
        models[1]["parameters"]["align"] = False
    return {"merge_method": method, "base_model": base, "models": models, "dtype": "bfloat16"}
