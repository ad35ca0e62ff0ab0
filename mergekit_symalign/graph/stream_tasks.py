"""The tasks that align a model's residual stream: find its element once, then use it in every tensor's task."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any, Dict, Optional, Tuple

import torch
from mergekit.graph import Task

from mergekit_symalign.graph.load import LoadFinite
from mergekit_symalign.graph.solve import SolveBlock
from mergekit_symalign.symmetry.element import BlockElement
from mergekit_symalign.symmetry.options import Sides
from mergekit_symalign.symmetry.residual.alternate import align_stream, block_sides
from mergekit_symalign.symmetry.residual.kinds import ResidualKind
from mergekit_symalign.symmetry.residual.membership import describe_stream
from mergekit_symalign.symmetry.residual.move import comparable, move_scope, moved_along
from mergekit_symalign.symmetry.residual.scope import Scope, Tensors, norms_of

LOG = logging.getLogger(__name__)

Loads = Tuple[Tuple[str, LoadFinite], ...]  # by the tensor's name in its scope


class OfStream(Task[Any]):
    """A task whose fields MergeKit cannot hash: one key tells it from all others of a merge.

    Attributes:
        key: of the models and the tensors.
    """

    key: str

    def __hash__(self) -> int:
        return hash((type(self).__name__, self.key))

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and self.key == other.key  # type: ignore[attr-defined]

    def uses_accelerator(self) -> bool:
        return True


class SolveStream(OfStream):
    """Aligns the residual stream of a model to the anchor's.

    It reads both models by itself, once in every round, and holds one layer of each at a time. The result is that of
    `SolveBlock`.

    Attributes:
        kind: what the architecture admits.
        rounds: at most.
        scopes: what lies outside the layers, then every layer.
        anchor, model: the loads of each scope.
    """

    kind: ResidualKind
    rounds: int
    scopes: Tuple[Scope, ...]
    anchor: Tuple[Loads, ...]
    model: Tuple[Loads, ...]

    def arguments(self) -> Dict[str, Task]:
        return {}

    def group_label(self) -> Optional[str]:
        return min((load.group_label() or "" for _, load in self.model[0]), default=None)

    def uses_accelerator(self) -> bool:
        return False

    def execute(self) -> Dict[str, Any]:
        def read(i: int) -> Tuple[Tensors, Tensors]:
            return _loaded(self.anchor[i]), _loaded(self.model[i])

        found = align_stream(self.scopes, read, self.kind, self.rounds)
        facts = {
            "distance_before": found.distances[0],
            "distance_after": found.distances[-1],
            "residual_rounds": len(found.distances) - 1,
            **describe_stream(found.stream, found.hidden),
        }
        LOG.info("solved the residual stream of %s: %s", self.model[0][0][1].model, json.dumps(facts))
        return {"actions": found.stream.pack(), "facts": facts}


class SolveMoved(SolveBlock):
    """Aligns one block of a model whose residual stream is moved as well.

    Attributes:
        key: of the model and the block.
        stream: the task that gives the stream's element.
        stream_kind: of the element.
        scope: the block's tensors, and the norms in front of them.
        parts: name of each load in ``scope``.
    """

    key: str
    stream: Task
    stream_kind: ResidualKind
    scope: Scope
    parts: Tuple[str, ...]

    def __hash__(self) -> int:
        return hash((type(self).__name__, self.key))

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and self.key == other.key  # type: ignore[attr-defined]

    def arguments(self) -> Dict[str, Task]:
        return {**super().arguments(), "stream": self.stream}

    def group_label(self) -> Optional[str]:
        return max(load.group_label() or "" for load in (*self.anchor, *self.model))

    def execute(self, stream: Dict[str, Any], **tensors: torch.Tensor) -> Dict[str, Any]:  # type: ignore[override]
        return self.solved(self.moved_sides(stream, tensors))

    def moved_sides(self, stream: Dict[str, Any], tensors: Dict[str, torch.Tensor]) -> Sides:
        """The rows of the block's axes in comparable form, the model's moved along the stream."""
        element = BlockElement.unpack(stream["actions"])
        anchor, model = (
            comparable(self.scope, {p: tensors[f"{side}{i}"] for i, p in enumerate(self.parts)}, self.stream_kind)
            for side in ("anchor", "model")
        )
        moved = moved_along(self.scope, model, element)
        return block_sides(self.scope, self.scope.blocks[self.kind.value], anchor, moved)


class ApplyStream(OfStream):
    """Transforms one tensor of a model by the stream's element and its block's.

    Attributes:
        load: of the tensor.
        name: of the tensor in ``scope``.
        scope: the tensor, and all that its moved form depends on.
        tensors: loads of all of them.
        norms: the anchor's loads of the norms among them.
        kind: of the stream's element.
        stream: the task that gives it.
        block: kind of the tensor's block, and the task that gives its element; None for others.
    """

    load: LoadFinite
    name: str
    scope: Scope
    tensors: Loads
    norms: Loads
    kind: ResidualKind
    stream: Task
    block: Optional[Tuple[str, Task]] = None

    def arguments(self) -> Dict[str, Task]:
        own = {f"tensor{i}": load for i, (_, load) in enumerate(self.tensors)}
        norms = {f"norm{i}": load for i, (_, load) in enumerate(self.norms)}
        solution = {} if self.block is None else {"solution": self.block[1]}
        return {**own, **norms, **solution, "stream": self.stream}

    def group_label(self) -> Optional[str]:
        return self.load.group_label()

    def execute(self, stream: Dict[str, Any], solution: Any = None, **loaded: torch.Tensor) -> torch.Tensor:
        tensors = {name: loaded[f"tensor{i}"] for i, (name, _) in enumerate(self.tensors)}
        norms = {name: loaded[f"norm{i}"] for i, (name, _) in enumerate(self.norms)}
        element = BlockElement.unpack(stream["actions"])
        blocks = {} if self.block is None else {self.block[0]: BlockElement.unpack(solution["actions"])}
        found = norms_of(self.scope, norms) if norms else None
        return move_scope(self.scope, tensors, self.kind, element, blocks, found)[self.name]


def _loaded(loads: Loads) -> Mapping[str, torch.Tensor]:
    return {name: x for name, load in loads if (x := load.execute()) is not None}
