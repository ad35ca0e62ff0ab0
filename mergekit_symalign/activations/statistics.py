"""Cross-covariances of anchor and models, summed batch by batch while the hidden states stream through a layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from mergekit_symalign.activations.runner import LayerRunner, Recorded
from mergekit_symalign.symmetry.by_activations.covariance import Covariance
from mergekit_symalign.symmetry.by_activations.experts import Routing

Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class Stream:
    """One model between two layers.

    Attributes:
        runner: the model.
        weights: of the layer, by their name inside it.
        hidden: of each batch [prompts, tokens, hidden size].
        recorded: the arguments of each batch.
        seen: axes whose covariance with the anchor's is wanted.
    """

    runner: LayerRunner
    weights: Weights
    hidden: Sequence[Tensor]
    recorded: Sequence[Recorded]
    seen: frozenset[str]


@dataclass
class Statistics:
    """What a model and the anchor have in common in one layer.

    Attributes:
        covariances: by axis.
        routing: of the anchor and of the model, if experts are wanted.
    """

    covariances: dict[str, Covariance] = field(default_factory=dict)
    routing: tuple[Routing, Routing] | None = None


@torch.inference_mode()
def run_layer(
    layer: int, anchor: Stream, models: Sequence[Stream], kept: Sequence[Tensor | None]
) -> tuple[list[list[Tensor]], list[Statistics]]:
    """Run a layer of the anchor and of every model, and compare what they compute.

    Products of a batch are taken in the dtype of the hidden states, sums over batches in float64. Padding enters
    nothing; relative positions that are projected like tokens count once.

    Args:
        layer: its index in all of them.
        anchor, models: what runs; the anchor's own ``seen`` holds all models' together.
        kept: of each batch, where among prompts × tokens those are that are no padding; None if all are.

    Returns:
        The hidden states after the layer, of the anchor and each model; and each model's statistics.
    """
    streams = (replace(anchor, seen=frozenset().union(*(m.seen for m in models))), *models)
    hidden: list[list[Tensor]] = [[] for _ in streams]
    routing: list[list[Routing]] = [[] for _ in streams]
    sums = [Statistics() for _ in models]
    for batch, at in enumerate(kept):
        ours: dict[str, Tensor] = {}
        for i, stream in enumerate(streams):
            out, found = stream.runner.run(
                layer, stream.weights, stream.hidden[batch], stream.recorded[batch], stream.seen
            )
            hidden[i].append(out)
            columns = {axis: unpadded(x, at) for axis, x in found.tokens.items() if axis in stream.seen}
            if batch == 0:
                columns |= {axis: torch.cat((columns[axis], x)) for axis, x in found.positions.items()}
            if found.routing is not None:
                routing[i].append(Routing(*(unpadded(x.unsqueeze(0), at) for x in found.routing.tensors())))
            if i == 0:
                ours = columns
            else:
                for axis in columns:
                    _accumulate(sums[i - 1].covariances, axis, ours[axis], columns[axis])
    whole = [Routing.joined(batches) if batches else None for batches in routing]
    for model, theirs in zip(sums, whole[1:], strict=True):
        if whole[0] is not None and theirs is not None:
            model.routing = (whole[0], theirs)
    return hidden, sums


def unpadded(x: Tensor, at: Tensor | None) -> Tensor:
    """The tokens of [prompts, tokens, axis] that are no padding, as [tokens, axis]."""
    x = x.flatten(0, 1)
    return x if at is None else x.index_select(0, at)


def _accumulate(sums: dict[str, Covariance], axis: str, anchor: Tensor, model: Tensor) -> None:
    """Add the products of some tokens, [tokens, axis] each."""
    product = anchor.mT @ model
    squares = [x.double().square().sum(0) for x in (anchor, model)]
    if axis not in sums:
        sums[axis] = Covariance(product.double(), *squares)
    else:
        known = sums[axis]
        for total, more in ((known.cross, product), (known.anchor, squares[0]), (known.model, squares[1])):
            total += more
