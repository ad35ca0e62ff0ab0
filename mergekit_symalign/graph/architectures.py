"""Architectures of MergeKit's that list more tensors than its files."""

from __future__ import annotations

from typing import Any

from mergekit.architecture import WeightInfo
from mergekit.architecture.base import ModuleArchitecture


class Extended(ModuleArchitecture):
    """One that answers as another does, for classes that add to it.

    Args:
        listed: the other one.
    """

    def __init__(self, listed: ModuleArchitecture) -> None:
        self.listed = listed

    def pre_weights(self, config: Any) -> list[WeightInfo]:
        return list(self.listed.pre_weights(config))

    def post_weights(self, config: Any) -> list[WeightInfo]:
        return list(self.listed.post_weights(config))

    def layer_weights(self, index: int, config: Any) -> list[WeightInfo] | None:
        weights: list[WeightInfo] | None = self.listed.layer_weights(index, config)
        return weights

    def num_layers_config_key(self) -> str:
        return str(self.listed.num_layers_config_key())

    def num_layers(self, config: Any) -> int:
        return int(self.listed.num_layers(config))
