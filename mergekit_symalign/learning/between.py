"""The model between an anchor and a model that group elements move: its loss as a function of their numbers.

Weights are made where they are used, a layer at a time: the model's tensors under the elements, then a point on the
line to the anchor's. With checkpoints they are made once more on the way back, so that no two layers' are in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from mergekit_symalign.activations.objectives import IGNORED, logits_of, negative_log_likelihood
from mergekit_symalign.activations.runner import Batch, LayerRunner
from mergekit_symalign.learning.adam import Leaf
from mergekit_symalign.learning.elements import Learned, LearnedStream, Numbers
from mergekit_symalign.symmetry.element import BlockElement
from mergekit_symalign.symmetry.residual.kinds import ResidualKind
from mergekit_symalign.symmetry.residual.move import Elements, moved_along
from mergekit_symalign.symmetry.residual.scope import NormWeights, Scope, Tensors, folded, norms_of, unfolded

STREAM_NAME = "residual"


@dataclass(frozen=True)
class Batched:
    """Inputs, and what a model should say.

    Attributes:
        batch: the inputs.
        targets: int64 [inputs, tokens] or [inputs], `IGNORED` where nothing is predicted.
    """

    batch: Batch
    targets: Tensor

    @property
    def counted(self) -> int:
        """How many targets there are."""
        return int((self.targets != IGNORED).sum())


@dataclass(frozen=True)
class Place:
    """A layer, or what lies outside the layers, of both models.

    Attributes:
        scope: of the tensors.
        anchor: the anchor's tensors.
        model: the model's, in the form on which the learned numbers act.
        norms: what the model's norms are to be; None if they move along.
        blocks: what is learned of each block.
        name: in front of the names of its numbers.
    """

    scope: Scope
    anchor: Tensors
    model: Tensors
    norms: NormWeights | None
    blocks: Mapping[str, Learned] = field(default_factory=dict)
    name: str = ""

    @staticmethod
    def of(
        scope: Scope,
        anchor: Tensors,
        model: Tensors,
        kind: ResidualKind,
        stream: Learned,
        blocks: Mapping[str, Learned],
        name: str = "",
    ) -> Place:
        """
        Args:
            scope: of the tensors.
            anchor, model: as stored, in the compute dtype.
            kind: of the stream's element.
            stream, blocks: what is learned.
            name: see above.
        """
        form = folded(scope, model) if kind.rotates else model
        fixed = {of: block.fixed for of, block in blocks.items()}
        norms = norms_of(scope, anchor) if kind.rotates else None
        return Place(scope, anchor, moved_along(scope, form, stream.fixed, fixed), norms, blocks, name)

    def moved(self, stream: BlockElement, numbers: Numbers) -> dict[str, Tensor]:
        """The model's tensors under the elements that some numbers make."""
        blocks: Elements = {of: block.acting(_of(numbers, self.key(of))) for of, block in self.blocks.items()}
        moved = moved_along(self.scope, self.model, stream, blocks)
        return moved if self.norms is None else unfolded(self.scope, moved, self.norms)

    def between(self, stream: BlockElement, numbers: Numbers, t: float) -> dict[str, Tensor]:
        """The tensors at a share ``t`` of the model."""
        model = self.moved(stream, numbers)
        return {name: torch.lerp(x, model[name], t) for name, x in self.anchor.items()}

    def key(self, block: str) -> str:
        """Of a block among all numbers, and in a file."""
        return f"{self.name} {block}"


@dataclass(frozen=True)
class Between:
    """Everything between two models.

    Attributes:
        runner: the architecture, without weights.
        stream: what is learned of the stream's element.
        outside: what lies outside the layers.
        layers: every layer.
        dtype: in which the model computes; None: that of its weights.
        checkpoints: whether layers run once more on the way back, which takes less memory.
    """

    runner: LayerRunner
    stream: LearnedStream
    outside: Place
    layers: Sequence[Place]
    dtype: torch.dtype | None = None
    checkpoints: bool = False

    def leaves(self) -> dict[str, Leaf]:
        """All that is learned, by name."""
        found = {f"{STREAM_NAME} {name}": leaf for name, leaf in self.stream.leaves().items()}
        for place in self.layers:
            for of, block in place.blocks.items():
                found |= {f"{place.key(of)} {name}": leaf for name, leaf in block.leaves().items()}
        return found

    def elements(self, numbers: Numbers) -> dict[str, BlockElement]:
        """The element of every block and of the stream, exactly members of their groups."""
        blocks = {
            place.key(of): block.composed(_of(numbers, place.key(of)))
            for place in self.layers
            for of, block in place.blocks.items()
        }
        return blocks | {STREAM_NAME: self.stream.composed(_of(numbers, STREAM_NAME))}

    def loss(self, numbers: Numbers, data: Batched, t: float) -> Tensor:
        """Summed over all targets, at a share ``t`` of the model."""
        stream = self.stream.acting(_of(numbers, STREAM_NAME))
        outside = self.outside.between(stream, numbers, t)
        makers = [partial(place.between, stream, numbers, t) for place in self.layers]
        device = data.batch.ids.device
        self.runner.move_buffers(device)
        with self._computing(device), _layers_from(self.runner, makers, checkpoints=self.checkpoints):
            output = functional_call(self.runner.model, outside, (), data.batch.inputs())
        return negative_log_likelihood(logits_of(output).float(), data.targets)

    def gradients(self, numbers: Numbers, data: Batched, t: float) -> tuple[float, dict[str, Tensor]]:
        """Of the mean loss with respect to every number; and the mean loss."""
        known = {name: x.detach().requires_grad_() for name, x in numbers.items()}
        loss = self.loss(known, data, t) / data.counted
        found = torch.autograd.grad(loss, list(known.values()))
        return float(loss.detach()), dict(zip(known, found, strict=True))

    def _computing(self, device: torch.device) -> Any:
        return torch.autocast(device.type, self.dtype or torch.bfloat16, enabled=self.dtype is not None)


class _Layer(nn.Module):
    """A layer as a module that runs the layer's own code, whatever stands in its place."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return type(self.layer).forward(self.layer, *args, **kwargs)


@contextmanager
def _layers_from(
    runner: LayerRunner, makers: Sequence[Callable[[], Mapping[str, Tensor]]], *, checkpoints: bool
) -> Iterator[None]:
    """Inside, every layer of a model makes its own weights when it runs."""
    layers = list(runner.layers)
    for layer, maker in zip(layers, makers, strict=True):
        run = partial(_run, _Layer(layer), maker)
        layer.forward = partial(checkpoint, run, use_reentrant=False) if checkpoints else run
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _run(layer: _Layer, maker: Callable[[], Mapping[str, Tensor]], hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
    with torch.autocast(hidden.device.type, enabled=False):
        weights = {f"layer.{name}": x for name, x in maker().items()}
    return functional_call(layer, weights, (hidden, *args), kwargs)


def _of(numbers: Numbers, key: str) -> dict[str, Tensor]:
    """The numbers of one block."""
    return {name.removeprefix(f"{key} "): x for name, x in numbers.items() if name.startswith(f"{key} ")}
