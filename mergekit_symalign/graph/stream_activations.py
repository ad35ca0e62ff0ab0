"""Aligning residual streams by what the models do on prompts: a run of its own, in front of the merge.

The stream's element is known when the prompts have left the last layer, and every tensor of the merge waits for it. So
the run reads the models by itself, a layer at a time, and the merge reads them again. What enters the blocks' solves of
the stream's coordinates, products of weights beside those of activations, takes the element that was found so far.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Dict, Optional, Tuple

import torch
from mergekit.common import ModelReference
from mergekit.graph import Task
from mergekit.options import MergeOptions

from mergekit_symalign.activations.statistics import LEAVING
from mergekit_symalign.errors import ConfigError
from mergekit_symalign.families.resolve import ModelLayout
from mergekit_symalign.families.towers import index_of
from mergekit_symalign.graph.activations import Part, RunLayer, SolveActivations
from mergekit_symalign.graph.block import Block
from mergekit_symalign.graph.checkpoint_checks import Checkpoint
from mergekit_symalign.graph.load import LoadFinite
from mergekit_symalign.graph.planned import Planned, anchor_of, gather_of
from mergekit_symalign.graph.solve import packed
from mergekit_symalign.graph.stream_tasks import Loads, OfStream, SolveMoved
from mergekit_symalign.graph.streaming import Started, labelled, seen_by, start_run
from mergekit_symalign.symmetry.by_activations.evidence import GRAIN
from mergekit_symalign.symmetry.element import BlockElement
from mergekit_symalign.symmetry.fitting import Values
from mergekit_symalign.symmetry.residual.by_activations import SeenStream, SeenWeights
from mergekit_symalign.symmetry.residual.cross import StreamSums
from mergekit_symalign.symmetry.residual.kinds import STREAM, ResidualKind
from mergekit_symalign.symmetry.residual.membership import describe_stream
from mergekit_symalign.symmetry.residual.scope import Scope, around
from mergekit_symalign.symmetry.solve import solve_block

LOG = logging.getLogger(__name__)

Place = int | None  # a layer, or what lies outside the layers
BlockKey = tuple[int, str]  # layer and kind


@dataclass(frozen=True)
class Comparison:
    """A model whose stream is aligned to the anchor's.

    Attributes:
        kind: of the element.
        scopes: of its layers and of what lies outside.
        anchor, model: loads of both for the run, by place and name in the scope.
    """

    kind: ResidualKind
    scopes: Mapping[Place, Scope]
    anchor: Mapping[Place, Mapping[str, LoadFinite]]
    model: Mapping[Place, Mapping[str, LoadFinite]]

    def fields_of(self, block: Block) -> dict[str, Any]:
        """Those of a `SolveMoved` that tell the block's tensors, and the norms in front of them."""
        place = index_of(block.layer)
        scope = around(self.scopes[place], self.scopes[place].blocks[block.kind.value].parts, folds=self.kind.rotates)
        parts = tuple(scope.axes)
        return {
            "kind": block.kind,
            "mlp": block.mlp,
            "use": block.symmetries,
            "anchor": tuple(self.anchor[place][part] for part in parts),
            "model": tuple(self.model[place][part] for part in parts),
            "axes": tuple(scope.axes.values()),
            "stream_kind": self.kind,
            "scope": scope,
            "parts": parts,
        }


@dataclass(frozen=True)
class SeenModel:
    """The tasks that align one model.

    Attributes:
        solution: gives the stream's element.
        blocks: give those of its blocks.
    """

    solution: Task
    blocks: Mapping[BlockKey, Task]


class SumWeights(OfStream):
    """Adds a scope to what both models' weights have in common.

    Attributes:
        kind: of the stream's element.
        scope: a layer, or what lies outside the layers.
        anchor, model: its loads.
        blocks: kind of each of its blocks that is aligned, and the task that gives its element.
        before: the sum so far.
    """

    kind: ResidualKind
    scope: Scope
    anchor: Loads
    model: Loads
    blocks: Tuple[Tuple[str, Task], ...] = ()
    before: Optional[Task] = None

    def arguments(self) -> Dict[str, Task]:
        sides = {"anchor": self.anchor, "model": self.model}
        loads = {f"{side} {name}": load for side, loads in sides.items() for name, load in loads}
        blocks = {f"block {kind}": task for kind, task in self.blocks}
        return {**loads, **blocks, **({} if self.before is None else {"before": self.before})}

    def group_label(self) -> Optional[str]:
        return max(load.group_label() or "" for _, load in (*self.anchor, *self.model))

    def execute(self, before: Any = None, **found: Any) -> Tuple[Any, ...]:
        anchor, model = (
            {name: x for name, _ in loads if (x := found[f"{side} {name}"]) is not None}
            for side, loads in (("anchor", self.anchor), ("model", self.model))
        )
        blocks = {kind: BlockElement.unpack(found[f"block {kind}"]["actions"]) for kind, _ in self.blocks}
        more = SeenWeights.of_scope(self.scope, anchor, model, self.kind, blocks)
        return _as_tuple(more if before is None else _as_weights(before) + more)


