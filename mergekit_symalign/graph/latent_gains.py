"""Whether a model has the gains that an alignment takes up: latents that rotate leave theirs to what reads them."""

from __future__ import annotations

import torch
from mergekit.architecture import WeightInfo
from mergekit.io.tasks import LoaderCache
from torch import Tensor

from mergekit_symalign.alignment_file import AlignmentFile, block_name
from mergekit_symalign.errors import AlignmentFileError
from mergekit_symalign.families.schema import BlockKind
from mergekit_symalign.graph.checkpoint_checks import Checkpoint
from mergekit_symalign.graph.opening import opening
from mergekit_symalign.symmetry.latent.latents import gains_taken_up

_ROUNDINGS = 2  # of the stored dtype


def require_gains(file: AlignmentFile, checkpoint: Checkpoint, layer: int, *, invert: bool = False) -> None:
    """
    Args:
        file: of an alignment, one that fits the model.
        checkpoint: of the model.
        layer: of it.
        invert: whether the alignment is to be undone.

    Raises:
        AlignmentFileError: if readers of a latent take up other gains than the model has.
    """
    if checkpoint.layout.geometry.latent is None:
        return
    name = block_name(layer, BlockKind.attention.value)
    element = file.element(name)
    for axis, taken in gains_taken_up((element.inverse() if invert else element).actions).items():
        own = _gain(checkpoint, layer, axis)
        off = (own.double() - taken.double()).abs() > _ROUNDINGS * torch.finfo(own.dtype).eps * own.double().abs()
        if bool(off.any()):
            raise AlignmentFileError(
                f"{file.label}, {name}, axis {axis}",
                f"it rotates a latent whose readers take up gains, and {int(off.sum())} of them are not those of model "
                f"{checkpoint.model}",
                "Use the alignment for the model that it was solved for, or solve it with rotation: none",
            )


def _gain(checkpoint: Checkpoint, layer: int, axis: str) -> Tensor:
    """The gains of the norm on a latent, as they are stored."""
    part = next(part for part, spec in checkpoint.layout.parts(layer).items() if spec.axes == (axis,))
    name = checkpoint.layout.name(layer, part)
    with opening(str(checkpoint.model)):
        loader = LoaderCache().get(checkpoint.model)
        found: Tensor = loader.get_tensor(checkpoint.stored_name(WeightInfo(name=name)) or name)
    return found
