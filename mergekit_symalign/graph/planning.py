"""From MergeKit's plan to ours: the same tensors, aligned inputs, and the inner method or one that uses data."""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit import merge_methods
from mergekit.architecture import ModelArchitecture, WeightInfo
from mergekit.common import ImmutableMap, ModelReference
from mergekit.config import MergeConfiguration
from mergekit.graph import Task
from mergekit.io.tasks import FinalizeModel
from mergekit.merge_methods.base import ParameterScope
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask
from mergekit.options import MergeOptions

from mergekit_symalign.activations.runner import require_runs
from mergekit_symalign.errors import ConfigError, ParameterError
from mergekit_symalign.families.flow import is_front
from mergekit_symalign.families.schema import BlockKind
from mergekit_symalign.families.towers import Layer
from mergekit_symalign.graph.alignments import Alignments
from mergekit_symalign.graph.apply import ApplyBlock
from mergekit_symalign.graph.block import Block
from mergekit_symalign.graph.config_differences import Functions, compare_functions
from mergekit_symalign.graph.leftovers import shortened
from mergekit_symalign.graph.merge_report import Reports
from mergekit_symalign.graph.models import Models
from mergekit_symalign.graph.planned import Planned, anchor_of, gather_of
from mergekit_symalign.graph.ready import Context, DataPlan, Ready, ready
from mergekit_symalign.graph.solutions import Applied, Solutions
from mergekit_symalign.graph.stream_tasks import ApplyStream
from mergekit_symalign.graph.streaming import in_order
from mergekit_symalign.graph.text_parts import NO_TEXTS, TextParts
from mergekit_symalign.graph.unlisted_heads import with_heads
from mergekit_symalign.graph.untie import TIED, models_to_untie, planned_head, require_files, untie_config
from mergekit_symalign.methods import ALIGNMENT_NAMES, DataMethod, PlannedMethod
from mergekit_symalign.whole_file import require_writable_folder

LOG = logging.getLogger(__name__)

BlockKey = tuple[Layer, BlockKind]  # output layer and block


