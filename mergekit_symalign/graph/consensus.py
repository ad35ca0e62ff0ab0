"""The tasks that find the alignment of one block of all models at once (``anchor: consensus``)."""

from __future__ import annotations

from typing import Any, Dict, Optional, Tuple

import torch
from mergekit.graph import Task

from mergekit_symalign.families.schema import BlockKind
from mergekit_symalign.graph.load import LoadFinite
from mergekit_symalign.graph.solve import block_rows, packed
from mergekit_symalign.symmetry.consensus import Rows
from mergekit_symalign.symmetry.element import TensorAxes
from mergekit_symalign.symmetry.options import AttentionShape, MlpShape, Symmetries
from mergekit_symalign.symmetry.solve import solve_consensus


class SolveConsensus(Task[Dict[str, Any]]):
    """Aligns one block of several models to the mean that they agree on, in the coordinates of the base model.

    Attributes:
        kind: attention or MLP.
        axes: of each tensor of the block.
        models: the loads of every model, the base model first, the others in an order that does not depend on how
            they are listed.
        heads, mlp: shapes.
        use: symmetries that are admitted.
    """

    kind: BlockKind
    axes: Tuple[TensorAxes, ...]
    models: Tuple[Tuple[LoadFinite, ...], ...]
    heads: AttentionShape
    mlp: MlpShape
    use: Symmetries

    def arguments(self) -> Dict[str, Task]:
        return {f"model{m}_{i}": load for m, loads in enumerate(self.models) for i, load in enumerate(loads)}

    def group_label(self) -> Optional[str]:
        return max(task.group_label() or "" for task in self.arguments().values())

    def uses_accelerator(self) -> bool:
        return True

    def execute(self, **tensors: torch.Tensor) -> Dict[str, Any]:
        models = [self._rows(tensors, m) for m in range(len(self.models))]
        shape = self.mlp if self.kind.is_mlp else self.heads
        return {str(m): packed(solved) for m, solved in enumerate(solve_consensus(models, shape, self.use))}

    def _rows(self, tensors: Dict[str, torch.Tensor], model: int) -> Rows:
        return block_rows(self.kind, self.axes, [tensors[f"model{model}_{i}"] for i in range(len(self.axes))])
