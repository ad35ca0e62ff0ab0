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
        models: target and skill, or more.
        aligned: how many of the models, from the first, are aligned; None for all.
        shape: of all models.
        options: of `mergekit-yaml`, for the plain merge too.
        method: of the plain merge.
    """

    name: str
    models: tuple[Recipe, ...]
    aligned: int | None = None
    shape: Shape = LLAMA_1B
    options: tuple[str, ...] = ()
    method: str = "task_arithmetic"

    def configs(self, cache: Path) -> tuple[dict[str, Any], dict[str, Any]]:
        """The plain merge and the aligned one; missing checkpoints are written."""
        folders = [str(checkpoint(cache, self.shape, recipe)) for recipe in (BASE, *self.models)]
        return _config(self.method, folders), _config(f"aligned_{self.method}", folders, self.aligned)


def siblings(noise: float, **rest: Any) -> tuple[Recipe, ...]:
    return Recipe(TARGET, noise, **rest), Recipe(SKILL, noise)


def workloads(shape: Shape) -> Sequence[Workload]:
    ten = siblings(0.1)
    unrelated = (Recipe(OTHER + 1), Recipe(OTHER + 2))
    return (
        Workload("siblings, 10 % noise", ten, shape=shape),
        Workload("the same, skill with align: false", ten, aligned=1, shape=shape),
        Workload("target permuted, rotated, rescaled", siblings(0.1, foreign=True), shape=shape),
        Workload("unrelated models", unrelated, shape=shape),
        Workload("siblings, 5 % noise", siblings(0.05), shape=shape),
        Workload("siblings, 30 % noise", siblings(0.3), shape=shape),
        Workload("no model aligned", ten, aligned=0, shape=shape),
        Workload("ties, siblings, 10 % noise", ten, shape=shape, method="ties"),
    )


def depths(shape: Shape, layers: Sequence[int]) -> Sequence[Workload]:
    """The first workload at several depths."""
    return [Workload(f"{n} layers", siblings(0.1, foreign=True), shape=shape.with_layers(n)) for n in layers]


def growth(shape: Shape) -> Sequence[Workload]:
    """Siblings at several depths, widths, numbers of models and of threads."""
    few = shape.with_layers(min(shape.layers, 4))
    more = [Recipe(seed, 0.1) for seed in (1, 2, 3)]
    return [
        *(
            Workload(f"{few.layers * n} layers", tuple(more[:2]), shape=few.with_layers(few.layers * n))
            for n in (1, 2, 4)
        ),
        *(Workload(f"hidden {x.hidden}", tuple(more[:2]), shape=x) for x in (few.scaled(1, 2), few, few.scaled(2, 1))),
        *(Workload(f"{n} model{'s' * (n > 1)}", tuple(more[:n]), shape=few) for n in (1, 2, 3)),
        *(Workload(f"-j {n}", tuple(more[:2]), shape=few, options=("-j", str(n))) for n in (1, 2, 4)),
    ]


def shapes(small: bool) -> tuple[Shape, tuple[int, ...]]:
    """The shape of the workloads, and the depths that are compared."""
    return (SMALL, (2,)) if small else (LLAMA_1B, (8, 16, 32))


def _config(method: str, folders: Sequence[str], aligned: int | None = None) -> dict[str, Any]:
    base, *rest = folders
    density = {"density": 0.5} if method.endswith("ties") else {}
    models: list[dict[str, Any]] = [{"model": m, "parameters": {"weight": 1.0} | density} for m in rest]
    for model in models[len(models) if aligned is None else aligned :]:
        model["parameters"]["align"] = False
    return {"merge_method": method, "base_model": base, "models": models, "dtype": "bfloat16"}
