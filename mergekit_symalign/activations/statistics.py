"""Cross-covariances of anchor and models, summed batch by batch while the hidden states stream through a layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_symalign.activations.runner import LayerRunner, Recorded
from mergekit_symalign.symmetry.covariance import Covariance

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


@torch.inference_mode()
def run_layer(
    layer: int, anchor: Stream, models: Sequence[Stream], valid: Sequence[Tensor]
) -> tuple[list[list[Tensor]], list[dict[str, Covariance]]]:
    """Run a layer of the anchor and of every model, and compare what they compute.

    Products of a batch are taken in the dtype of the hidden states, sums over batches in float64. Padding enters
    nothing.

    Args:
        layer: its index in all of them.
        anchor, models: what runs; the anchor's own ``seen`` is that of all models together.
        valid: of each batch, which tokens are no padding [prompts, tokens].

    Returns:
        The hidden states behind the layer, of the anchor and each model; and each model's covariances by axis.
    """
    hidden: list[list[Tensor]] = [[] for _ in (anchor, *models)]
    sums: list[dict[str, Covariance]] = [{} for _ in models]
    for batch, tokens in enumerate(valid):
        at = torch.nonzero(tokens.flatten()).flatten()

        def run(stream: Stream, seen: frozenset[str]) -> tuple[Tensor, dict[str, Tensor]]:
            out, found = stream.runner.run(layer, stream.weights, stream.hidden[batch], stream.recorded[batch], seen)  # noqa: B023
            return out, {axis: x.flatten(0, 1).index_select(0, at) for axis, x in found.items()}  # noqa: B023

        out, ours = run(anchor, frozenset().union(*(m.seen for m in models)))
        hidden[0].append(out)
        for i, model in enumerate(models):
            out, theirs = run(model, model.seen)
            hidden[i + 1].append(out)
            for axis in sorted(model.seen):
                _accumulate(sums[i], axis, ours[axis], theirs[axis])
    return hidden, sums


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
