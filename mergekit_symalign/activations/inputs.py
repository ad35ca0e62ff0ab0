"""Which tensors of a model read the same input, and how large it is: found by running a few tokens before the rest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from mergekit_symalign.activations.linear import Use, Watch
from mergekit_symalign.activations.runner import Batch, LayerRunner, Recorded
from mergekit_symalign.activations.sources import Source, outside_of, tied_names

_TOKENS = 2  # of the inputs that are tried


@dataclass(frozen=True)
class Shared:
    """One input, and the tensors that read it.

    Attributes:
        names: of the tensors in the model; the first one stands for all.
        width: numbers of a row.
        written: numbers that each tensor writes for a row.
        experts: how many matrices a packed tensor holds, each with an input of its own; None where it is one matrix.
    """

    names: tuple[str, ...]
    width: int
    written: tuple[int, ...]
    experts: int | None = None


@dataclass(frozen=True)
class Inputs:
    """All inputs of a model.

    Attributes:
        front: of tensors in front of the layers.
        layers: of each layer.
        behind: of tensors behind the layers.
    """

    front: tuple[Shared, ...]
    layers: tuple[tuple[Shared, ...], ...]
    behind: tuple[Shared, ...]

    def __iter__(self) -> Iterator[Shared]:
        yield from self.front
        for layer in self.layers:
            yield from layer
        yield from self.behind


@torch.no_grad()
def find_inputs(source: Source, batch: Batch) -> Inputs:
    """Run the first tokens of a batch through every kind of layer that the model has, weights of layers being zeros.

    Args:
        source: the model.
        batch: some inputs; only a little of the first one is used.
    """
    runner, outside = source.runner, outside_of(source)
    batch = _start_of(batch)
    front = _Found(outside)
    with front:
        recorded = runner.embed(batch, outside)
    layers, known = [], {}
    for index, layer in enumerate(runner.layers):
        shapes = tuple((part, tuple(x.shape)) for part, x in layer.named_parameters())
        if shapes not in known:
            known[shapes] = _of_layer(runner, index, recorded)
        layers.append(tuple(_named(runner, index, shared) for shared in known[shapes]))
    behind = _Found(outside)
    with behind:
        runner.head(batch, outside, recorded.hidden)
    tied = {name for names in tied_names(runner) if len(names) > 1 for name in names}
    before = {name for shared in front.groups() for name in shared.names}
    return Inputs(_without(front.groups(), tied), tuple(layers), _without(behind.groups(), tied | before))


def linear_names(model: nn.Module) -> list[str]:
    """The weights of every linear layer: of modules, routers and experts. Tied ones stand under their first name."""
    modules = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, (nn.Linear, Conv1D)) or type(module).__name__.endswith(("Router", "Experts"))
        for parameter in module.parameters(recurse=False)
        if parameter.ndim >= 2
    }
    return [name for name, parameter in model.named_parameters() if id(parameter) in modules]


def _of_layer(runner: LayerRunner, index: int, recorded: Recorded) -> tuple[Shared, ...]:
    """By the names inside the layer."""
    hidden = recorded.hidden
    weights = {
        part: torch.zeros_like(x, device=hidden.device, dtype=hidden.dtype)
        for part, x in runner.layers[index].named_parameters()
    }
    found = _Found(weights)
    with found:
        runner.call(index, weights, hidden, recorded)
    seen = found.groups()
    linear = set(linear_names(runner.layers[index]))  # a convolution has three axes as well
    packed = [(part, x) for part, x in weights.items() if x.ndim == 3 and part in linear]
    missed = [(part, x) for part, x in packed if all(part not in s.names for s in seen)]
    return (*seen, *(_packed(part, x) for part, x in missed))  # experts that no token reached


class _Found(Watch):
    """Notes which weights read the same inputs: all that each of them reads, DeBERTa's positions too."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__(weights, self._add)
        self._weights = weights
        self._kept: list[Tensor] = []  # so that no other input comes to lie at the same place
        self._uses: dict[str, list[Use]] = {}

    def _add(self, use: Use) -> None:
        self._kept.append(use.read)
        self._uses.setdefault(use.name, []).append(use)

    def groups(self) -> tuple[Shared, ...]:
        together: dict[object, list[Use]] = {}
        for name, uses in self._uses.items():
            packed = uses[0].expert is not None
            together.setdefault(name if packed else tuple(map(_place, uses)), []).append(uses[0])
        return tuple(self._shared(uses) for uses in together.values())

    def _shared(self, uses: list[Use]) -> Shared:
        first = uses[0]
        if first.expert is not None:
            return _packed(first.name, self._weights[first.name])
        names, written = zip(*((use.name, use.written.shape[-1]) for use in uses), strict=True)
        return Shared(names, first.read.shape[-1], written)


def _place(use: Use) -> tuple[object, ...]:
    x = use.read
    return (x.untyped_storage().data_ptr(), x.storage_offset(), x.numel(), x.shape[-1], x._version)


def _packed(name: str, x: Tensor) -> Shared:
    return Shared((name,), x.shape[2], (x.shape[1],), x.shape[0])


def _named(runner: LayerRunner, index: int, shared: Shared) -> Shared:
    names = tuple(runner.layout.name(index, part) for part in shared.names)
    return Shared(names, shared.width, shared.written, shared.experts)


def _without(groups: tuple[Shared, ...], names: set[str]) -> tuple[Shared, ...]:
    return tuple(shared for shared in groups if not set(shared.names) & names)


def _start_of(batch: Batch) -> Batch:
    """A little of the first input; the whole one where it is an image."""
    ids = batch.ids[:1, :_TOKENS] if batch.ids.ndim == 2 else batch.ids[:1]
    return type(batch)(ids, batch.valid[:1, :_TOKENS] if batch.ids.ndim == 2 else batch.valid[:1])
