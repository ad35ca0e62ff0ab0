"""The tasks that find the alignment of one block: of one model, and of several side by side."""

from __future__ import annotations

import json
import logging
from typing import Any, Dict, Optional, Tuple

import torch
from mergekit.graph import Task
from pydantic import model_validator

from mergekit_symalign.families.schema import BlockKind
from mergekit_symalign.graph.load import LoadFinite
from mergekit_symalign.symmetry.blocks import align_attention, align_mlp
from mergekit_symalign.symmetry.describe import describe, describe_heads, describe_neurons
from mergekit_symalign.symmetry.element import BlockElement, TensorAxes, rows_by_axis
from mergekit_symalign.symmetry.options import Facts, HeadShape, MlpShape, Sides, Symmetries
from mergekit_symalign.symmetry.threads import one_thread, side_by_side

LOG = logging.getLogger(__name__)


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
    heads: HeadShape
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

    def execute(self, **tensors: torch.Tensor) -> Dict[str, Any]:
        sides = self._sides(tensors)
        facts: Dict[str, Any] = {}
        with one_thread():
            element = without_identities(align(self.kind, sides, self.heads, self.mlp, self.use, facts))
            facts |= describe_block(self.kind, element, sides, self.heads, self.mlp, facts)
        LOG.info("solved %s of %s: %s", self.model[0].tensor, self.model[0].model, json.dumps(facts))
        return {"actions": element.pack(), "facts": facts}

    def _sides(self, tensors: Dict[str, torch.Tensor]) -> Sides:
        """For each axis the tensors that have it, as rows [axis, columns], anchor and model."""
        stored = ([tensors[f"{side}{i}"] for i in range(len(self.axes))] for side in ("anchor", "model"))
        anchor, model = (block_rows(self.kind, self.axes, of_one) for of_one in stored)
        return {axis: list(zip(rows, model[axis], strict=True)) for axis, rows in anchor.items()}


class SolveTogether(Task[Dict[str, Any]]):
    """Aligns the same block of several models to the anchor's, side by side.

    Attributes:
        solvers: one for each model.
    """

    solvers: Tuple[SolveBlock, ...]

    def arguments(self) -> Dict[str, Task]:
        return {f"solver{i}_{name}": load for i, s in enumerate(self.solvers) for name, load in s.arguments().items()}

    def group_label(self) -> Optional[str]:
        return max(solver.group_label() or "" for solver in self.solvers)

    def uses_accelerator(self) -> bool:
        return True

    def execute(self, **tensors: torch.Tensor) -> Dict[str, Any]:
        def solve(i: int) -> Dict[str, Any]:
            solver = self.solvers[i]
            return solver.execute(**{name: tensors[f"solver{i}_{name}"] for name in solver.arguments()})

        numbers = range(len(self.solvers))
        solved = side_by_side(solve, numbers, next(iter(tensors.values())).device)
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


def block_rows(kind: BlockKind, axes: Tuple[TensorAxes, ...], stored: list[torch.Tensor]) -> Dict[str, Any]:
    """For each axis of a block the tensors that have it, as rows [axis, columns]."""
    rows: Dict[str, Any] = {}
    for x, of_tensor in zip(stored, axes, strict=True):
        for axis, part in rows_by_axis(x, of_tensor).items():
            if axis in kind.axes:
                rows.setdefault(axis, []).append(part)
    return rows


def align(
    kind: BlockKind, sides: Sides, heads: HeadShape, mlp: MlpShape, use: Symmetries, facts: Facts | None = None
) -> BlockElement:
    """The best element for one block of one model; ``facts`` takes what is known of the solve."""
    if kind is BlockKind.mlp:
        return align_mlp(sides, mlp, use, facts)
    return align_attention(sides, heads, use, facts)


def describe_block(
    kind: BlockKind, element: BlockElement, sides: Sides, heads: HeadShape, mlp: MlpShape, known: Facts | None = None
) -> Facts:
    """What an element does to a block, in plain numbers (asks the device for values).

    The distances are taken again only if the solver left none in ``known``.
    """
    own = describe_neurons(element, mlp) if kind is BlockKind.mlp else describe_heads(element, heads)
    if known is not None and {"distance_before", "distance_after"} <= known.keys():
        return own
    return {**describe(element, sides), **own}


def without_identities(element: BlockElement) -> BlockElement:
    """Leave out actions that change nothing, so that their tensors pass through untouched, bit for bit.

    Asks the device for values, as the assignment and the facts do.
    """
    return BlockElement({axis: g for axis, g in element.actions.items() if not bool(g.is_identity())})