class StreamSoFar(OfStream):
    """The stream's element as far as the prompts have come, and what was seen of it.

    Attributes:
        kind: of the element.
        seen: of the last layer that ran.
        weights: the sum over the scopes before it.
        before: the same up to the layer before it.
    """

    kind: ResidualKind
    seen: Task
    weights: Task
    before: Optional[Task] = None

    def arguments(self) -> Dict[str, Task]:
        own = {"seen": self.seen, "weights": self.weights}
        return own if self.before is None else {**own, "before": self.before}

    def group_label(self) -> Optional[str]:
        return self.seen.group_label()

    def execute(self, seen: Any, weights: Any, before: Any = None) -> Dict[str, Any]:
        found = SeenStream(*seen)
        found = found if before is None else SeenStream(*before["seen"]) + found
        sums = _as_weights(weights).sums
        share = GRAIN if before is None else found.both(BlockElement.unpack(before["actions"]), sums).share
        element = found.best(self.kind, sums, share)
        return {"actions": element.pack(), "seen": (found.cross, found.rows)}


class SolveSeenStream(OfStream):
    """The stream's element when the prompts have come through all layers; the result is that of `SolveBlock`.

    Attributes:
        kind: of the element.
        seen: the `StreamSoFar` of the last layer.
        weights: the sum over all scopes.
        model: for messages.
    """

    kind: ResidualKind
    seen: Task
    weights: Task
    model: str

    def arguments(self) -> Dict[str, Task]:
        return {"seen": self.seen, "weights": self.weights}

    def group_label(self) -> Optional[str]:
        return self.weights.group_label()

    def execute(self, seen: Any, weights: Any) -> Dict[str, Any]:
        stream, both = SeenStream(*seen["seen"]), _as_weights(weights)
        element = stream.likeliest(self.kind, both.sums)
        facts = {
            "objective": "activations",
            "distance_before": both.standing,
            "distance_after": both.sums.distance(element),
            "stream_agreement_before": stream.agreement(BlockElement({})),
            "stream_agreement_after": stream.agreement(element),
            **describe_stream(element, len(stream.cross)),
        }
        LOG.info("solved the residual stream of %s: %s", self.model, json.dumps(facts))
        return {"actions": element.pack(), "facts": facts}


class SolveMovedActivations(SolveMoved, SolveActivations):
    """Aligns one block by activations; the weights beside them are moved along the stream as far as it is known."""

    def execute(self, stream: Dict[str, Any], statistics: Any, **tensors: torch.Tensor) -> Dict[str, Any]:  # type: ignore[override]
        align = partial(self._align, statistics, stored=self._sides(tensors))
        return packed(solve_block(self.moved_sides(stream, tensors), self.shape, self.use, align, values=Values.finite))


def run_first(planned: Sequence[Planned], checkpoints: Mapping[ModelReference, Checkpoint]) -> list[Planned]:
    """The same tasks with loads of their own, scheduled before those of the merge: what is outside the layers, then
    every layer."""

    def label(i: int, one: Planned) -> str:
        claim = checkpoints[anchor_of(one[1])].layout.claim(one[0].name)
        layer = 0 if claim is None or claim.layer is None else claim.layer + 1
        return f" {layer:05d} {i:08d} {one[0].name}"  # a space stands before all names and digits

    return [(weight, labelled(task, label(i, (weight, task)))) for i, (weight, task) in enumerate(planned)]


