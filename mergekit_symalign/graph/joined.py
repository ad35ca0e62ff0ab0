"""Tensors that checkpoints store in pieces, joined by MergeKit's own conversion."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from mergekit.architecture.conversion import TensorSource, convert_checkpoint_tensors


def joined(config: Any, pieces: Mapping[str, TensorSource], names: Iterable[str]) -> torch.Tensor | None:
    """The first of these tensors that the pieces give; None if they give none.

    Args:
        config: of the model. MergeKit looks only at its own type; a text model inside it has rules too.
        pieces: stored tensors, or what loads them, by name.
        names: in the model.
    """
    kinds = dict.fromkeys((config.model_type, config.get_text_config().model_type))
    found = (convert_checkpoint_tensors(kind, pieces, name) for kind in kinds for name in names)
    return next((x for x in found if x is not None), None)
