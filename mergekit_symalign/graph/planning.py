"""From MergeKit's plan to the aligned one: the same tasks, the same inner method, on aligned inputs."""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit.architecture import WeightInfo
from mergekit.common import ImmutableMap, ModelReference
from mergekit.config import MergeConfiguration
from mergekit.graph import Task
from mergekit.io.tasks import FinalizeModel
from mergekit.merge_methods.base import ParameterScope
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask
from mergekit.options import MergeOptions
from mergekit.tokenizer import PermutedVocabulary
from mergekit.tokenizer.truncate import TruncatedVocabulary

from mergekit_symalign.errors import ParameterError
from mergekit_symalign.families.schema import BlockKind
from mergekit_symalign.graph.activations import SolveActivations
from mergekit_symalign.graph.alignments import Alignments, ReadBlock, SourceBlock, require_same_layers
from mergekit_symalign.graph.apply import ApplyBlock
from mergekit_symalign.graph.block import SYMMETRY_NAMES, Block
from mergekit_symalign.graph.checkpoint_checks import merged_dtype
from mergekit_symalign.graph.config_differences import Functions, compare_functions
from mergekit_symalign.graph.consensus import SolveConsensus
from mergekit_symalign.graph.leftovers import shortened
from mergekit_symalign.graph.load import GatherAligned, LoadFinite
from mergekit_symalign.graph.merge import merge_task
from mergekit_symalign.graph.merge_report import Reports
from mergekit_symalign.graph.models import Models, check_possible, check_same_neurons
from mergekit_symalign.graph.planned import Planned, anchor_of, gather_of
from mergekit_symalign.graph.solve import OneOf, SolveBlock, SolveTogether
from mergekit_symalign.graph.streaming import SHARED, StreamingPlan, Wanted, in_order, plan_streaming
from mergekit_symalign.methods import ALIGNMENT_NAMES, AlignedMethod
from mergekit_symalign.whole_file import require_writable_folder

LOG = logging.getLogger(__name__)

BlockKey = tuple[int, BlockKind]  # output layer and block


