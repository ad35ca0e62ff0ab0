"""Which layers of a model are of a kind: layers may differ in their tensors, and in the positions of their heads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mergekit_symalign.families.known import lookup
from mergekit_symalign.families.schema import LayersWhere


def layers_where(
    where: LayersWhere, config: Any, layers: int, others: Mapping[str, LayersWhere] | None = None
) -> frozenset[int]:
    """The layers that meet every condition.

    Args:
        where: the conditions.
        config: the part of a transformers config that describes the layers.
        layers: how many there are.
        others: the family's ``layer_kinds``, for ``other_than`` and ``within``.
    """
    excluded = any(lookup(config, key) == value for key, value in where.unless.items())
    if excluded or (where.when is not None and not lookup(config, where.when)):
        return frozenset()
    found = frozenset(range(layers))
    for condition in _conditions(where, config, others or {}, layers):
        found &= condition
    return found


def _conditions(
    where: LayersWhere, config: Any, others: Mapping[str, LayersWhere], layers: int
) -> Iterator[frozenset[int]]:
    every = frozenset(range(layers))
    if where.key is not None:
        values = where.value if isinstance(where.value, (list, tuple)) else (where.value,)
        yield frozenset(i for i, x in enumerate(lookup(config, where.key) or ()) if x in values)
    if where.among is not None:
        yield frozenset(lookup(config, where.among) or ())
    if where.but is not None:
        yield every - frozenset(lookup(config, where.but) or ())
    if where.only is not None:
        yield frozenset(where.only)
    first = lookup(config, where.first) or 0 if where.first is not None else 0
    yield frozenset(range(first, layers))
    if where.last is not None:
        yield frozenset(range(lookup(config, where.last) + 1))
    if where.every is not None:
        n, counted_from = lookup(config, where.every) or 1, first if where.first is not None else -1
        yield frozenset(i for i in every if (i - counted_from) % n == 0)
    if where.other_than is not None:
        yield every - layers_where(others[where.other_than], config, layers, others)
    if where.within is not None:
        yield layers_where(others[where.within], config, layers, others)
