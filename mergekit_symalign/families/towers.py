"""Stacks of layers beside a model's main one: vision towers, and the encoder of a model that has a decoder as well."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, order=True)
class TowerLayer:
    """A layer of such a stack.

    Attributes:
        tower: the name of the stack.
        index: of the layer.
    """

    tower: str
    index: int

    def __str__(self) -> str:
        return f"{self.tower} layer {self.index}"


Layer = int | TowerLayer  # a layer of the main stack goes by its index


def layer_name(layer: Layer) -> str:
    """How a layer is called in files, reports and messages."""
    return f"layer {layer}" if isinstance(layer, int) else str(layer)


def in_order(layer: Layer) -> TowerLayer:
    """What layers are sorted by: the main stack comes first."""
    return TowerLayer("", layer) if isinstance(layer, int) else layer


def index_of(layer: Layer) -> int:
    """The index of a layer in its own stack."""
    return layer if isinstance(layer, int) else layer.index