@dataclass
class AlignedPlan:
    """Rewrites the tensors that MergeKit planned for one of our methods.

    Attributes:
        config: the merge configuration.
        options: MergeKit's options.
        method: the aligned method.
        listed: models that the user listed (the anchor takes part in a method without base only if it is one).
    """

    config: MergeConfiguration
    options: MergeOptions
    method: AlignedMethod
    listed: frozenset[ModelReference]
    _streaming: StreamingPlan | None = None

    def __post_init__(self) -> None:
        self._models = Models(self.options.trust_remote_code)
        self._alignments = Alignments(self._models.checkpoints)
        self.reports = Reports()
        self._functions = Functions()

    def extra_tasks(self, out_path: str, targets: list[Task]) -> list[Task]:
        """What the merge does beside ``targets``, which write tensors to ``out_path``.

        Raises:
            ConfigError: if an alignment that is to be saved, or the output, cannot be written.
        """
        end = next((task for task in targets if isinstance(task, FinalizeModel)), None)
        require_writable_folder(Path(out_path))
        return [*self._alignments.save_tasks(Path(out_path)), self.reports.task(out_path, self._head, end)]

    def require_nothing_to_save(self) -> None:
        """
        Raises:
            ParameterError: if alignments are to be saved, and the merge writes no files (mergekit-evolve --in-memory).
        """
        if self._alignments.save_tasks():
            raise ParameterError(
                "parameter save_alignment",
                "the merge is planned in memory, which writes no files",
                "Leave it out, or solve first: mergekit-symalign solve ANCHOR MODEL -o FILE",
            )

    def other_names(self, info: WeightInfo, model: ModelReference) -> tuple[str, ...]:
        """The name under which this model's checkpoint has a tensor, if it is not the tensor's own."""
        return self._models.other_names(info, model)

    def tied_names(self, info: WeightInfo, model: ModelReference) -> tuple[str, ...]:
        """The stored names of the tensor that an absent one is tied to in this model."""
        return self._models.tied_names(info, model)

    def rewrite(self, planned: list[Planned]) -> list[tuple[WeightInfo, Task]]:
        """Check everything that headers can tell, then give every block's tensors to their aligned tasks."""
        self._models.open(m for _, task in planned for m in gather_of(task).weight_info)
        planned = [(weight, task) for weight, task in planned if not self._models.is_superfluous(task)]
        self._unread = self._models.check(planned)
        self._functions = self._compared(planned)
        streamed = any(task.parameters["objective"] == "activations" for _, task in planned)
        planned = in_order(planned) if streamed else planned
        blocks = self._blocks(planned)
        for block in blocks:
            block.require_possible_values()
        if streamed:
            self._stream(planned, blocks)
        aligned: dict[str, dict[ModelReference, ApplyBlock]] = {}
        for block in blocks:
            aligned.update(self._aligned(block))
        self._warn_if_inexact(planned)
        self._warn_of_unread()
        self._head = self._report_head(planned)
        return [(weight, self._merge_task(weight, task, aligned.get(weight.name, {}))) for weight, task in planned]

    def _blocks(self, planned: list[Planned]) -> list[Block]:
        members: dict[BlockKey, list[Planned]] = defaultdict(list)
        for weight, task in planned:
            claim = self._models.checkpoints[anchor_of(task)].layout.claim(weight.name)
            if claim is not None and claim.layer is not None and claim.spec.block is not None:
                members[claim.layer, claim.spec.block].append((weight, task))
        checkpoints = self._models.checkpoints
        return [Block(layer, kind, tuple(found), checkpoints) for (layer, kind), found in members.items()]

    def keep_own_config(self, out_config: Any) -> None:
        """Where the output is one model in the anchor's coordinates: that model's own config, not the anchor's."""
        self._functions.keep_own(out_config, self.options.trust_remote_code)

    def _compared(self, planned: list[Planned]) -> Functions:
        """What the configs of all models say of the same weights."""
        anchor = self.config.base_model or self.config.referenced_models()[0]
        return compare_functions(
            anchor,
            self._models.checkpoints,
            self._models.checkpoints[anchor].layout,
            only=self._only_model(planned),
            trust_remote_code=self.options.trust_remote_code,
        )

    def _only_model(self, planned: list[Planned]) -> ModelReference | None:
        """The model that every tensor comes from, if the output is that model as a whole."""
        sliced = self.config.slices or any(module.slices for module in (self.config.modules or {}).values())
        if sliced or self.method.inner.spec.name != "linear":
            return None
        weights = (
            (m, dict(task.input_parameters[m].items()).get("weight"))
            for _, task in planned
            for m in task.model_order
            if self._takes_part(m, task)
        )
        models = {model for model, weight in weights if weight != 0}
        return models.pop() if len(models) == 1 else None

    def _turns_fully(self, planned: list[Planned]) -> bool:
        """Whether any block is turned as ``rotation: full`` does, by a solve or by a file."""
        return not self._alignments.exact or any(task.parameters["rotation"] == "full" for _, task in planned)

    def _warn_if_inexact(self, planned: list[Planned]) -> None:
        self._functions.warn()
        if self._turns_fully(planned):
            LOG.warning(
                "rotation: full turns queries and keys by a matrix that does not commute with RoPE: the aligned models "
                "no longer compute what the originals computed. rotation: exact keeps their function."
            )

    def _warn_of_unread(self) -> None:
        for model, names in self._unread.items():
            LOG.warning(
                "model %s: the merge does not read %s: its architecture has no place for them",
                model,
                shortened(names),
            )

    def _report_head(self, planned: list[Planned]) -> dict[str, Any]:
        """What the report says of the merge as a whole: the parameters where all tensors agree on them."""
        settings: dict[str, Any] = {}
        for name in sorted(planned[0][1].parameters):  # they come in the order of their hashes
            values = {json.dumps(task.parameters[name], default=str) for _, task in planned}
            if name in ALIGNMENT_NAMES:
                settings[name] = json.loads(values.pop()) if len(values) == 1 else "differs between layers"
        full = self._turns_fully(planned)
        reasons = [
            *(["rotation: full changes what the aligned models compute"] if full else []),
            *self._functions.reasons(),
        ]
        anchors = dict.fromkeys(str(anchor_of(task)) for _, task in planned)
        return {
            "method": self.method.spec.name,
            "anchor": list(anchors),
            "exact": not reasons,
            "inexact_because": reasons,
            **self._functions.facts(),
            "settings": settings,
            "unused_tensors": {str(model): list(names) for model, names in self._unread.items()},
        }

    def _aligned(self, block: Block) -> dict[str, dict[ModelReference, ApplyBlock]]:
        """For each tensor of a block (by output name) the aligned task of each model that is aligned."""
        check_possible(block.symmetries, block.kind, block.layout)
        check_same_neurons(block.symmetries, block.kind, block.anchor, block.moved(), self._models.checkpoints)
        loads = block.loads()
        solutions = self._solutions(block, loads)
        for model, solution in solutions.items():
            self._record(block, model, solution)
            self.reports.record(model, block.layer, block.kind, solution)
        return {
            weight.name: {
                model: ApplyBlock(load=loads[model][i], axes=block.axes[i], solution=solution)
                for model, solution in solutions.items()
            }
            for i, (weight, _) in enumerate(block.members)
        }

    def _solutions(
        self, block: Block, loads: dict[ModelReference, tuple[LoadFinite, ...]]
    ) -> dict[ModelReference, Task]:
        """The task that gives each model's element."""
        moved = block.moved()
        shared: dict[str, Any] = {
            "kind": block.kind,
            "axes": block.axes,
            "mlp": block.layout.mlp_shape(),
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

    def _stream(self, planned: list[Planned], blocks: list[Block]) -> None:
        """Plan the run on prompts for all blocks that are to be matched by activations."""
        wanted = [
            Wanted(block.layer_of(model), block.kind, model)
            for block in blocks
            if block.agreed("objective") == "activations"
            for model in block.moved()
            if block.agreed("alignment", model) is None
        ]
        if wanted:
            self._streaming = plan_streaming(planned, wanted, self._models.checkpoints, self.options)

    def _solver(self, block: Block, model: ModelReference, fields: dict[str, Any]) -> SolveBlock:
        if self._streaming is None or block.agreed("objective") != "activations":
            return SolveBlock(**fields)
        statistics = self._streaming.statistics[Wanted(block.layer_of(model), block.kind, model)]
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
        sha256, name = self._alignments.read(path, block.anchor, model, _source(block, model, "alignment"))
        return ReadBlock(path=path, sha256=sha256, block=name, label=load.group_label())

    def _record(self, block: Block, model: ModelReference, solution: Task) -> None:
        folder = block.agreed("save_alignment")
        if folder is not None:
            names = (*SYMMETRY_NAMES, "objective", *SHARED)
            settings = {name: block.members[0][1].parameters[name] for name in names}
            source = _source(block, model, "save_alignment")
            self._alignments.record(folder, block.anchor, model, source, solution, settings)

    def _merge_task(
        self, weight: WeightInfo, task: ExecuteMergeMethodTask, aligned: dict[ModelReference, ApplyBlock]
    ) -> ExecuteMergeMethodTask:
        """The inner method on the aligned inputs of one tensor."""
        gather = gather_of(task)
        order = tuple(m for m in task.model_order if self._takes_part(m, task))
        out_dtype = None
        if aligned:
            stored = merged_dtype(self._models.checkpoints[m].stored(gather.weight_info[m]) for m in order)
            out_dtype = self.config.out_dtype or self.config.dtype or str(stored).removeprefix("torch.")
        shared = {name: value for name, value in task.parameters.items() if name not in ALIGNMENT_NAMES}
        return merge_task(
            self.method.inner,
            gather_tensors=_regathered(task, order, aligned),
            model_order=order,
            base_model=task.base_model if self.method.anchor_is_base or task.base_model in order else None,
            output_weight=weight,
            parameters=shared,
            input_parameters={m: self._inner_parameters(m, task) for m in order},
            dtype=task.dtype,
            out_dtype=out_dtype,
        )

    def _inner_parameters(self, model: ModelReference, task: ExecuteMergeMethodTask) -> dict[str, object]:
        return {
            p.name: task.input_parameters[model][p.name]
            for p in self.method.inner.spec.input_parameters
            if model != task.base_model or p.scope is ParameterScope.INPUT
        }

    def _takes_part(self, model: ModelReference, task: ExecuteMergeMethodTask) -> bool:
        return self.method.anchor_is_base or model != task.base_model or model in self.listed


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


def _regathered(
    task: ExecuteMergeMethodTask, order: tuple[ModelReference, ...], aligned: dict[ModelReference, ApplyBlock]
) -> Task:
    """The same inputs with finite loads, aligned where they are; vocabulary steps keep all models they know."""
    gather, inputs = gather_of(task), task.gather_tensors
    if isinstance(inputs, (PermutedVocabulary, TruncatedVocabulary)):
        return inputs.model_copy(update={"gather_tensors": GatherAligned(**dict(gather))})
    infos = {m: info for m, info in gather.weight_info.items() if m in order}
    replaced = tuple((m, apply) for m, apply in aligned.items() if m in order)
    fields = dict(gather) | {"weight_info": ImmutableMap(data=infos), "aligned": replaced}
    return GatherAligned(**fields)