def plan_seen_streams(
    planned: list[Planned],
    blocks: Sequence[Block],
    models: Mapping[ModelReference, Comparison],
    checkpoints: Mapping[ModelReference, Checkpoint],
    options: MergeOptions,
) -> dict[ModelReference, SeenModel]:
    """One run through all layers, of the anchor and all models together.

    Args:
        planned: all tensors of the merge (`run_first`).
        blocks: of the merge.
        models: what is compared.
        checkpoints, options: of the merge.

    Raises:
        ConfigError: if the merge does not have all layers of every model, at the same depth.
        CalibrationError: if the prompts cannot be used.
    """
    anchor = anchor_of(planned[0][1])
    layout = checkpoints[anchor].layout
    _require_all_layers(planned, layout)
    both = (anchor, *models)
    run = start_run(planned, both, layout.layers - 1, checkpoints, options)
    found = {m: _Chain(m, anchor, i, of, run, options.trust_remote_code) for i, (m, of) in enumerate(models.items())}
    hidden = run.hidden
    for layer in range(layout.layers):
        here = {m: [b for b in blocks if b.layer == layer and m in b.moved()] for m in models}
        more = (STREAM, LEAVING) if layer == layout.layers - 1 else (STREAM,)
        wanted = tuple((*seen_by((b.kind for b in here[m]), checkpoints[m].layout), *more) for m in models)
        step = RunLayer(hidden=hidden, recorded=run.recorded, wanted=wanted, **run.step(layer))
        hidden = Part(of=step, keys=("hidden",))
        for m, chain in found.items():
            chain.go_on(layer, step, here[m])
    return {m: chain.end() for m, chain in found.items()}


def _require_all_layers(planned: Sequence[Planned], layout: ModelLayout) -> None:
    """
    Raises:
        ConfigError: if the merge leaves out layers.
    """
    there = {layout.layer_of(info.name) for _, task in planned for info in gather_of(task).weight_info.values()}
    if missing := [layer for layer in range(layout.layers) if layer not in there]:
        raise ConfigError(
            "parameter residual",
            "with objective: activations the residual stream is compared in all layers, and the merge leaves out layer "
            f"{missing[0]}",
            "Solve whole models first (mergekit-symalign solve) and use alignment: with the file, or use objective: "
            "weights",
        )


class _Chain:
    """The tasks of one model, layer after layer."""

    def __init__(
        self,
        model: ModelReference,
        anchor: ModelReference,
        number: int,
        compared: Comparison,
        run: Started,
        trust_remote_code: bool,
    ) -> None:
        self._model, self._number, self._of = model, number, compared
        self._key = f"{anchor} {model} {compared.kind.value}"
        self._shared = {"digest": run.digests[0], "trust_remote_code": trust_remote_code}
        self._weights = self._summed(None, {}, None)
        self._so_far: StreamSoFar | None = None
        self._blocks: dict[BlockKey, Task] = {}

    def go_on(self, layer: int, step: RunLayer, blocks: Sequence[Block]) -> None:
        """Take in the layer that a step runs."""
        self._so_far = StreamSoFar(
            key=f"{self._key} {layer}",
            kind=self._of.kind,
            seen=Part(of=step, keys=("streams", self._number)),
            weights=self._weights,
            before=self._so_far,
        )
        here = {block.kind.value: self._solver(block, step, self._so_far) for block in blocks}
        self._blocks |= {(layer, kind): task for kind, task in here.items()}
        self._weights = self._summed(layer, here, self._weights)

    def end(self) -> SeenModel:
        assert self._so_far is not None
        solution = SolveSeenStream(
            key=self._key, kind=self._of.kind, seen=self._so_far, weights=self._weights, model=str(self._model)
        )
        return SeenModel(solution, self._blocks)

    def _solver(self, block: Block, step: RunLayer, stream: Task) -> SolveMovedActivations:
        return SolveMovedActivations(
            key=f"{self._key} {block.layer} {block.kind.value}",
            heads=block.heads(self._model),
            statistics=Part(of=step, keys=("statistics", self._number, block.kind.value)),
            stream=stream,
            **self._shared,
            **self._of.fields_of(block),
        )

    def _summed(self, place: Place, blocks: Mapping[str, Task], before: SumWeights | None) -> SumWeights:
        return SumWeights(
            key=f"{self._key} {place}",
            kind=self._of.kind,
            scope=self._of.scopes[place],
            anchor=tuple(self._of.anchor[place].items()),
            model=tuple(self._of.model[place].items()),
            blocks=tuple(blocks.items()),
            before=before,
        )


def _as_tuple(x: SeenWeights) -> Tuple[Any, ...]:
    return x.sums.cross, x.sums.gains, x.sums.constant, x.standing


def _as_weights(x: Tuple[Any, ...]) -> SeenWeights:
    *sums, standing = x
    return SeenWeights(StreamSums(*sums), standing)
