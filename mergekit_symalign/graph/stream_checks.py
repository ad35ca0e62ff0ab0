"""What cannot be combined with a residual stream that is moved, found before anything is computed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from mergekit.architecture import WeightInfo
from mergekit.common import ModelReference
from mergekit.graph import Task

from mergekit_symalign.errors import ConfigError, GeometryError
from mergekit_symalign.graph.models import Models
from mergekit_symalign.graph.planned import Planned, anchor_of, gather_of


def require_one_anchor(planned: Sequence[Planned]) -> None:
    """
    Raises:
        ConfigError: if the models are aligned to their consensus.
    """
    if any(task.parameters["anchor"] == "consensus" for _, task in planned):
        raise ConfigError(
            "parameter residual",
            "a residual stream is aligned towards one anchor, but anchor is consensus: that would take one change of "
            "coordinates for each model that agree around every cycle of models, and none are sought here",
            "Use anchor: base, or residual: none",
        )


def require_equal_layers(weight: WeightInfo, task: Task) -> None:
    """
    Raises:
        ConfigError: if a tensor of the output comes from different layers of the models.
    """
    layers = {info.name: model for model, info in gather_of(task).weight_info.items()}
    if len(layers) > 1:
        (one, a), (other, b) = list(layers.items())[:2]
        raise ConfigError(
            "parameter residual",
            f"tensor {weight.name} pairs different layers ({one} of {a}, {other} of {b}), but the residual stream is "
            "one for all layers of a model, which have to be those of the anchor",
            "Leave residual out where slices pair different layers",
        )


def require_same_shapes(planned: Iterable[Planned], moved: Iterable[ModelReference], models: Models) -> None:
    """Tensors outside the layers may differ in more than what the geometry tells: labels, positions, token types.

    Raises:
        GeometryError: naming a tensor that has other sizes in a model than in the anchor.
    """
    moved = set(moved)
    for weight, task in planned:
        anchor, infos = anchor_of(task), gather_of(task).weight_info
        claim = models.checkpoints[anchor].layout.claim(weight.name)
        if claim is None or "vocabulary" in claim.spec.axes:
            continue
        wanted = models.checkpoints[anchor].stored(infos[anchor])
        for model in moved & infos.keys():
            found = models.checkpoints[model].stored(infos[model])
            if wanted is not None and found is not None and wanted.shape != found.shape:
                sizes = [" x ".join(map(str, header.shape)) for header in (found, wanted)]
                raise GeometryError(
                    f"tensor {infos[model].name} of model {model}",
                    f"it is {sizes[0]}, but {sizes[1]} in the anchor {anchor}, and with residual every tensor of a "
                    "model is compared with the anchor's",
                    "Use models of the same sizes, or residual: none",
                )