@dataclass
class AlignedPlan:
    """Rewrites the tensors that MergeKit planned for one of our methods.

    Attributes:
        config: the merge configuration.
        options: MergeKit's options.
        method: ours.
        listed: models that the user listed (the anchor takes part in a method without base only if it is one).
        texts: the text models that are merged into the anchor's text part.
    """

    config: MergeConfiguration
    options: MergeOptions
    method: PlannedMethod
    listed: frozenset[ModelReference]
    texts: TextParts = NO_TEXTS

    def __post_init__(self) -> None:
        self._models = Models(self.options.trust_remote_code, self.texts)
        self._alone: set[str] = set()
        self._alignments = Alignments(self._models.checkpoints)
        self.reports = Reports()
        self._functions = Functions()
        self._untied: tuple[ModelReference, ...] = ()
        self._solutions = Solutions(self._models, self._alignments, self.reports, self.options)

    def extra_tasks(self, out_path: str, targets: list[Task]) -> list[Task]:
        """What the merge does beside ``targets``, which write tensors to ``out_path``.

        Raises:
            ConfigError: if an alignment that is to be saved, or the output, cannot be written.
        """
        end = next((task for task in targets if isinstance(task, FinalizeModel)), None)
        require_writable_folder(Path(out_path))
        return [*self._alignments.save_tasks(Path(out_path)), self.reports.task(out_path, self._head, end)]

    def require_no_files(self) -> None:
        """
        Raises:
            ParameterError: if alignments are to be saved or heads untied, and the merge writes no files
                (mergekit-evolve --in-memory).
        """
        require_files(self._untied)
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

    def planned_head(self, weight: WeightInfo, model: ModelReference, asked: Callable[[], bool]) -> WeightInfo:
        """A tensor as MergeKit is to plan it (`graph.untie.planned_head`)."""
        return planned_head(weight, self._models.layout(model), asked)

    def with_heads(self, arch: ModelArchitecture) -> ModelArchitecture:
        """MergeKit's architecture with the tensors of heads that it leaves out (`graph.unlisted_heads`)."""
        if self.texts.outer is not None:
            return arch
        models = self.config.referenced_models()
        self._models.open(models)
        return with_heads(arch, [self._models.checkpoints[model] for model in models])

    def rewrite(self, planned: list[Planned]) -> list[tuple[WeightInfo, Task]]:
        """Check everything that headers can tell, then give every block's tensors to their aligned tasks."""
        self._models.open(m for _, task in planned for m in gather_of(task).weight_info)
        if isinstance(self.method.inner, DataMethod) or _by_activations(planned, aligns=self.method.aligns):
            for model, checkpoint in self._models.checkpoints.items():
                require_runs(checkpoint.layout, str(model))
        planned = [self._of_those_that_have_it(one) for one in planned]
        planned = [(weight, task) for weight, task in planned if not self._models.is_superfluous(task)]
        self._unread = self._models.check(planned)
        self._untied = models_to_untie(planned, self._models.checkpoints) if self.method.aligns else ()
        self._functions = self._compared(planned)
        if isinstance(self.method.inner, DataMethod) and self.method.inner.layer_by_layer:
            planned = in_order(sorted(planned, key=self._depth))
        planned, aligned = self._aligned(planned) if self.method.aligns else (planned, {})
        self._warn_if_inexact(planned)
        self._warn_of_unread()
        tensors = tuple(self._ready(one, aligned.get(one[0].name, {})) for one in planned)
        merged = self._merged(tensors)
        self.reports.find(merged.findings)
        self._head = self._report_head(planned, merged)
        return merged.tensors

    def _of_those_that_have_it(self, planned: Planned) -> Planned:
        """The task without text models that lack the tensor; what one model alone has goes into the output as it is."""
        weight, task = planned
        infos = gather_of(task).weight_info.items()
        there = {m: info for m, info in infos if self._models.has_place(info, m)}
        if len(there) == len(task.model_order):
            return planned
        if len(there) == 1:
            self._alone.add(weight.name)
        gather = gather_of(task).model_copy(update={"weight_info": ImmutableMap(data=there)})
        order = tuple(m for m in task.model_order if m in there)
        return weight, task.model_copy(update={"gather_tensors": gather, "model_order": order})

    def _depth(self, planned: Planned) -> float:
        """Where a tensor stands in the model: MergeKit lists those of an inferred architecture in any order."""
        weight, task = planned
        claim = self._models.checkpoints[anchor_of(task)].layout.claim(weight.name)
        if claim is None or (claim.layer is None and not is_front(claim.part, claim.spec)):
            return float("inf")
        return -1 if claim.layer is None else claim.layer

    def _aligned(self, planned: list[Planned]) -> tuple[list[Planned], Applied]:
        """The tensors in the order of their layers if models run, and the aligned task of each tensor and model."""
        streamed = _by_activations(planned, aligns=True)
        planned = in_order(planned) if streamed else planned
        blocks = self._blocks(planned)
        for block in blocks:
            block.require_possible_values()
            block.require_possible_latents()
        aligned = self._solutions.move_streams(planned, blocks)
        self._require_no_data(aligned)
        if streamed:
            self._solutions.stream(planned, blocks)
        for block in blocks:
            aligned.update(self._solutions.aligned(block))
        return planned, aligned

    def _require_no_data(self, moved: Applied) -> None:
        """
        Raises:
            ConfigError: if a residual stream is moved and the method uses data, whose axes nothing moves along it.
        """
        if moved and isinstance(self.method.inner, DataMethod):
            raise ConfigError(
                "parameter residual",
                f"the statistics that {self.method.spec.name} uses do not move with the residual stream",
                "Use residual: none, or another method",
            )

    def _ready(self, planned: Planned, aligned: Mapping[ModelReference, ApplyBlock | ApplyStream]) -> Ready:
        _, task = planned
        alone = planned[0].name in self._alone
        order = tuple(m for m in task.model_order if alone or self._takes_part(m, task))
        listed = task.base_model in order and not isinstance(self.method.inner, DataMethod)
        base = task.base_model if self.method.anchor_is_base or listed else None
        return ready(planned, order, base, aligned, self._models.checkpoints, self.config)

    def _merged(self, tensors: tuple[Ready, ...]) -> DataPlan:
        """The tasks that merge, and what the report says of the data behind them."""
        inner = self.method.inner
        if not isinstance(inner, DataMethod):
            return DataPlan([(one.weight, self._merge_task(one)) for one in tensors])
        from mergekit_symalign.graph.data_plans import plan_with_data  # which no other merge has to wait for

        return plan_with_data(Context(inner, tensors, self._models.checkpoints, self.config, self.options))

    def _blocks(self, planned: list[Planned]) -> list[Block]:
        members: dict[BlockKey, list[Planned]] = defaultdict(list)
        for weight, task in planned:
            placed = self._models.checkpoints[anchor_of(task)].layout.placed(weight.name)
            if placed is not None and placed.block is not None:
                members[placed.block].append((weight, task))
        checkpoints = self._models.checkpoints
        return [Block(layer, kind, tuple(found), checkpoints) for (layer, kind), found in members.items()]

    def keep_own_config(self, out_config: Any) -> None:
        """What MergeKit, which takes the anchor's config, does not know of the output's.

        Where the output is one model in the anchor's coordinates, its own config counts; a head may have been untied.
        """
        self._functions.keep_own(out_config, self.options.trust_remote_code)
        if self._untied:
            untie_config(out_config)

    def _compared(self, planned: list[Planned]) -> Functions:
        """What the configs of all models say of the same weights."""
        anchor = anchor_of(planned[0][1])
        found = compare_functions(
            anchor,
            self._models.checkpoints,
            self._models.checkpoints[anchor].layout,
            only=self._only_model(planned),
            texts=self.texts.layouts,
            trust_remote_code=self.options.trust_remote_code,
        )
        return found.without(TIED) if self._untied else found

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
        if not self.method.aligns:
            return False
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

    def _report_head(self, planned: list[Planned], merged: DataPlan) -> dict[str, Any]:
        """What the report says of the merge as a whole: the parameters where all tensors agree on them."""
        settings: dict[str, Any] = {}
        own = {p.name for p in self.method.spec.parameters} if isinstance(self.method.inner, DataMethod) else set()
        for name in sorted(planned[0][1].parameters):  # they come in the order of their hashes
            values = {json.dumps(task.parameters[name], default=str) for _, task in planned}
            if name in ALIGNMENT_NAMES | own:
                settings[name] = json.loads(values.pop()) if len(values) == 1 else "differs between layers"
        full = self._turns_fully(planned)
        reasons = [
            *(["rotation: full changes what the aligned models compute"] if full else []),
            *self._functions.reasons(),
            *merged.inexact_because,
        ]
        anchors = dict.fromkeys(str(anchor_of(task)) for _, task in planned)
        files = self._alignments.facts()
        return {
            "method": self.method.spec.name,
            "anchor": list(anchors) if self.method.aligns else [],
            "exact": not reasons,
            "inexact_because": reasons,
            **self._functions.facts(),
            "settings": settings,
            "unused_tensors": {str(model): list(names) for model, names in self._unread.items()},
            **({"alignment_files": files} if files else {}),
            **({"data": dict(merged.facts)} if isinstance(self.method.inner, DataMethod) else {}),
        }

    def _merge_task(self, one: Ready) -> ExecuteMergeMethodTask:
        """The inner method on the aligned inputs of one tensor."""
        task, inner = one.planned, self.method.inner
        if one.name in self._alone:
            return one.merged_by(merge_methods.get("passthrough"), {}, {one.order[0]: {"scale": None}})
        shared = {name: value for name, value in task.parameters.items() if name not in ALIGNMENT_NAMES}
        own = {
            m: {
                p.name: task.input_parameters[m][p.name]
                for p in inner.spec.input_parameters
                if m != task.base_model or p.scope is ParameterScope.INPUT
            }
            for m in one.order
        }
        return one.merged_by(inner, shared, own)

    def _takes_part(self, model: ModelReference, task: ExecuteMergeMethodTask) -> bool:
        return self.method.anchor_is_base or model != task.base_model or model in self.listed


def _by_activations(planned: list[Planned], *, aligns: bool) -> bool:
    """Whether any block is to be matched by what models do on prompts or images."""
    return aligns and any(task.parameters["objective"] == "activations" for _, task in planned)
