"""A model whose weights are handed in, one layer at a time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from mergekit_symalign.activations.runner import LayerRunner


class Source(Protocol):
    """What is measured."""

    @property
    def runner(self) -> LayerRunner:
        """The model without weights."""

    def layer(self, index: int) -> dict[str, Tensor]:
        """The tensors of a layer, by their name inside the layer."""

    def outside(self) -> dict[str, Tensor]:
        """The tensors outside the layers, by name; a tied one under any of its names."""


def outside_of(source: Source) -> dict[str, Tensor]:
    """The tensors outside the layers under all of their names, tied ones under several."""
    found = source.outside()
    groups = [(names, next((n for n in names if n in found), None)) for names in tied_names(source.runner)]
    return {other: found[name] for names, name in groups if name is not None for other in names}


def first_names(runner: LayerRunner) -> list[str]:
    """Each tensor outside the layers once, under the name that the others are tied to."""
    return [next(iter(names)) for names in tied_names(runner)]


def tied_names(runner: LayerRunner) -> list[dict[str, None]]:
    """The names of each parameter outside the layers, in the order of the model."""
    prefix = runner.layout.name(0, "").rpartition("0.")[0]
    names: dict[int, dict[str, None]] = {}
    for name, parameter in runner.model.named_parameters(remove_duplicate=False):
        if not name.startswith(prefix):
            names.setdefault(id(parameter), {})[name] = None
    return list(names.values())


def full_names(runner: LayerRunner, layer: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a layer by their name in the model."""
    return {runner.layout.name(layer, part): x for part, x in tensors.items()}
