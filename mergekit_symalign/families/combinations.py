"""What a family file may combine: anything that no solver knows is refused when the file is loaded."""

from __future__ import annotations

from collections.abc import Iterator

from mergekit_symalign.errors import ArchitectureError
from mergekit_symalign.families.schema import LATENT_AXES, BlockKind, Family, Positions, TensorSpec
from mergekit_symalign.symmetry.options import GainScope

_HEADS = ("query", "key", "value", "attended")
_ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function", "activation")
_GAINS = ("query_gain", "key_gain")
_OF_LATENT = sorted(axis for axis in LATENT_AXES if not axis.startswith("q_latent"))


def require_known(family: Family) -> None:
    """
    Raises:
        ArchitectureError: naming the family, and what it combines that no solver knows.
    """
    for problem in _problems(family):
        raise ArchitectureError(f"family {family.name}", problem, "Correct the file")


def _problems(family: Family) -> Iterator[str]:
    axes = {axis for spec in family.layer.values() for axis in _axes(spec)}
    yield from _of_attention(family, axes)
    yield from _of_mlp(family, axes)
    for name, spec in family.layer.items():
        if len(blocks := [kind.value for kind in BlockKind if kind.names & _axes(spec)]) > 1:
            yield f"{name} has axes of the blocks {' and '.join(blocks)}, and a tensor belongs to one of them"
        if spec.fused_per_head and not any(isinstance(axis, tuple) for axis in spec.axes):
            yield f"{name} is fused_per_head, but none of its axes is fused"
        if spec.interleaved and ("gate", "up") not in spec.axes:
            yield f"{name} is interleaved, but no axis of it is gate and up"
        if spec.fused_groups != 1 and (spec.fused_per_head or "expert" in spec.axes):
            yield f"{name} has fused_groups, and its parts already follow one another by heads or experts"
    for name in (name for name, spec in family.tensors.items() if spec.block is not None):
        yield f"{name} has an axis of a layer's block, but lies outside the layers"


def _of_attention(family: Family, axes: set[str]) -> Iterator[str]:
    attention = family.attention
    latent = family.sizes.kv_latent is not None
    of_keys = attention.value_norm and attention.norm is not GainScope.none  # no values of their own
    needed = [axis for axis in (_OF_LATENT if latent else _HEADS) if not (axis == "value" and of_keys)]
    if missing := [axis for axis in needed if axis not in axes]:
        yield f"no tensor of a layer has the axis {missing[0]}"
    foreign = ({*_HEADS, *_GAINS} - LATENT_AXES if latent else LATENT_AXES - {*_HEADS}) & axes
    if foreign:
        yield f"sizes.kv_latent is {'' if latent else 'not '}given, but a tensor has the axis {min(foreign)}"
    if latent and None in (family.sizes.nope, family.sizes.rope, family.sizes.value):
        yield "sizes.kv_latent needs nope, rope and value beside it"
    turns = attention.rotary_factor or attention.rotary_dim is not None or attention.without_rope is not None
    if latent and (attention.norm is not GainScope.none or turns):
        yield "sizes.kv_latent is given, and such heads have no norm, and rope coordinates that turn in all layers"
    if attention.positions is Positions.none and turns:
        yield "attention.positions is none, so no part of a head turns and no layer is without RoPE"
    if attention.head_bias is True and attention.positions is not Positions.none:
        yield "attention.head_bias is of every model, but attention.positions is not none"
    if attention.unit_norm and (attention.norm is not GainScope.none or attention.positions is Positions.none):
        yield "attention.unit_norm is behind RoPE and without gains, so attention.norm is none and positions is not"
    if attention.value_norm and "attended_gate" in axes:
        yield "attention.value_norm and the axis attended_gate together have no solver"
    has_gains = [axis for axis in _GAINS if axis in axes]
    if attention.norm is GainScope.none and has_gains:
        yield f"a tensor has the axis {has_gains[0]}, but attention.norm is none"
    if attention.norm is not GainScope.none and len(has_gains) < len(_GAINS):
        yield f"attention.norm is {attention.norm.value}, which needs a gain of the queries and one of the keys"
    if attention.norm_when is not None and attention.norm is GainScope.none:
        yield "attention.norm_when says when there is a norm, but attention.norm is none"
    if "head" in axes and not attention.norm.per_head:
        yield f"a gain has the axis head, but under attention.norm: {attention.norm.value} all heads share one"


def _of_mlp(family: Family, axes: set[str]) -> Iterator[str]:
    gated = family.mlp.has_gate
    if missing := [axis for axis in ("up", "down") if axis not in axes]:
        yield f"no tensor of a layer has the axis {missing[0]}"
    if gated != ("gate" in axes):
        yield f"mlp is {family.mlp.value}, but {'no' if gated else 'a'} tensor of a layer has the axis gate"
    if family.gated_when is not None and not gated:
        yield "gated_when says when the MLP is gated, but mlp is plain"
    always = gated and family.gated_when is None
    if always and family.activation is not None:
        yield f"activation is of a plain MLP, but mlp is {family.mlp.value}"
    if always and (restricted := [key for key in _ACTIVATIONS if family.variants.get(key)]):
        yield f"variants.{restricted[0]} is no reason to refuse a model: a gated MLP may have any activation"
    for kind, size in ((BlockKind.shared, family.sizes.shared), (BlockKind.dense, family.sizes.dense)):
        if bool(size) != bool(kind.names & axes):
            yield f"sizes.{kind.value} and the axes {kind.prefix}* belong together, and one of them is missing"
    if cross := [axis for axis in BlockKind.cross.names - axes if BlockKind.cross.names & axes]:
        yield f"no tensor of a layer has the axis {min(cross)}"
    if (family.sizes.experts is not None) != ("expert" in axes):
        yield "sizes.experts and the axis expert belong together, and one of them is missing"


def _axes(spec: TensorSpec) -> set[str]:
    return {name for axis in spec.axes for name in ((axis,) if isinstance(axis, str) else axis)}
