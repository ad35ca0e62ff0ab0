"""The models of a merge: their architectures and files, and whether they can be merged with each other."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mergekit.architecture import WeightInfo
from mergekit.common import ModelReference
from mergekit.io.tasks import GatherTensors
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask

from mergekit_symalign.errors import CheckpointError, ConfigError, GeometryError, ParameterError
from mergekit_symalign.families.resolve import ModelLayout
from mergekit_symalign.families.schema import BlockKind, MlpKind
from mergekit_symalign.graph.block import Block
from mergekit_symalign.graph.checkpoint_checks import Checkpoint
from mergekit_symalign.graph.plain_merge import resolve_stored
from mergekit_symalign.graph.planned import Planned, anchor_of, gather_of
from mergekit_symalign.graph.text_parts import NO_TEXTS, TextParts
from mergekit_symalign.symmetry.membership import CONDITION
from mergekit_symalign.symmetry.options import HeadShape, HeadValues, NeuronScale, Rotation, Symmetries, ValueOutput


@dataclass
class Models:
    """Every model that a merge reads, opened once.

    Attributes:
        trust_remote_code: MergeKit's option.
        texts: the text models among them that are merged into another one.
        checkpoints: of the models that were opened.
    """

    trust_remote_code: bool
    texts: TextParts = NO_TEXTS
    checkpoints: dict[ModelReference, Checkpoint] = field(default_factory=dict)

    def open(self, models: Iterable[ModelReference]) -> None:
        for model in models:
            self._opened(model)

    def _opened(self, model: ModelReference) -> Checkpoint:
        if model not in self.checkpoints:
            config = model.config(trust_remote_code=self.trust_remote_code)
            own, inside = _resolved(config, model), self.texts.layouts.get(model)
            layouts = (own,) if inside is None else (inside, own)
            self.checkpoints[model] = Checkpoint.open(model, config, *layouts)
        return self.checkpoints[model]

    def layout(self, model: ModelReference) -> ModelLayout:
        """The architecture of a model.

        Raises:
            ArchitectureError, CheckpointError: as `other_names`.
        """
        return self._opened(model).layout

    def has_place(self, info: WeightInfo, model: ModelReference) -> bool:
        """Whether a model has a tensor of the output (`Checkpoint.has_place`)."""
        return self._opened(model).has_place(info.name)

    def other_names(self, info: WeightInfo, model: ModelReference) -> tuple[str, ...]:
        """The name under which this model's checkpoint has a tensor, if it is not the tensor's own.

        Raises:
            ArchitectureError, CheckpointError: no family describes this model, or it is quantised or damaged.
        """
        return self._opened(model).other_names(info)

    def tied_names(self, info: WeightInfo, model: ModelReference) -> tuple[str, ...]:
        """The stored names of the tensor that an absent one is tied to in this model.

        Raises:
            ArchitectureError, CheckpointError: as `other_names`.
        """
        return self._opened(model).tied_names(info)

    def is_superfluous(self, task: ExecuteMergeMethodTask) -> bool:
        """Whether MergeKit's architecture file asks for a tensor that models of this config do not have.

        Old buffers are superfluous as soon as one model has none; what the config leaves out (a switched-off norm, an
        unused task head), if no model has it.
        """
        infos = gather_of(task).weight_info.items()
        there = [self.checkpoints[model].stored(info) is not None for model, info in infos]
        layouts = [(self.checkpoints[model].layout, info.name) for model, info in infos]
        if all(layout.is_buffer(name) for layout, name in layouts):
            return not all(there)
        return not any(there) and all(layout.is_absent(name) or _may_lack(layout, name) for layout, name in layouts)

    def check(self, planned: list[Planned]) -> dict[ModelReference, tuple[str, ...]]:
        """Everything that headers can tell about the planned tensors.

        Returns:
            The stored tensors that the merge does not read, for each model that has any.

        Raises:
            CheckpointError, GeometryError: naming the tensor or model and the remedy.
        """
        used: dict[ModelReference, dict[str, WeightInfo]] = defaultdict(dict)
        for _, task in planned:
            for model, info in gather_of(task).weight_info.items():
                used[model][info.name] = info
        for anchor, model in dict.fromkeys((anchor_of(task), m) for _, task in planned for m in task.model_order):
            alone = self.checkpoints[model].own_layout is not None
            check_geometry(anchor, self.layout(anchor), model, self.layout(model), towers=not alone)
        unread = {model: self.checkpoints[model].check(infos.values()) for model, infos in used.items()}
        for weight, task in planned:
            self._check_vocabulary(weight, task)
        return {model: names for model, names in unread.items() if names}

    def _check_vocabulary(self, weight: WeightInfo, task: ExecuteMergeMethodTask) -> None:
        if not isinstance(task.gather_tensors, GatherTensors) or weight.vocabulary_axis is None:
            return
        headers = {m: self.checkpoints[m].stored(info) for m, info in gather_of(task).weight_info.items()}
        shapes = {header.shape: model for model, header in headers.items() if header is not None}
        if len(shapes) > 1:
            (shape_a, a), (shape_b, b) = list(shapes.items())[:2]
            raise GeometryError(
                f"tensor {weight.name}",
                f"its vocabulary differs: {shape_a} in {a}, {shape_b} in {b}",
                "Let MergeKit match the tokenizers: tokenizer: {source: base}",
            )


def check_possible(use: Symmetries, kind: BlockKind, layout: ModelLayout) -> None:
    """Refuse what the parameters ask for and the architecture cannot have."""
    if kind is BlockKind.attention and use.rotation is Rotation.full and layout.has_qk_norm:
        raise ConfigError(
            "parameter rotation",
            f"full is not possible for {layout.family.title}: its queries and keys are normalised (QK-norm), and "
            "a rotation before the norm's gains breaks the model",
            "Use rotation: exact",
        )
    if kind is BlockKind.attention and use.rotation is Rotation.full and layout.geometry.latent is not None:
        raise ConfigError(
            "parameter rotation",
            f"full is not possible for {layout.family.title}: the keys that turn with the position are one for all "
            "heads, and no matrix of a head can turn them",
            "Use rotation: exact",
        )
    if kind is BlockKind.attention and use.value_output is ValueOutput.general:
        shape = layout.head_shape(0)
        values = shape.values if isinstance(shape, HeadShape) else HeadValues.free
        if values is not HeadValues.free:
            raise ConfigError(
                "parameter value_output",
                f"general is not exact for {layout.family.title}: {_STANDS_BETWEEN[values]}",
                "Use value_output: orthogonal, which takes the largest group that is exact",
            )
    if not 1 < use.condition <= CONDITION:
        raise ParameterError(
            "parameter condition",
            f"it is {use.condition}, but a condition number is bounded by a number above 1, of at most {CONDITION:.0f}",
            "Correct the value",
        )
    if kind.is_mlp and use.neuron_scaling and layout.neuron_scale is NeuronScale.none:
        raise ConfigError(
            "parameter neuron_scaling",
            f"{layout.family.title} {_KEEPS_SCALE[layout.family.mlp]}, and a scale would change the function",
            "Leave neuron_scaling out",
        )


_STANDS_BETWEEN = {
    HeadValues.normed: "its values are normalised",
    HeadValues.keys: "its values are what the key projection writes",
    HeadValues.gated: "a gate multiplies each coordinate of its attended values",
}
_KEEPS_SCALE = {
    MlpKind.plain: "has a plain MLP: its activation stands between the two projections",
    MlpKind.clamped: "has a gated MLP that clamps its up projection",
}


def check_same_neurons(block: Block, checkpoints: Mapping[ModelReference, Checkpoint]) -> None:
    """Refuse a scale of neurons that only the anchor's activation lets pass.

    Raises:
        ConfigError: if a model that is to be aligned has another symmetry.
    """
    if not block.kind.is_mlp or not block.symmetries.neuron_scaling:
        return
    anchor = block.anchor
    for model in block.moved():
        layouts = {m: checkpoints[m].layout.stack(block.layer)[0] for m in (anchor, model)}
        if layouts[model].neuron_scale is not layouts[anchor].neuron_scale:
            activations = " and ".join(f"{m} has {of.activation}" for m, of in layouts.items())
            raise ConfigError(
                "parameter neuron_scaling",
                f"{activations}, and only one of these activations lets a scale of the neurons pass",
                "Leave neuron_scaling out",
            )


def check_geometry(
    anchor: ModelReference, theirs: ModelLayout, model: ModelReference, ours: ModelLayout, *, towers: bool = True
) -> None:
    """A model must be of the anchor's family, and have the same tensors in its layers, of the same sizes.

    Args:
        anchor, theirs: the anchor and its layout.
        model, ours: the other model.
        towers: whether both have the same towers; a text model has none of those around it.

    Raises:
        GeometryError: if it differs.
    """
    if ours.family.name != theirs.family.name:
        raise GeometryError(
            f"model {model}",
            f"it is of family {ours.family.name}, but the anchor {anchor} is of family {theirs.family.name}",
            "Merge models of one architecture",
        )
    if towers:
        _check_same_towers(anchor, theirs, model, ours)
    _check_same_layers(f"model {model}", anchor, ours, theirs)


def _check_same_towers(anchor: ModelReference, theirs: ModelLayout, model: ModelReference, ours: ModelLayout) -> None:
    towers = [{name: of.family.name for name, of in one.towers.items()} for one in (ours, theirs)]
    if towers[0] != towers[1]:
        mine, its = (", ".join(f"{name} {of}" for name, of in one.items()) or "none" for one in towers)
        raise GeometryError(
            f"model {model}",
            f"its known towers differ from the anchor {anchor}: {mine} and {its}",
            "Merge models with the same kind of tower",
        )
    for name, tower in ours.towers.items():
        _check_same_layers(f"{name} of model {model}", anchor, tower, theirs.towers[name])


def _check_same_layers(where: str, anchor: ModelReference, ours: ModelLayout, theirs: ModelLayout) -> None:
    """The same of one stack of layers."""
    if surplus := ours.inside.keys() ^ theirs.inside.keys():
        raise GeometryError(
            where,
            f"its layers differ from the anchor {anchor} in {', '.join(sorted(surplus))}",
            "Merge models whose configs agree on biases and norms",
        )
    if ours.layers == theirs.layers and ours.layer_kinds != theirs.layer_kinds:
        raise GeometryError(
            where,
            f"its layers are of other kinds than those of the anchor {anchor}",
            "Merge models whose configs have the same kinds of layers in the same order",
        )
    if differences := ours.geometry.differences(theirs.geometry):
        raise GeometryError(
            where,
            f"its sizes differ from the anchor {anchor}: {', '.join(differences)}",
            "Merge models of the same shape",
        )


def _resolved(config: Any, model: ModelReference) -> ModelLayout:
    if getattr(config, "quantization_config", None) is not None:
        raise CheckpointError(
            f"model {model}",
            "its config has a quantization_config: the checkpoint is quantised",
            "Use the model's unquantised checkpoint",
        )
    return resolve_stored(config, model)


def _may_lack(layout: ModelLayout, name: str) -> bool:
    placed = layout.placed(name)
    return placed is not None and placed.claim.spec.optional
