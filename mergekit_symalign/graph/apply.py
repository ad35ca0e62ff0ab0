"""The task that brings one tensor of a model into the anchor's coordinates."""

from __future__ import annotations

from typing import Any, Dict, Optional

import torch
from mergekit.graph import Task

from mergekit_symalign.graph.load import LoadFinite
from mergekit_symalign.graph.pieces import PIECE, in_pieces, is_large
from mergekit_symalign.symmetry.element import BlockElement, TensorAxes


class ApplyBlock(Task[torch.Tensor]):
    """Transforms one tensor by the element that was solved for its block.

    Attributes:
        load: the tensor.
        axes, offset: as for `SolveBlock`.
        solution: the task that gives the packed element (`SolveBlock`, or one that reads it from a file).

    Tensors that are turned or scaled leave in float32 (float64 for float64), so that the merge rounds once. Where
    numbers only change places, nothing was calculated and the dtype stays: they are merged as the original's would be.
    """

    load: LoadFinite
    axes: TensorAxes
    solution: Task

    def arguments(self) -> Dict[str, Task]:
        return {"tensor": self.load, "solution": self.solution}

    def group_label(self) -> Optional[str]:
        return self.load.group_label()

    def uses_accelerator(self) -> bool:
        return True

    def execute(self, tensor: torch.Tensor, solution: Dict[str, Any]) -> torch.Tensor:
        element = BlockElement.unpack(solution["actions"])
        free = self._free_dim(element, tensor)
        if free is None:
            return element(tensor, self.axes)

        def moved(start: int, length: int) -> torch.Tensor:
            return element(tensor.narrow(free, start, length), self.axes)

        return in_pieces(moved, tensor.shape, free, most=PIECE)

    def _free_dim(self, element: BlockElement, tensor: torch.Tensor) -> Optional[int]:
        """Along which dimension a large matrix may be divided: nothing is calculated along it."""
        moved = element.moves(self.axes)
        if tensor.ndim != 2 or not is_large(tensor) or self.axes.joined is not None or len(moved) != 1:
            return None
        return 1 - moved[0] if element.calculates(self.axes) else None
