"""What every linear layer of a model puts out, summed against the anchor's while the hidden states stream through."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from mergekit_symalign.activations.runner import LayerRunner
from mergekit_symalign.activations.statistics import Stream, unpadded
from mergekit_symalign.families.flow import Place
from mergekit_symalign.fusion.correlations import TokenSums
from mergekit_symalign.symmetry.element import Fused, axis_names, fused_parts

_ADDED = (Place.attention, Place.mlp)


@dataclass
class Outputs:
    """What a layer puts out for one batch.

    Attributes:
        tokens: [prompts, tokens, units], before any activation, by axis (query, key, value, gate, up), and what the
            blocks write to the residual stream (attention, mlp); attended values are what the attention's own output
            projection reads.
        added: what is added to the stream, by place: the same as ``tokens``, or what a norm makes of it.
    """

    tokens: dict[str, Tensor] = field(default_factory=dict)
    added: dict[Place, Tensor] = field(default_factory=dict)


@dataclass
class Compared:
    """What one layer of the anchor and of each model put out.

    Attributes:
        hidden: of the anchor and each model, of each batch, what leaves the layer.
        sums: of each model, by name.
        sizes: mean absolute value of the anchor's stream and of what is added to it, by place.
    """

    hidden: list[list[Tensor]]
    sums: list[dict[str, TokenSums]]
    sizes: dict[Place, float]


@torch.inference_mode()
def run_outputs(
    layer: int,
    anchor: Stream,
    models: Sequence[Stream],
    kept: Sequence[Tensor | None],
    places: Mapping[str, Place],
    *,
    parallel: bool,
) -> Compared:
    """Run a layer of the anchor and of every model, and compare all that its linear layers put out.

    Args:
        layer: its index in all of them.
        anchor, models: what runs.
        kept: of each batch, where among prompts × tokens those are that are no padding; None if all are.
        places: of the layer's tensors in the residual stream.
        parallel: attention and MLP read the same stream.
    """
    found = Compared([[] for _ in (anchor, *models)], [{} for _ in models], {})
    totals: dict[Place, float] = {}
    for batch, at in enumerate(kept):
        ours: dict[str, Tensor] = {}
        for i, stream in enumerate((anchor, *models)):
            hidden, seen = _run(stream, layer, batch, places)
            found.hidden[i].append(hidden)
            tokens = {name: unpadded(x, at) for name, x in seen.tokens.items()}
            if i == 0:
                ours = tokens
                for place, x in _sizes(stream.hidden[batch], seen, parallel=parallel).items():
                    totals[place] = totals.get(place, 0.0) + float(unpadded(x, at).double().abs().sum())
            else:
                sums = found.sums[i - 1]
                sums.update({name: TokenSums.of(ours[name], x, sums.get(name)) for name, x in tokens.items()})
    found.sizes = totals
    return found


@torch.inference_mode()
def compare_streams(anchor: Sequence[Tensor], model: Sequence[Tensor], kept: Sequence[Tensor | None]) -> TokenSums:
    """Sums over the hidden states [prompts, tokens, hidden size] of all batches."""
    sums: TokenSums | None = None
    for a, b, at in zip(anchor, model, kept, strict=True):
        sums = TokenSums.of(unpadded(a, at), unpadded(b, at), sums)
    assert sums is not None
    return sums


def _run(stream: Stream, layer: int, batch: int, places: Mapping[str, Place]) -> tuple[Tensor, Outputs]:
    with _watched(stream.runner.layers[layer], stream.runner, places) as seen:
        hidden = stream.runner.call(layer, stream.weights, stream.hidden[batch], stream.recorded[batch])
    return hidden, seen


def _sizes(entering: Tensor, seen: Outputs, *, parallel: bool) -> dict[Place, Tensor]:
    attention, mlp = seen.added[Place.attention], seen.added[Place.mlp]
    return {
        Place.entering: entering,
        Place.attention: attention,
        Place.middle: entering + attention,
        Place.mlp: attention + mlp if parallel else mlp,
    }


@contextmanager
def _watched(layer: nn.Module, runner: LayerRunner, places: Mapping[str, Place]) -> Iterator[Outputs]:
    """Inside, what the layer's linear layers and the norms behind them put out is noted."""
    found, handles = Outputs(), []
    modules = dict(layer.named_modules())
    for part, spec in runner.layout.inside.items():
        name, _, kind = part.rpartition(".")
        if kind != "weight" or name not in modules:
            continue
        module, axes = modules[name], runner.layout.axes(spec).names
        if len(axes) == 2:
            written, read = reversed(axes) if isinstance(module, Conv1D) else axes
            place = places.get(part) if written == "residual" else None
            handles.append(module.register_forward_hook(_note(found, written, read, place)))
        elif axes == ("residual",) and places[part] in _ADDED:
            handles.append(module.register_forward_hook(_note_added(found, places[part])))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _note(found: Outputs, written: str | Fused, read: str | Fused, place: Place | None) -> Any:
    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if place is not None:
            found.tokens.setdefault(place.value, output)
            found.added.setdefault(place, output)
        else:
            for name, x in _parts(output, written).items():
                found.tokens.setdefault(name, x)  # tokens come first; DeBERTa projects positions after them
        if "attended" in axis_names(read):
            found.tokens.setdefault("attended", args[0])

    return hook


def _note_added(found: Outputs, place: Place) -> Any:
    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        found.added[place] = output

    return hook


def _parts(x: Tensor, axis: str | Fused) -> dict[str, Tensor]:
    return {axis: x} if isinstance(axis, str) else fused_parts(x, x.ndim - 1, axis)
