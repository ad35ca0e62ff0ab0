"""From MergeKit's plan to the aligned one: the same tasks, the same inner method, on aligned inputs."""

from __future__ import annotations

import logging
from collections import defaultdict
from dataclasses import dataclass, field, fields
from typing import Any

from mergekit.architecture import WeightInfo
from mergekit.common import ImmutableMap, ModelReference
from mergekit.config import MergeConfiguration
from mergekit.graph import Task
from mergekit.io.tasks import GatherTensors
from mergekit.merge_methods.base import ParameterScope
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask
from mergekit.options import MergeOptions
from mergekit.tokenizer import PermutedVocabulary
from mergekit.tokenizer.truncate import TruncatedVocabulary

from mergekit_symalign.errors import CheckpointError, ConfigError, GeometryError, ParameterError
from mergekit_symalign.families.resolve import ModelLayout, resolve
from mergekit_symalign.families.schema import BlockKind
from mergekit_symalign.graph.activations import SolveActivations
from mergekit_symalign.graph.alignments import Alignments, ReadBlock, SourceBlock, require_same_layers
from mergekit_symalign.graph.apply import ApplyBlock
from mergekit_symalign.graph.checkpoint_checks import Checkpoint, merged_dtype
from mergekit_symalign.graph.consensus import OneOfConsensus, SolveConsensus
from mergekit_symalign.graph.load import GatherAligned, LoadFinite
from mergekit_symalign.graph.solve import SolveBlock
from mergekit_symalign.graph.streaming import SHARED, StreamingPlan, Wanted, gather_of, in_order, plan_streaming
from mergekit_symalign.methods import ALIGNMENT_NAMES, AlignedMethod
from mergekit_symalign.symmetry.options import HeadShape, NeuronScale, Rotation, Symmetries

LOG = logging.getLogger(__name__)

