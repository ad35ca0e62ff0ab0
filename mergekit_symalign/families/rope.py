"""What a config says of RoPE: which part of a head turns, and in which planes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mergekit_symalign.errors import ArchitectureError
from mergekit_symalign.families.geometry import Geometry
from mergekit_symalign.families.known import OTHERWISE, lookup
from mergekit_symalign.families.schema import AttentionSpec, Family, Positions

_PROPORTIONAL = "proportional"  # of a RoPE that turns all planes of a head, the last of them by 0


def values_of(config: Any, key: str) -> list[Any]:
    """The value of a key; the values of all kinds of layers, where each kind has its own RoPE.

    Which part of a head turns is nobody's question under ``proportional``: planes beyond that part turn by 0.
    """
    ropes = _ropes(config)
    if key.endswith("partial_rotary_factor"):
        ropes = [rope for rope in ropes if rope.get("rope_type") != _PROPORTIONAL]
        if not ropes and _ropes(config):
            return []
    if ropes and key.startswith("rope_parameters."):
        return [lookup(rope, key.removeprefix("rope_parameters.")) for rope in ropes]
    return [lookup(config, key)]


def _ropes(config: Any) -> list[Mapping[str, Any]]:
    """What the config says of RoPE: once, or for each kind of layers."""
    rope = lookup(config, "rope_parameters")
    kinds = [x for x in rope.values() if isinstance(x, Mapping)] if isinstance(rope, Mapping) else []
    return kinds or ([rope] if isinstance(rope, Mapping) else [])


def is_interleaved(config: Any, attention: AttentionSpec) -> bool:
    when = attention.interleaved_when
    return attention.positions is Positions.rope_interleaved or (when is not None and bool(lookup(config, when)))


def rotary_of(config: Any, family: Family, geometry: Geometry, model: str) -> int:
    """How many coordinates of each head RoPE turns."""
    factors = {_factor(config, family, rope) for rope in _ropes(config) or [{}]}
    if len(factors) > 1:
        raise ArchitectureError(
            f"model {model}", f"its kinds of layers turn different parts of each head ({sorted(factors)})", OTHERWISE
        )
    counted = lookup(config, family.attention.rotary_dim) if family.attention.rotary_dim is not None else None
    rotary = int((geometry.rope or geometry.head_dim) * factors.pop()) if counted is None else int(counted)
    if rotary % 2 and family.attention.positions is not Positions.none:
        whole = rotary == geometry.head_dim
        what = f"head dimension {rotary}" if whole else f"rotary part {rotary} of the head dimension"
        raise ArchitectureError(
            f"model {model}", f"{what} is odd, so it has no rotary planes", "Check the model's config.json"
        )
    return rotary


def _factor(config: Any, family: Family, rope: Mapping[str, Any]) -> float:
    """Which share of each head turns, in layers with this RoPE."""
    if rope.get("rope_type") == _PROPORTIONAL:
        return 1.0
    inside = ((key, key.removeprefix("rope_parameters.")) for key in family.attention.rotary_factor)
    factors = (lookup(config if key == own else rope, own) for key, own in inside)
    return next((factor for factor in factors if factor is not None), 1.0)
