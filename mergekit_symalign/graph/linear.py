"""The linear layers of a model: which tensors are their weights, and how these are stored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn
from transformers.pytorch_utils import Conv1D

from mergekit_symalign.symmetry.element import Fused, TensorAxes

_PACKED = ("Router", "Experts")  # endings of classes whose parameters are weights without a module of their own


@dataclass(frozen=True)
class Linear:
    """How the weight of a linear layer is stored.

    Attributes:
        transposed: [in, out] (GPT-2's Conv1D), not [out, in].
        experts: one matrix for each expert, [experts, out, in].
        bias: the name of its bias in the model.
    """

    transposed: bool = False
    experts: bool = False
    bias: str | None = None

    def inputs(self, shape: tuple[int, ...]) -> int:
        """How many numbers it reads."""
        return shape[-2] if self.transposed else shape[-1]

    def outputs(self, shape: tuple[int, ...]) -> int:
        """How many numbers it writes."""
        return shape[-1] if self.transposed else shape[-2]

    def read(self, axes: TensorAxes) -> tuple[str | Fused, str | None]:
        """The axis along which it reads, and how experts lie beside it (`moved_gram`)."""
        return self._along(axes, -2 if self.transposed else -1)

    def written(self, axes: TensorAxes) -> tuple[str | Fused, str | None]:
        """The axis along which it writes, and how experts lie beside it."""
        return self._along(axes, -1 if self.transposed else -2)

    def _along(self, axes: TensorAxes, dim: int) -> tuple[str | Fused, str | None]:
        if not self.experts:
            return axes.names[dim], None
        if axes.joined is not None and axes.joined[1] == 3 + dim:
            return axes.names[0], "joined"
        return axes.names[-1], "apart"


def linear_layers(model: nn.Module) -> Mapping[str, Linear]:
    """Every linear layer by the name of its weight in the model. Weights that serve another purpose as well (tied
    embeddings) are none."""
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    found: dict[str, Linear] = {}
    for path, module in model.named_modules():
        plain = isinstance(module, (nn.Linear, Conv1D))
        for name, parameter in module.named_parameters(recurse=False):
            packed = type(module).__name__.endswith(_PACKED) and parameter.ndim >= 2
            full = f"{path}.{name}" if path else name
            if (packed or (plain and name == "weight")) and len(owners[id(parameter)]) == 1:
                bias = full.removesuffix("weight") + "bias" if plain and module.bias is not None else None
                found[full] = Linear(isinstance(module, Conv1D), parameter.ndim == 3, bias)
    return found
