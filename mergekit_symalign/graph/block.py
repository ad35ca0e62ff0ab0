"""One planned block: the tensors of an attention or MLP, the models that have it, and what is asked for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

from mergekit.architecture import WeightInfo
from mergekit.common import ModelReference
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask

from mergekit_symalign.errors import ConfigError, GeometryError, ParameterError
from mergekit_symalign.families.resolve import ModelLayout
from mergekit_symalign.families.schema import BlockKind
from mergekit_symalign.families.towers import Layer, TowerLayer
from mergekit_symalign.graph.checkpoint_checks import Checkpoint
from mergekit_symalign.graph.load import GatherAligned, LoadFinite
from mergekit_symalign.graph.planned import Planned, anchor_of, gather_of
from mergekit_symalign.symmetry.element import TensorAxes
from mergekit_symalign.symmetry.options import AttentionShape, MlpShape, NeuronScale, Rotation, Symmetries, ValueOutput

SYMMETRY_NAMES = tuple(f.name for f in fields(Symmetries))


@dataclass(frozen=True)
class Block:
    """The planned tensors of one block of the output.

    Attributes:
        layer: of the output, in its own stack of layers.
        kind: attention or MLP.
        members: its tensors.
        checkpoints: of all models.
    """

    layer: Layer
    kind: BlockKind
    members: tuple[Planned, ...]
    checkpoints: Mapping[ModelReference, Checkpoint]

    @property
    def anchor(self) -> ModelReference:
        return anchor_of(self.members[0][1])

    @property
    def in_tower(self) -> bool:
        """Whether it is in another stack of layers than the model's main one."""
        return isinstance(self.layer, TowerLayer)

    @property
    def layout(self) -> ModelLayout:
        """Of the stack of layers that it is in."""
        return self.checkpoints[self.anchor].layout.stack(self.layer)[0]

    @cached_property
    def axes(self) -> tuple[TensorAxes, ...]:
        placed = (self.checkpoints[self.anchor].layout.placed(weight.name) for weight, _ in self.members)
        return tuple(one.layout.axes(one.claim.spec) for one in placed if one is not None)

    @property
    def mlp(self) -> MlpShape:
        """Its neurons, if it is an MLP; the model's otherwise."""
        return self.layout.mlp_shape(self.kind)

    def loads(self) -> dict[ModelReference, tuple[LoadFinite, ...]]:
        """Each model's loads of the tensors."""
        gathered = [GatherAligned(**dict(gather_of(task))).loads() for _, task in self.members]
        return {model: tuple(load[model] for load in gathered) for model in gathered[0]}

    @cached_property
    def symmetries(self) -> Symmetries:
        chosen = {name: self.agreed(name) for name in SYMMETRY_NAMES}
        if self.in_tower:  # the parameters are chosen for the main stack: towers use what they admit
            chosen["neuron_scaling"] &= self.layout.neuron_scale is not NeuronScale.none
            full = chosen["rotation"] == Rotation.full.value
            chosen["rotation"] = Rotation.exact if full and self.layout.has_qk_norm else chosen["rotation"]
        chosen["heads"] = chosen["heads"] is not False  # ot_fusion's own parameter of this name says ignore or respect
        kinds = {"rotation": Rotation(chosen["rotation"]), "value_output": ValueOutput(chosen["value_output"])}
        return Symmetries(**chosen | kinds)

    def moved(self) -> list[ModelReference]:
        """The models that are to be aligned.

        Raises:
            ParameterError: if a model is not to be aligned and yet has a file that says how.
        """
        return [m for m in self.members[0][1].model_order if m != self.anchor and self._wants_alignment(m)]

    def layer_of(self, model: ModelReference) -> Layer:
        """Which of the model's own layers the block comes from."""
        placed = self.checkpoints[model].layout.placed(gather_of(self.members[0][1]).weight_info[model].name)
        assert placed is not None
        assert placed.layer is not None
        return placed.layer

    def heads(self, model: ModelReference) -> AttentionShape:
        """Heads and positions of the layers that are matched, which anchor and model must share."""
        anchor_shape, shape = (self._head_shape(m) for m in (self.anchor, model))
        if shape != anchor_shape:
            raise GeometryError(
                f"tensor {self.members[0][0].name}",
                f"model {model} has other positions in this layer than the anchor (RoPE on {shape.rotary} and "
                f"{anchor_shape.rotary} coordinates)",
                "Choose slices that pair layers of the same kind, or align: false for this model",
            )
        return shape

    def _head_shape(self, model: ModelReference) -> AttentionShape:
        layout, index = self.checkpoints[model].layout.stack(self.layer_of(model))
        return layout.attention_shape(index, self.kind)

    def require_possible_values(self) -> None:
        """General matrices of values are found from weights, of one model at a time.

        Raises:
            ConfigError: if something else is asked for as well.
        """
        if self.symmetries.value_output is not ValueOutput.general:
            return
        for name, wanted in (("objective", "weights"), ("anchor", "base")):
            if self.agreed(name) != wanted:
                raise ConfigError(
                    "parameter value_output",
                    f"general matrices are found from weights, towards one anchor, but {name} is {self.agreed(name)}",
                    f"Use {name}: {wanted}, or value_output: orthogonal",
                )

    def require_possible_latents(self) -> None:
        """Heads that share a latent are matched by their weights, towards one anchor.

        Raises:
            ConfigError: if something else is asked for.
        """
        if self.kind.is_mlp or self.layout.geometry.latent is None:
            return
        if all(self.agreed("alignment", model) is not None for model in self.moved()):
            return
        for name, wanted in (("objective", "weights"), ("anchor", "base")):
            if self.agreed(name) != wanted:
                raise ConfigError(
                    f"parameter {name}",
                    f"it is {self.agreed(name)} for {self.members[0][0].name}, but attention heads that share a latent "
                    f"({self.layout.family.title}) are matched by their weights, towards one anchor",
                    f"Use {name}: {wanted} for self_attn (a filter), or for the whole merge",
                )

    def require_possible_consensus(self, moved: list[ModelReference]) -> None:
        """A consensus is found from weights, of all models at once.

        Raises:
            ConfigError: if something else is asked for as well.
        """
        if self.agreed("objective") == "activations":
            raise ConfigError(
                "parameter anchor",
                "consensus compares weights, but objective is activations",
                "Use anchor: base with activations, or objective: weights",
            )
        if given := [m for m in moved if self.agreed("alignment", m) is not None]:
            raise ConfigError(
                f"parameter alignment of model {given[0]}",
                "the file aligns to the anchor, but anchor: consensus aligns to what all models have in common",
                "Leave out one of the two",
            )

    def agreed(self, name: str, model: ModelReference | None = None) -> Any:
        """The value of a parameter, which all tensors of a block must share.

        Raises:
            ParameterError: naming two that do not.
        """

        def value(task: ExecuteMergeMethodTask) -> Any:
            return (task.parameters if model is None else task.input_parameters[model])[name]

        first_weight, first = self.members[0]
        for weight, task in self.members[1:]:
            if value(task) != value(first):
                raise _disagreement(name, (first_weight, value(first)), (weight, value(task)), model)
        return value(first)

    def _wants_alignment(self, model: ModelReference) -> bool:
        wanted: bool = self.agreed("align", model)
        if not wanted and self.agreed("alignment", model) is not None:
            raise ParameterError(
                f"parameter alignment of model {model}",
                f"align is false for {self.members[0][0].name}, so the file would not be used",
                "Leave out one of the two",
            )
        return wanted


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
