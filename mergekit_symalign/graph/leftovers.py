"""Stored tensors that a merge does not read: which of them the model does without, and which must not be lost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from mergekit.io.tasks import LoaderCache

from mergekit_symalign.errors import CheckpointError
from mergekit_symalign.graph.opening import opening

if TYPE_CHECKING:
    from mergekit_symalign.graph.checkpoint_checks import Checkpoint

_SHOWN = 3


def unread(checkpoint: Checkpoint, read: set[str], layers: frozenset[int]) -> tuple[str, ...]:
    """The stored tensors that neither the merge reads nor the model that transformers builds from the config.

    Buffers of older versions, copies of tied tensors and layers that no slice takes are not among them.

    Args:
        checkpoint: of one model.
        read: the stored tensors that the merge reads.
        layers: the model's layers that are merged.

    Raises:
        CheckpointError: if the merge would lose a tensor that the model computes with, or one of a merged layer.
    """
    left = sorted({*checkpoint.headers, *checkpoint.unlisted} - read)
    return tuple(name for name in left if _is_unread(checkpoint, name, read, layers))


def shortened(names: Sequence[str]) -> str:
    """A few names, and how many more there are."""
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _is_unread(checkpoint: Checkpoint, name: str, read: set[str], layers: frozenset[int]) -> bool:
    layer, place = _layer(checkpoint, name), checkpoint.names.place(name)
    if _is_old_buffer(checkpoint, name, layer) or _is_in_no_slice(checkpoint, layer, layers):
        return False
    if place is None and layer not in layers:
        return True
    if place is not None and name in checkpoint.headers and _is_copy(checkpoint, name, place.name, read):
        return False
    raise _lost(checkpoint, name, in_layer=layer is not None)


def _layer(checkpoint: Checkpoint, name: str) -> int | None:
    """The layer that a stored tensor belongs to, whether the model knows it or not."""
    place = checkpoint.names.place(name)
    possible = (name, checkpoint.names.prefixed(name)) if place is None else (place.name,)
    return next((layer for layer in map(checkpoint.layout.layer_of, possible) if layer is not None), None)


def _is_old_buffer(checkpoint: Checkpoint, name: str, layer: int | None) -> bool:
    """Whether nobody misses it; transformers passes over weights in silence, too (of layers that predict further
    tokens), and these are missed elsewhere."""
    possible = (name, checkpoint.names.prefixed(name))
    if any(map(checkpoint.layout.is_buffer, possible)):
        return True
    beyond = layer is not None and layer >= checkpoint.layout.layers
    return checkpoint.names.is_left_behind(name) and not (beyond or name.endswith(".weight"))


def _is_in_no_slice(checkpoint: Checkpoint, layer: int | None, merged: frozenset[int]) -> bool:
    return layer is not None and layer < checkpoint.layout.layers and layer not in merged


def _is_copy(checkpoint: Checkpoint, name: str, place: str, read: set[str]) -> bool:
    """Whether the merge reads the same numbers under another name: an older one, or the tensor it is tied to."""
    group = checkpoint.names.tied(place)
    twins = (twin for twin, at in checkpoint.names.places(read).items() if at.name in group and not at.piece)
    return any(are_equal(checkpoint, name, twin) for twin in twins)


def are_equal(checkpoint: Checkpoint, name: str, other: str) -> bool:
    """Whether two stored tensors hold the same numbers."""
    if checkpoint.headers[name] != checkpoint.headers[other]:
        return False
    with opening(str(checkpoint.model)):
        loader = LoaderCache().get(checkpoint.model)
        return torch.equal(loader.get_tensor(name), loader.get_tensor(other))


def _lost(checkpoint: Checkpoint, name: str, *, in_layer: bool) -> CheckpointError:
    where = f"tensor {name} of model {checkpoint.model}"
    if name in checkpoint.unlisted:
        return CheckpointError(
            where,
            "it is in a file of the checkpoint but not in its index, and MergeKit would silently drop it",
            "Save the checkpoint again with save_pretrained, which writes a new index",
        )
    if in_layer:
        return CheckpointError(
            where,
            "it is part of a layer that is merged, but MergeKit's architecture file does not list it and would "
            "silently drop it",
            "The merged model would not compute what these models compute: merge other checkpoints, or teach MergeKit "
            "this architecture",
        )
    return CheckpointError(
        where,
        "the model computes with it, but MergeKit's architecture file does not list it and would silently drop it",
        "Merge the model without this head (MergeKit's override_architecture, for example BertModel), or teach "
        "MergeKit this architecture",
    )
