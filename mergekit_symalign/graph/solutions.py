"""The tasks that find, read and keep the alignment of every block of a merge."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mergekit.architecture import WeightInfo
from mergekit.common import ModelReference
from mergekit.graph import Task
from mergekit.options import MergeOptions

from mergekit_symalign.families.towers import index_of
from mergekit_symalign.graph.activations import SolveActivations
from mergekit_symalign.graph.alignments import Alignments, ReadBlock, SourceBlock, require_same_layers
from mergekit_symalign.graph.apply import ApplyBlock
from mergekit_symalign.graph.block import SYMMETRY_NAMES, Block
from mergekit_symalign.graph.consensus import SolveConsensus
from mergekit_symalign.graph.load import LoadFinite
from mergekit_symalign.graph.merge_report import Reports
from mergekit_symalign.graph.models import Models, check_possible, check_same_neurons
from mergekit_symalign.graph.planned import Planned
from mergekit_symalign.graph.solve import OneOf, SolveBlock, SolveTogether
from mergekit_symalign.graph.stream_tasks import ApplyStream
from mergekit_symalign.graph.streaming import SHARED, StreamingPlan, Wanted, plan_streaming
from mergekit_symalign.graph.streams import MovedStream, outside_blocks, plan_streams

Applied = dict[str, dict[ModelReference, ApplyBlock | ApplyStream]]  # by the name of the output's tensor


@dataclass
class Solutions:
    """Plans the alignment of blocks.

    Attributes:
        models: of the merge.
        alignments: the files that it reads and writes.
        reports: where the facts of every solve go.
        options: MergeKit's options.
    """

    models: Models
    alignments: Alignments
    reports: Reports
    options: MergeOptions
    _streaming: StreamingPlan | None = field(default=None, init=False)
    _streams: dict[ModelReference, MovedStream] = field(default_factory=dict, init=False)

    def aligned(self, block: Block) -> Applied:
        """For each tensor of a block (by output name) the aligned task of each model that is aligned."""
        check_possible(block.symmetries, block.kind, block.layout)
        check_same_neurons(block, self.models.checkpoints)
        loads = block.loads()
        solutions = self._solutions(block, loads)
        for model, solution in solutions.items():
            self._record(block, model, solution)
            self.reports.record(model, block.layer, block.kind, solution)
        return {
            weight.name: {
                model: ApplyBlock(load=loads[model][i], axes=block.axes[i], solution=solution)
                for model, solution in solutions.items()
                if model not in self._streams or block.in_tower
            }
            | self._moved_along(block, weight, solutions)
            for i, (weight, _) in enumerate(block.members)
        }

    def move_streams(self, planned: list[Planned], blocks: list[Block]) -> Applied:
        """Plan the alignment of residual streams; gives the tasks of tensors that belong to no block."""
        own = [block for block in blocks if not block.in_tower]
        self._streams = plan_streams(planned, own, self.models, self.alignments, self.reports, self.options)
        return outside_blocks(planned, self._streams, self.models)

    def _moved_along(
        self, block: Block, weight: WeightInfo, solutions: Mapping[ModelReference, Task]
    ) -> dict[ModelReference, ApplyStream]:
        """The tasks of one tensor for models whose residual stream is moved, whether their block is aligned or not."""
        if block.in_tower:
            return {}
        claim = block.layout.claim(weight.name)
        assert claim is not None
        kind = block.kind.value
        return {
            model: stream.applied(claim.layer, claim.part, (kind, solutions[model]) if model in solutions else None)
            for model, stream in self._streams.items()
        }

    def _solutions(
        self, block: Block, loads: dict[ModelReference, tuple[LoadFinite, ...]]
    ) -> dict[ModelReference, Task]:
        """The task that gives each model's element."""
        moved = block.moved()
        shared: dict[str, Any] = {
            "kind": block.kind,
            "axes": block.axes,
            "mlp": block.mlp,
            "use": block.symmetries,
        }
        heads = {model: block.heads(model) for model in moved}
        if moved and block.agreed("anchor") == "consensus":
            block.require_possible_consensus(moved)
            ordered = sorted(moved, key=str)
            models = tuple(loads[m] for m in (block.anchor, *ordered))
            consensus = SolveConsensus(**shared, models=models, heads=heads[moved[0]])
            return {m: OneOf(solved=consensus, index=i) for i, m in enumerate(ordered, start=1)}
        solutions: dict[ModelReference, Task] = {}
        for m in moved:
            sides = {"anchor": loads[block.anchor], "model": loads[m], "heads": heads[m]}
            solutions[m] = self._saved(block, m, loads[m][0]) or self._solver(block, m, shared | sides)
        return solutions | _together({m: s for m, s in solutions.items() if type(s) is SolveBlock})

    def stream(self, planned: list[Planned], blocks: list[Block]) -> None:
        """Plan the run on prompts for all blocks that are to be matched by activations."""
        wanted = [
            Wanted(index_of(block.layer_of(model)), block.kind, model)
            for block in blocks
            if block.agreed("objective") == "activations" and not block.in_tower
            for model in block.moved()
            if model not in self._streams and block.agreed("alignment", model) is None
        ]
        if wanted:
            self._streaming = plan_streaming(planned, wanted, self.models.checkpoints, self.options)

    def _solver(self, block: Block, model: ModelReference, fields: dict[str, Any]) -> Task:
        if block.in_tower:  # what prompts do to other stacks of layers is not recorded
            return SolveBlock(**fields)
        if model in self._streams:
            return self._streams[model].solver(block, fields["heads"])
        if self._streaming is None or block.agreed("objective") != "activations":
            return SolveBlock(**fields)
        statistics = self._streaming.statistics[Wanted(index_of(block.layer_of(model)), block.kind, model)]
        return SolveActivations(
            statistics=statistics,
            digest=self._streaming.anchor_digest,
            trust_remote_code=self.options.trust_remote_code,
            **fields,
        )

    def _saved(self, block: Block, model: ModelReference, load: LoadFinite) -> ReadBlock | None:
        """The task that reads this block's element from the file that the user gave, if any."""
        path = block.agreed("alignment", model)
        if path is None:
            return None
        sha256, name = self.alignments.read(path, block.anchor, model, _source(block, model, "alignment"))
        return ReadBlock(path=self.alignments.path(path), sha256=sha256, block=name, label=load.group_label())

    def _record(self, block: Block, model: ModelReference, solution: Task) -> None:
        folder = block.agreed("save_alignment")
        if folder is not None:
            names = (*SYMMETRY_NAMES, "objective", *SHARED)
            settings = {name: block.members[0][1].parameters[name] for name in names} | {
                "heads": block.symmetries.heads
            }
            source = _source(block, model, "save_alignment")
            self.alignments.record(folder, block.anchor, model, source, solution, settings)


def _together(solvers: dict[ModelReference, SolveBlock]) -> dict[ModelReference, Task]:
    """The same solutions from weights, found side by side where there are several."""
    if len(solvers) < 2:
        return {}
    together = SolveTogether(solvers=tuple(solvers.values()))
    return {model: OneOf(solved=together, index=i) for i, model in enumerate(solvers)}


def _source(block: Block, model: ModelReference, what: str) -> SourceBlock:
    """Where an alignment file keeps a block: it pairs equal layers only."""
    layer = block.layer_of(model)
    require_same_layers(what, block.members[0][0].name, block.layer_of(block.anchor), layer)
    return layer, block.kind
