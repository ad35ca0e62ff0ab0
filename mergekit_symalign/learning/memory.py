"""How much memory a descent takes, from sizes alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

_FLOAT = 4  # bytes
_OF_A_LAYER = 17  # tensors [tokens, hidden] that a layer keeps for the way back, without scores (Korthikanti 2022)


@dataclass(frozen=True)
class Sizes:
    """What memory depends on, as counts of numbers.

    Attributes:
        weights: of a model.
        largest: of its largest layer, or of what lies outside the layers.
        learned: numbers of the elements.
        layers, hidden, vocabulary: of the model.
        inputs, length: of a batch.
        checkpoints: whether layers run once more on the way back.
    """

    weights: int
    largest: int
    learned: int
    layers: int
    hidden: int
    vocabulary: int
    inputs: int
    length: int
    checkpoints: bool


@dataclass(frozen=True)
class Needed:
    """Bytes.

    Attributes:
        models: both models, and what is learned with its moments and the best so far.
        merged: weights between the models, with what leads to them and their gradients.
        activations: what one batch keeps for the way back.
    """

    models: int
    merged: int
    activations: int

    @property
    def whole(self) -> int:
        return self.models + self.merged + self.activations


def needed(sizes: Sizes) -> Needed:
    """An estimate: the weights are exact, activations depend on how a model computes."""
    tokens = sizes.inputs * sizes.length
    layer = tokens * _OF_A_LAYER * sizes.hidden
    kept = layer + sizes.layers * tokens * sizes.hidden if sizes.checkpoints else sizes.layers * layer
    logits = 3 * tokens * sizes.vocabulary
    made = sizes.largest if sizes.checkpoints else sizes.weights
    return Needed(
        models=_FLOAT * (2 * sizes.weights + 6 * sizes.learned),
        merged=_FLOAT * (3 * made + 2 * sizes.largest),
        activations=_FLOAT * (kept + logits),
    )


def free_memory(device: torch.device) -> int | None:
    """Bytes that are free where a descent is to run; None if nobody knows."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type != "cpu":
        return None
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text("ascii").splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
