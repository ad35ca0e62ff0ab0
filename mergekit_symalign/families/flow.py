"""Where each tensor stands in the residual stream: at which point it reads the stream, or what it writes to it.

A layer is entered, its attention is added, its MLP is added. Transport maps between two models' streams change on the
way (fusion/flow.py), so every tensor with the stream as an axis belongs to one point of it.
"""

from __future__ import annotations

from collections.abc import Collection
from enum import Enum
from typing import Any

from mergekit_symalign.errors import ArchitectureError
from mergekit_symalign.families.resolve import ModelLayout, lookup
from mergekit_symalign.families.schema import BlockKind, TensorSpec
from mergekit_symalign.symmetry.element import TensorAxes


class Place(str, Enum):
    """A point of the residual stream, or what is on its way to be added to it."""

    words = "words"  # an embedding of words or patches, added to the stream
    positions = "positions"  # an embedding of positions, added to the stream
    front = "front"  # the stream in front of the layers
    entering = "entering"  # the stream that enters a layer
    attention = "attention"  # what the attention adds
    middle = "middle"  # the stream after the attention
    mlp = "mlp"  # what the MLP adds
    leaving = "leaving"  # the stream after the MLP
    final = "final"  # the stream after the layers
    hidden = "hidden"  # a hidden layer of a task head reads the stream
    inside = "inside"  # bias or norm of that hidden layer
    output = "output"  # reads the hidden layer of a task head


_ON_WHAT_IS_ADDED = {  # norms without readers
    "post_attention_layernorm": Place.attention,
    "post_self_attn_layernorm": Place.attention,
    "post_feedforward_layernorm": Place.mlp,
    "post_mlp_layernorm": Place.mlp,
}
_ON_THE_SUM = {
    "attention.output.LayerNorm": Place.middle,
    "sa_layer_norm": Place.middle,
    "output.LayerNorm": Place.leaving,
    "output_layer_norm": Place.leaving,
}

_READS = {  # a tensor of a task head: the hidden layers that it may read, where they are there
    "classifier": ("pooler.dense", "pre_classifier", "head.dense"),
    "classifier.out_proj": ("classifier.dense",),
    "cls.predictions.decoder": ("cls.predictions.transform.dense",),
    "lm_head.decoder": ("lm_head.dense",),
    "vocab_projector": ("vocab_transform",),
    "decoder": ("head.dense",),
}
_EMBEDDINGS = (  # one part of the name of all that is in front
    *("embeddings", "embed_tokens", "embed_in", "wte", "wpe"),
    *("word_embeddings", "word_embeddings_layernorm", "relative_attention_bias"),
)
_PREDICTS_WORDS = ("decoder", "projector")
_HEAD_NORMS = ("cls.predictions.transform.LayerNorm", "lm_head.layer_norm", "vocab_layer_norm", "head.norm")


def is_parallel(config: Any, layout: ModelLayout) -> bool:
    """Whether attention and MLP read the same stream, the one that enters the layer."""
    if layout.family.name == "gpt_neox":
        return bool(lookup(config, "use_parallel_residual"))
    readers = ({_reader(layout, name) for name in spec.read_by} for spec in layout.inside.values())
    return any(BlockKind.attention in of and any(kind is not None and kind.is_mlp for kind in of) for of in readers)


def layer_places(config: Any, layout: ModelLayout) -> dict[str, Place]:
    """The place of every tensor of a layer that has the residual stream as an axis, by the rest of its name.

    Raises:
        ArchitectureError: for a tensor whose place the family's tables do not tell.
    """
    middle = Place.entering if is_parallel(config, layout) else Place.middle
    mlps = [kind for kind in BlockKind if kind.is_mlp]
    reads = {BlockKind.attention: Place.entering} | dict.fromkeys(mlps, middle)
    writes = {BlockKind.attention: Place.attention} | dict.fromkeys(mlps, Place.mlp)
    found: dict[str, Place] = {}
    for part, spec in layout.inside.items():
        if spec.block is not None and "residual" in spec.axes:
            found[part] = (writes if {"attended", "down"} & layout.axes(spec).all_names() else reads)[spec.block]
        elif part.endswith(".weight") and _stem(part) in _ON_THE_SUM:
            found[part] = _ON_THE_SUM[_stem(part)]
        elif readers := {_reader(layout, name) for name in spec.read_by}:
            found[part] = reads[BlockKind.attention if BlockKind.attention in readers else BlockKind.mlp]
        elif part.endswith(".weight") and _stem(part) in _ON_WHAT_IS_ADDED:
            found[part] = _ON_WHAT_IS_ADDED[_stem(part)]
    for part, spec in layout.inside.items():
        if "residual" in spec.axes and part not in found:
            weight = f"{_stem(part)}.weight"
            if weight not in found or part == weight:
                raise ArchitectureError(
                    f"tensor {layout.name(0, part)}",
                    f"family {layout.family.name} does not tell where it stands in the residual stream",
                    "Use regmean, fisher or an aligned method for this architecture",
                )
            found[part] = found[weight]
    return found