Planned = tuple[WeightInfo, ExecuteMergeMethodTask]
SYMMETRY_NAMES = tuple(f.name for f in fields(Symmetries))
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
    _layouts: dict[ModelReference, ModelLayout] = field(default_factory=dict)
    _checkpoints: dict[ModelReference, Checkpoint] = field(default_factory=dict)

    _streaming: StreamingPlan | None = None

    def __post_init__(self) -> None:
        self._alignments = Alignments(self._checkpoints)

    def extra_tasks(self, out_path: str) -> list[Task]:
        """What the merge does beside writing tensors to ``out_path``."""
        return self._alignments.save_tasks()

    def other_names(self, info: WeightInfo, model: ModelReference) -> tuple[str, ...]:
        """Names under which this model's checkpoint may have a tensor, beside those that MergeKit knows.

        Raises:
            ArchitectureError, CheckpointError: no family describes this model, or it is quantised.
        """
        layout = self._layout(model)
        claim = layout.claim(info.name)
        return tuple(name for name in layout.stored_as(claim) if "*" not in name) if claim is not None else ()

    def rewrite(self, planned: list[Planned]) -> list[tuple[WeightInfo, Task]]:
        """Check everything that headers can tell, then give every block's tensors to their aligned tasks."""
        self._open_checkpoints(planned)
        planned = [(weight, task) for weight, task in planned if not self._is_superfluous(task)]
        self._check(planned)
        streamed = any(task.parameters["objective"] == "activations" for _, task in planned)
        planned = in_order(planned) if streamed else planned
        blocks: dict[BlockKey, list[Planned]] = defaultdict(list)
        for weight, task in planned:
            claim = self._checkpoints[_anchor(task)].layout.claim(weight.name)
            if claim is not None and claim.layer is not None and claim.spec.block is not None:
                blocks[claim.layer, claim.spec.block].append((weight, task))
        if streamed:
            self._stream(planned, blocks)
        aligned = {}
        for key, members in blocks.items():
            aligned.update(self._aligned_block(key, members))
        self._warn_if_inexact(planned)
        return [(weight, self._merge_task(weight, task, aligned.get(weight.name, {}))) for weight, task in planned]

    # Checks

    def _open_checkpoints(self, planned: list[Planned]) -> None:
        for model in dict.fromkeys(m for _, task in planned for m in gather_of(task).weight_info):
            model_type = model.config(trust_remote_code=self.options.trust_remote_code).model_type
            self._checkpoints[model] = Checkpoint.open(model, model_type, self._layout(model))

    def _is_superfluous(self, task: ExecuteMergeMethodTask) -> bool:
        """Whether MergeKit's architecture file asks for a tensor that models of this config do not have.

        Old buffers are superfluous as soon as one model has none; what the config leaves out (a switched-off norm, an
        unused task head), if no model has it.
        """
        infos = gather_of(task).weight_info.items()
        there = [self._checkpoints[model].stored(info) is not None for model, info in infos]
        layouts = [(self._checkpoints[model].layout, info.name) for model, info in infos]
        if all(layout.is_buffer(name) for layout, name in layouts):
            return not all(there)
        return not any(there) and all(layout.is_absent(name) or _may_lack(layout, name) for layout, name in layouts)

    def _check(self, planned: list[Planned]) -> None:
        used: dict[ModelReference, dict[str, WeightInfo]] = defaultdict(dict)
        for _, task in planned:
            for model, info in gather_of(task).weight_info.items():
                used[model][info.name] = info
        for anchor, model in dict.fromkeys((_anchor(task), m) for _, task in planned for m in task.model_order):
            _check_geometry(self._checkpoints[anchor], self._checkpoints[model])
        for model, infos in used.items():
            self._checkpoints[model].check(infos.values())
        for weight, task in planned:
            self._check_vocabulary(weight, task)

    def _layout(self, model: ModelReference) -> ModelLayout:
        if model not in self._layouts:
            self._layouts[model] = self._resolved(model)
        return self._layouts[model]

    def _resolved(self, model: ModelReference) -> ModelLayout:
        config = model.config(trust_remote_code=self.options.trust_remote_code)
        if getattr(config, "quantization_config", None) is not None:
            raise CheckpointError(
                f"model {model}",
                "its config has a quantization_config: the checkpoint is quantised",
                "Use the model's unquantised checkpoint",
            )
        return resolve(config, model=str(model))

    def _check_vocabulary(self, weight: WeightInfo, task: ExecuteMergeMethodTask) -> None:
        if not isinstance(task.gather_tensors, GatherTensors) or weight.vocabulary_axis is None:
            return
        headers = {m: self._checkpoints[m].stored(info) for m, info in gather_of(task).weight_info.items()}
        shapes = {header.shape: model for model, header in headers.items() if header is not None}
        if len(shapes) > 1:
            (shape_a, a), (shape_b, b) = list(shapes.items())[:2]
            raise GeometryError(
                f"tensor {weight.name}",
                f"its vocabulary differs: {shape_a} in {a}, {shape_b} in {b}",
                "Let MergeKit match the tokenizers: tokenizer: {source: base}",
            )

    def _warn_if_inexact(self, planned: list[Planned]) -> None:
        if any(task.parameters["rotation"] == "full" for _, task in planned):
            LOG.warning(
                "rotation: full turns queries and keys by a matrix that does not commute with RoPE: the aligned models "
                "no longer compute what the originals computed. rotation: exact keeps their function."
            )

    # Tasks

    def _aligned_block(self, key: BlockKey, members: list[Planned]) -> dict[str, dict[ModelReference, ApplyBlock]]:
        """For each tensor of a block (by output name) the aligned task of each model that is aligned."""
        _, kind = key
        anchor_ref = _anchor(members[0][1])
        layout = self._checkpoints[anchor_ref].layout
        use = self._settings(members)
        _check_possible(use, kind, layout)
        specs = [layout.claim(weight.name).spec for weight, _ in members]  # type: ignore[union-attr]
        axes = tuple(layout.axes(spec) for spec in specs)
        loads_of = [GatherAligned(**dict(gather_of(task))).loads() for _, task in members]
        moved = [m for m in members[0][1].model_order if m != anchor_ref and self._wants_alignment(m, members)]
        loads = {m: tuple(load[m] for load in loads_of) for m in (anchor_ref, *moved)}
        heads = {m: self._head_shape(m, members[0]) for m in moved}
        block: dict[str, Any] = {"kind": kind, "axes": axes, "mlp": layout.mlp_shape(), "use": use}
        if moved and self._agreed("anchor", members) == "consensus":
            self._require_weights_alone(moved, members)
            ordered = sorted(moved, key=str)
            models = tuple(loads[m] for m in (anchor_ref, *ordered))
            consensus = SolveConsensus(**block, models=models, heads=heads[moved[0]])
            solutions: dict[ModelReference, Task] = {
                m: OneOfConsensus(consensus=consensus, index=i) for i, m in enumerate(ordered, start=1)
            }
        else:
            solutions = {
                m: self._saved(m, kind, members, loads[m][0])
                or self._solver(members, m, **block, anchor=loads[anchor_ref], model=loads[m], heads=heads[m])
                for m in moved
            }
        for m, solution in solutions.items():
            self._record(m, kind, members, solution)
        return {
            weight.name: {
                m: ApplyBlock(load=loads[m][i], axes=axes[i], solution=solution) for m, solution in solutions.items()
            }
            for i, (weight, _) in enumerate(members)
        }

    def _require_weights_alone(self, moved: list[ModelReference], members: list[Planned]) -> None:
        """A consensus is found from the weights of all models at once: not from prompts, nor from one model's file."""
        file = any(self._agreed("alignment", members, m) is not None for m in moved)
        if file or self._agreed("objective", members) == "activations":
            raise ConfigError(
                "parameter anchor",
                f"consensus does not go together with {'alignment' if file else 'objective: activations'}",
                "Leave one of the two out",
            )

    def _stream(self, planned: list[Planned], blocks: dict[BlockKey, list[Planned]]) -> None:
        """Plan the run on prompts for all blocks that are to be matched by activations."""
        wanted = [
            Wanted(self._layer(model, members[0][1]), kind, model)
            for (_, kind), members in blocks.items()
            if self._agreed("objective", members) == "activations"
            for model in members[0][1].model_order
            if model != _anchor(members[0][1])
            and self._wants_alignment(model, members)
            and self._agreed("alignment", members, model) is None
        ]
        if wanted:
            self._streaming = plan_streaming(planned, wanted, self._checkpoints, self.options)

    def _solver(self, members: list[Planned], ref: ModelReference, kind: BlockKind, **fields: Any) -> SolveBlock:
        if self._streaming is None or self._agreed("objective", members) != "activations":
            return SolveBlock(kind=kind, **fields)
        layer = self._layer(ref, members[0][1])
        return SolveActivations(kind=kind, statistics=self._streaming.statistics[Wanted(layer, kind, ref)], **fields)

    def _saved(
        self, model: ModelReference, kind: BlockKind, members: list[Planned], load: LoadFinite
    ) -> ReadBlock | None:
        """The task that reads this block's element from the file that the user gave, if any."""
        path = self._agreed("alignment", members, model)
        if path is None:
            return None
        anchor = _anchor(members[0][1])
        block = self._source_block("alignment", model, kind, members)
        sha256, name = self._alignments.read(path, anchor, model, block)
        return ReadBlock(path=path, sha256=sha256, block=name, label=load.group_label())

    def _record(self, model: ModelReference, kind: BlockKind, members: list[Planned], solution: Task) -> None:
        folder = self._agreed("save_alignment", members)
        if folder is not None:
            block = self._source_block("save_alignment", model, kind, members)
            names = (*SYMMETRY_NAMES, "anchor", "objective", *SHARED)
            settings = {name: members[0][1].parameters[name] for name in names}
            self._alignments.record(folder, _anchor(members[0][1]), model, block, solution, settings)

    def _source_block(self, what: str, model: ModelReference, kind: BlockKind, members: list[Planned]) -> SourceBlock:
        weight, task = members[0]
        anchor_layer, layer = (self._layer(ref, task) for ref in (_anchor(task), model))
        require_same_layers(what, weight.name, anchor_layer, layer)
        return layer, kind

    def _layer(self, model: ModelReference, task: ExecuteMergeMethodTask) -> int:
        """Which of the model's own layers a planned tensor of a block comes from."""
        claim = self._checkpoints[model].layout.claim(gather_of(task).weight_info[model].name)
        assert claim is not None
        assert claim.layer is not None
        return claim.layer

    def _head_shape(self, model: ModelReference, member: Planned) -> HeadShape:
        """Heads and positions of the layers that are matched, which anchor and model must share."""
        weight, task = member
        shapes = {m: self._checkpoints[m].layout.head_shape(self._layer(m, task)) for m in (_anchor(task), model)}
        anchor_shape, shape = shapes.values()
        if shape != anchor_shape:
            raise GeometryError(
                f"tensor {weight.name}",
                f"model {model} has other positions in this layer than the anchor (RoPE on {shape.rotary} and "
                f"{anchor_shape.rotary} coordinates)",
                "Choose slices that pair layers of the same kind",
            )
        return shape

    def _settings(self, members: list[Planned]) -> Symmetries:
        chosen = {name: self._agreed(name, members) for name in SYMMETRY_NAMES}
        return Symmetries(**chosen | {"rotation": Rotation(chosen["rotation"])})

    def _wants_alignment(self, model: ModelReference, members: list[Planned]) -> bool:
        wanted: bool = self._agreed("align", members, model)
        if not wanted and self._agreed("alignment", members, model) is not None:
            raise ParameterError(
                f"parameter alignment of model {model}",
                f"align is false for {members[0][0].name}, so the file would not be used",
                "Leave out one of the two",
            )
        return wanted

    def _agreed(self, name: str, members: list[Planned], model: ModelReference | None = None) -> Any:
        """The value of a parameter that all tensors of a block must share."""

        def value(task: ExecuteMergeMethodTask) -> Any:
            return (task.parameters if model is None else task.input_parameters[model])[name]

        first_weight, first = members[0]
        for weight, task in members[1:]:
            if value(task) != value(first):
                raise _disagreement(name, (first_weight, value(first)), (weight, value(task)), model)
        return value(first)

    def _merge_task(
        self, weight: WeightInfo, task: ExecuteMergeMethodTask, aligned: dict[ModelReference, ApplyBlock]
    ) -> ExecuteMergeMethodTask:
        """The inner method on the aligned inputs of one tensor."""
        gather = gather_of(task)
        order = tuple(m for m in task.model_order if self._takes_part(m, task))
        out_dtype = None
        if aligned:
            stored = merged_dtype(self._checkpoints[m].stored(gather.weight_info[m]) for m in order)
            out_dtype = self.config.out_dtype or self.config.dtype or str(stored).removeprefix("torch.")
        shared = {name: value for name, value in task.parameters.items() if name not in ALIGNMENT_NAMES}
        return ExecuteMergeMethodTask(
            method_name=self.method.inner.spec.name,
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


def _check_geometry(anchor: Checkpoint, other: Checkpoint) -> None:
    """A model must be of the anchor's family, and have the same tensors in its layers, of the same sizes."""
    ours, theirs = other.layout, anchor.layout
    if ours.family.name != theirs.family.name:
        raise GeometryError(
            f"model {other.model}",
            f"it is of family {ours.family.name}, the anchor {anchor.model} of {theirs.family.name}",
            "Merge models of one architecture",
        )
    if surplus := ours.inside.keys() ^ theirs.inside.keys():
        raise GeometryError(
            f"model {other.model}",
            f"its layers and those of the anchor {anchor.model} differ in {', '.join(sorted(surplus))}",
            "Merge models whose configs agree on biases and norms",
        )
    if differences := ours.geometry.differences(theirs.geometry):
        raise GeometryError(
            f"model {other.model}",
            f"its sizes differ from those of the anchor {anchor.model}: {', '.join(differences)}",
            "Merge models of the same shape",
        )


def _check_possible(use: Symmetries, kind: BlockKind, layout: ModelLayout) -> None:
    """Refuse what the parameters ask for and the architecture cannot have."""
    if kind is BlockKind.attention and use.rotation is Rotation.full and layout.has_qk_norm:
        raise ConfigError(
            "parameter rotation",
            f"full is not possible for {layout.family.title}: its queries and keys are normalised (QK-norm), and "
            "a rotation before the norm's gains breaks the model",
            "Use rotation: exact",
        )
    if kind is BlockKind.mlp and use.neuron_scaling and layout.neuron_scale is NeuronScale.none:
        raise ConfigError(
            "parameter neuron_scaling",
            f"{layout.family.title} has a plain MLP: its activation stands between the two projections, and a scale "
            "would change the function",
            "Leave neuron_scaling out",
        )


def _may_lack(layout: ModelLayout, name: str) -> bool:
    claim = layout.claim(name)
    return claim is not None and claim.spec.optional


def _anchor(task: ExecuteMergeMethodTask) -> ModelReference:
    assert task.base_model is not None  # graph/config_checks.py
    return task.base_model


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


def _disagreement(
    name: str,
    one: tuple[WeightInfo, object],
    other: tuple[WeightInfo, object],
    model: ModelReference | None = None,
) -> ParameterError:
    (weight_a, value_a), (weight_b, value_b) = one, other
    of = f" of model {model}" if model is not None else ""
    return ParameterError(
        f"parameter {name}{of}",
        f"it is {value_a} for {weight_a.name} and {value_b} for {weight_b.name}, but these belong to one block and are "
        "aligned together",
        "Choose filters that give all tensors of a block the same value",
    )
