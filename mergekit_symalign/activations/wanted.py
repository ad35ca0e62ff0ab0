"""What shall be measured of which tensors, and how many numbers that is."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from mergekit_symalign.activations.inputs import Inputs, Shared
from mergekit_symalign.activations.runner import LayerRunner
from mergekit_symalign.activations.sources import first_names

_BYTES = 4  # of a number in float32


@dataclass(frozen=True)
class Wanted:
    """What is measured.

    Attributes:
        inputs: whose Gram matrices are wanted.
        full: whether whole Gram matrices are wanted, or their diagonals.
        fisher: tensors whose squared gradients are wanted.
        outputs: of linear layers whose output's gradients are wanted, each by itself; empty unless ``kronecker``.
        whose: whose targets gradients are of: ``empirical``, ``sampled`` or ``hard``; none where there are none.
        seed: of the targets that are drawn.
    """

    inputs: Inputs
    full: bool
    fisher: frozenset[str]
    outputs: Inputs
    whose: str = "none"
    seed: int = 0

    @property
    def is_empty(self) -> bool:
        return not (any(self.inputs) or self.fisher or any(self.outputs))


def wanted(
    inputs: Inputs, shapes: Mapping[str, Sequence[int]], *, gram: str, fisher: str, only: str | None, seed: int
) -> Wanted:
    """
    Args:
        inputs: all of the model.
        shapes: of all its tensors.
        gram: ``full``, ``diagonal`` or ``none``.
        fisher: ``none``, ``empirical``, ``sampled``, ``hard`` or ``kronecker``.
        only: a regular expression that names have to match.
        seed: of the targets that are drawn.
    """
    matches = re.compile(only or "").search
    matching = _kept(inputs, lambda name: matches(name) is not None)
    linear = {name for shared in inputs for name in shared.names}
    names = frozenset(name for name in shapes if matches(name) is not None)
    nothing = _kept(inputs, lambda _: False)
    factors = fisher == "kronecker"
    return Wanted(
        inputs=nothing if gram == "none" else matching,
        full=gram != "diagonal",
        fisher=frozenset() if fisher == "none" else names - linear if factors else names,
        outputs=matching if factors else nothing,
        whose="empirical" if factors else fisher,
        seed=seed,
    )


def bytes_of(what: Wanted, shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """How many bytes each kind of statistic takes."""
    grams = sum((x.experts or 1) * x.width * (x.width if what.full else 1) for x in what.inputs)
    factors = sum((x.experts or 1) * n * n for x in what.outputs for n in x.written)
    squares = sum(torch.Size(shapes[name]).numel() for name in what.fisher)
    means = sum((x.experts or 1) * x.width for x in what.inputs)
    found = {"gram": grams, "mean": means, "fisher": squares, "gradient_gram": factors}
    return {kind: _BYTES * numbers for kind, numbers in found.items() if numbers}


def shapes_of(runner: LayerRunner) -> dict[str, tuple[int, ...]]:
    """Of all tensors of a model; tied ones once."""
    outside = set(first_names(runner))
    return {
        name: tuple(x.shape)
        for name, x in runner.model.named_parameters()
        if name in outside or runner.layout.layer_of(name) is not None
    }


def _kept(inputs: Inputs, keep: Callable[[str], bool]) -> Inputs:
    layers = tuple(tuple(_shared(layer, keep)) for layer in inputs.layers)
    return Inputs(tuple(_shared(inputs.front, keep)), layers, tuple(_shared(inputs.behind, keep)))


def _shared(some: Sequence[Shared], keep: Callable[[str], bool]) -> Iterator[Shared]:
    for shared in some:
        pairs = [pair for pair in zip(shared.names, shared.written, strict=True) if keep(pair[0])]
        if pairs:
            names, written = zip(*pairs, strict=True)
            yield replace(shared, names=names, written=written)