def is_front(name: str, spec: TensorSpec) -> bool:
    """Whether a tensor outside the layers stands in front of them: MergeKit's order of tensors does not tell."""
    return spec.in_front or any(part in _EMBEDDINGS for part in name.split("."))


def outside_place(name: str, spec: TensorSpec, *, present: Collection[str], tied: bool) -> Place | None:
    """The place of a tensor outside the layers; None if it has nothing to do with the stream (a bias of labels).

    Args:
        name: its full name.
        spec: its axes.
        present: the names of all tensors outside the layers that are merged.
        tied: whether the matrix that predicts words is the embedding.
    """
    matrix = len(spec.axes) > 1
    if is_front(name, spec):
        return _front_place(_stem(name), spec, present)
    if any(_is(_stem(name), one) for one in _HEAD_NORMS):
        return Place.inside
    if _hidden_of(name, present):
        return Place.output if matrix else None
    if _is_hidden(name, present, tied=tied):
        return Place.hidden if matrix else Place.inside
    if matrix and "vocabulary" in spec.axes and tied:
        return Place.words
    norm = "residual" in spec.axes and not _may_be_hidden(name)
    return Place.final if matrix or norm else None


def outside_axes(layout: ModelLayout, spec: TensorSpec, place: Place | None) -> TensorAxes:
    """The axes of a tensor outside the layers; those of a task head by what they are on the way to its output."""
    if place is None:
        return TensorAxes(("other",) * len(spec.axes))
    if place in (Place.hidden, Place.inside):
        return TensorAxes(("hidden", "residual")[: len(spec.axes)])
    if place in (Place.output, Place.final) and len(spec.axes) > 1:
        predicted = spec.axes[0] if spec.axes[0] == "vocabulary" else "other"
        return TensorAxes((predicted, "hidden" if place is Place.output else "residual"))
    return layout.axes(spec)


def _hidden_of(name: str, present: Collection[str]) -> bool:
    """Whether a tensor of a task head reads a hidden layer."""
    hidden = next((hidden for output, hidden in _READS.items() if _is(_stem(name), output)), ())
    return any(_is(_stem(other), one) for one in hidden for other in present)


def _is_hidden(name: str, present: Collection[str], *, tied: bool) -> bool:
    """Whether a tensor belongs to a hidden layer of a task head, one whose output is merged or tied."""
    outputs = _may_be_hidden(name)
    merged = any(_is(_stem(other), output) and other.endswith(".weight") for output in outputs for other in present)
    return merged or (tied and any(output.endswith(_PREDICTS_WORDS) for output in outputs))


def _may_be_hidden(name: str) -> list[str]:
    """The outputs that read a tensor's layer, if it is a hidden layer of a task head."""
    return [output for output, hidden in _READS.items() if any(_is(_stem(name), one) for one in hidden)]


def _front_place(stem: str, spec: TensorSpec, present: Collection[str]) -> Place:
    if len(spec.axes) == 1 and stem.endswith("projection") and f"{stem}.weight" in present:
        return Place.words  # the bias of ViT's patches
    if spec.in_front:
        return Place.front
    if "vocabulary" in spec.axes or len(spec.axes) > 3:
        return Place.words
    return Place.positions if "position" in spec.axes else Place.front


def _reader(layout: ModelLayout, name: str) -> BlockKind | None:
    return layout.inside[name].block if name in layout.inside else None


def _stem(name: str) -> str:
    return name.removesuffix(".weight").removesuffix(".bias")


def _is(stem: str, one: str) -> bool:
    return stem == one or stem.endswith(f".{one}")
