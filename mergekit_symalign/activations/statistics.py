"""Cross-covariances of anchor and models, summed batch by batch while the hidden states stream through a layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from mergekit_symalign.activations.runner import Activations, LayerRunner, Recorded
from mergekit_symalign.families.schema import BlockKind, StreamNorm
from mergekit_symalign.symmetry.by_activations.covariance import Covariance
from mergekit_symalign.symmetry.by_activations.experts import Routing
from mergekit_symalign.symmetry.residual.by_activations import SeenStream, unit_rows
from mergekit_symalign.symmetry.residual.kinds import STREAM

Weights = Mapping[str, Tensor]
LEAVING = "leaving"  # seen besides the axes of the layer: the residual stream that leaves it


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
        stream: the residual stream at the layer's norms, if axis ``residual`` is wanted.
    """

    covariances: dict[str, Covariance] = field(default_factory=dict)
    routing: tuple[Routing, Routing] | None = None
    stream: SeenStream | None = None

    def add_streams(self, anchor: Sequence[Tensor], model: Sequence[Tensor]) -> None:
        """Count in some tokens at several norms, both `unit_rows`."""
        for a, b in zip(anchor, model, strict=True):
            more = SeenStream.of_rows(a, b)
            self.stream = more if self.stream is None else self.stream + more


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
        our_stream: list[Tensor] = []
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
            places = _stream_places(stream, stream.hidden[batch], found, out)
            at_norms = [unit_rows(unpadded(x, at), centred=_centred(stream)) for x in places]
            if i == 0:
                ours, our_stream = columns, at_norms
            else:
                for axis in columns:
                    _accumulate(sums[i - 1].covariances, axis, ours[axis], columns[axis])
                if at_norms:
                    sums[i - 1].add_streams(our_stream, at_norms)
    whole = [Routing.joined(batches) if batches else None for batches in routing]
    for model, theirs in zip(sums, whole[1:], strict=True):
        if whole[0] is not None and theirs is not None:
            model.routing = (whole[0], theirs)
    return hidden, sums


def _stream_places(stream: Stream, entering: Tensor, found: Activations, leaving: Tensor) -> list[Tensor]:
    """The residual stream where a layer's norms read it [prompts, tokens, hidden size] each.

    What enters the layer counts in any case: behind a norm of the layer below it (BERT), or where this layer's norms
    read only what is added (OLMo 2), no norm reads it. What leaves the last layer is what the last norm reads.
    """
    if STREAM not in stream.seen:
        return []
    normed = [x for part, x in found.normed.items() if not _reads_entering(stream.runner, part)]
    return [entering, *normed, *([leaving] if LEAVING in stream.seen else [])]


def _reads_entering(runner: LayerRunner, gain: str) -> bool:
    """Whether a norm reads what enters the layer."""
    inside = runner.layout.inside
    return any(inside[name].block is BlockKind.attention for name in inside[gain].read_by if name in inside)


def _centred(stream: Stream) -> bool:
    return stream.runner.layout.family.stream.norm is StreamNorm.layer


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
