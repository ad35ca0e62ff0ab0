"""The tasks that find the alignment of one block: of one model, and of several side by side."""

from __future__ import annotations

import json
import logging
from typing import Any, Dict, Optional, Set, Tuple

import torch
from mergekit.graph import Task
from pydantic import model_validator

from mergekit_symalign.families.schema import BlockKind
from mergekit_symalign.graph.load import LoadFinite
from mergekit_symalign.symmetry.element import TensorAxes, rows_by_axis
from mergekit_symalign.symmetry.fitting import Values
from mergekit_symalign.symmetry.neurons.products import measured
from mergekit_symalign.symmetry.options import AttentionShape, BlockShape, MlpShape, Sides, Symmetries
from mergekit_symalign.symmetry.solve import solve_block
from mergekit_symalign.symmetry.solved import Solved
from mergekit_symalign.symmetry.threads import one_thread, two_at_a_time

LOG = logging.getLogger(__name__)
_LOGGED: Set[str] = set()  # purposes of products


class SolveBlock(Task[Dict[str, Any]]):
    """Aligns one attention block or MLP of a model to the anchor's.

    It depends on the loads of the merge itself, so that every tensor is read once. The result is
    ``{"actions": …, "facts": …}``: the element as tensors in dicts and tuples (`BlockElement.pack`; an axis whose
    optimum is the identity is left out), and what is known of the solve as a flat dict of plain numbers and strings.

    Attributes:
        kind: attention or MLP.
        axes: of each tensor of the block.
        anchor: the anchor's loads, in the same order.
        model: the model's loads, in the same order.
        heads: shape of the attention.
        mlp: shape of the MLP.
        use: symmetries that are admitted.
    """

    kind: BlockKind
    axes: Tuple[TensorAxes, ...]
    anchor: Tuple[LoadFinite, ...]
    model: Tuple[LoadFinite, ...]
    heads: AttentionShape
    mlp: MlpShape
    use: Symmetries

    @model_validator(mode="after")
    def _same_length(self) -> SolveBlock:
        if not len(self.axes) == len(self.anchor) == len(self.model):
            raise ValueError("axes, anchor and model must list the same tensors")
        return self

    def arguments(self) -> Dict[str, Task]:
        sides = (("anchor", self.anchor), ("model", self.model))
        return {f"{side}{i}": load for side, loads in sides for i, load in enumerate(loads)}

    def group_label(self) -> Optional[str]:
        return max(task.group_label() or "" for task in self.arguments().values())

    def uses_accelerator(self) -> bool:
        return True

    @property
    def shape(self) -> BlockShape:
        return self.mlp if self.kind.is_mlp else self.heads

    def execute(self, **tensors: torch.Tensor) -> Dict[str, Any]:
        return self.solved(self._sides(tensors))

    def solved(self, sides: Sides) -> Dict[str, Any]:
        """The result for rows of the block's axes."""
        with one_thread():
            solved = solve_block(sides, self.shape, self.use, values=Values.finite)
        _log_products()
        LOG.info("solved %s of %s: %s", self.model[0].tensor, self.model[0].model, json.dumps(solved.facts))
        return packed(solved)

    def _sides(self, tensors: Dict[str, torch.Tensor]) -> Sides:
        """For each axis the tensors that have it, as rows [axis, columns], anchor and model."""
        stored = ([tensors[f"{side}{i}"] for i in range(len(self.axes))] for side in ("anchor", "model"))
        anchor, model = (block_rows(self.kind, self.axes, of_one) for of_one in stored)
        return {axis: list(zip(rows, model[axis], strict=True)) for axis, rows in anchor.items()}


class SolveTogether(Task[Dict[str, Any]]):
    """Aligns the same block of several models to the anchor's, side by side. Each tensor goes to the device once.

    Attributes:
        solvers: one for each model.
    """

    solvers: Tuple[SolveBlock, ...]

    def arguments(self) -> Dict[str, Task]:
        return {name: load for load, name in self._names().items()}

    def _names(self) -> Dict[Task, str]:
        """A name for each load; models share those of the anchor."""
        names: Dict[Task, str] = {}
        for load in (load for solver in self.solvers for load in solver.arguments().values()):
            names.setdefault(load, f"load{len(names)}")
        return names

    def group_label(self) -> Optional[str]:
        return max(solver.group_label() or "" for solver in self.solvers)

    def uses_accelerator(self) -> bool:
        return True

    def execute(self, **tensors: torch.Tensor) -> Dict[str, Any]:
        names = self._names()

        def solve(i: int) -> Dict[str, Any]:
            solver = self.solvers[i]
            return solver.execute(**{name: tensors[names[load]] for name, load in solver.arguments().items()})

        numbers = range(len(self.solvers))
        solved = two_at_a_time(solve, numbers, next(iter(tensors.values())).device)
        return {str(i): solved[i] for i in numbers}


class OneOf(Task[Dict[str, Any]]):
    """What was found for one of several models, in the form of `SolveBlock`'s result.

    Attributes:
        solved: the task that finds it for all of them.
        index: of the model.
    """

    solved: Task
    index: int

    def arguments(self) -> Dict[str, Task]:
        return {"solved": self.solved}

    def group_label(self) -> Optional[str]:
        return self.solved.group_label()

    def execute(self, solved: Dict[str, Any]) -> Dict[str, Any]:
        result: Dict[str, Any] = solved[str(self.index)]
        return result


def _log_products() -> None:
    """In which numbers products are taken, once it was measured."""
    for purpose, seconds in measured().items():
        if purpose not in _LOGGED:
            _LOGGED.add(purpose)
            times = ", ".join(f"{name} {1000 * s:.1f} ms" for name, s in seconds.items())
            LOG.info("products for %s are taken in %s (%s)", purpose, min(seconds, key=seconds.__getitem__), times)


def packed(solved: Solved) -> Dict[str, Any]:
    """The result of a task that solves: tensors in dicts and tuples, and plain numbers and strings."""
    return {"actions": solved.element.pack(), "facts": dict(solved.facts)}


def block_rows(kind: BlockKind, axes: Tuple[TensorAxes, ...], stored: list[torch.Tensor]) -> Dict[str, Any]:
    """For each axis of a block the tensors that have it, as rows [axis, columns]."""
    rows: Dict[str, Any] = {}
    for x, of_tensor in zip(stored, axes, strict=True):
        for axis, part in rows_by_axis(x, of_tensor).items():
            if axis in kind.axes:
                rows.setdefault(axis, []).append(part)
    return rows
