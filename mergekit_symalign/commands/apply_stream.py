"""What ``apply`` needs for files that move the residual stream: the tensors, and whose norms the result gets."""

from __future__ import annotations

from dataclasses import dataclass

from mergekit.common import ModelReference
from mergekit.options import MergeOptions

from mergekit_symalign.alignment_file import AlignmentFile
from mergekit_symalign.alignments.fit import STREAM_BLOCK, require_fitting_stream
from mergekit_symalign.errors import ConfigError
from mergekit_symalign.families.stream import residual_kind, ties_embeddings
from mergekit_symalign.graph.alignments import sizes_of
from mergekit_symalign.graph.checkpoint_checks import Checkpoint
from mergekit_symalign.graph.fingerprint import fingerprint_of
from mergekit_symalign.graph.plain_merge import resolve_stored
from mergekit_symalign.graph.stream_alone import StreamAlone
from mergekit_symalign.graph.untie import UNTIE


@dataclass(frozen=True)
class Others:
    """The other models of an alignment: a rotated stream takes norms from one of them.

    Attributes:
        anchor: whose norms the aligned model gets.
        original: the model that was aligned, whose norms the inverse gives back.
    """

    anchor: ModelReference | None = None
    original: ModelReference | None = None


def stream_alone(
    file: AlignmentFile, checkpoint: Checkpoint, others: Others, options: MergeOptions, *, invert: bool
) -> StreamAlone | None:
    """What moves the residual stream of a model; None if the file does not.

    Raises:
        ConfigError: if the norms of another model are needed, and it was not given.
        AlignmentFileError: if the file's element is no symmetry of the model, or another model is not the file's.
    """
    anchor = None if others.anchor is None else opened(others.anchor, file, options)
    original = None if others.original is None else opened(others.original, file, options)
    if anchor is not None:
        file.require_anchor(str(anchor.model), fingerprint_of(anchor.model))
    if original is not None:
        file.require_model(str(original.model), fingerprint_of(original.model))
    if STREAM_BLOCK not in file.blocks:
        return None
    parted = bool(file.settings_of(STREAM_BLOCK).get(UNTIE))
    tied = ties_embeddings(checkpoint.config, checkpoint.layout) and not parted
    kind = residual_kind(checkpoint.layout, tied, require_fitting_stream(file, checkpoint.layout, tied))
    if not kind.rotates:
        return StreamAlone(checkpoint, kind, untied=parted)
    norms = original if invert else anchor
    if norms is None:
        raise _without_norms(file, invert=invert)
    return StreamAlone(checkpoint, kind, norms, untied=parted)


def opened(model: ModelReference, file: AlignmentFile, options: MergeOptions) -> Checkpoint:
    """A model's checkpoint.

    Raises:
        OtherModelsError: if it is of another family or size than the file.
    """
    config = model.config(trust_remote_code=options.trust_remote_code)
    checkpoint = Checkpoint.open(model, config, resolve_stored(config, model))
    file.require_family(checkpoint.layout.family.name, sizes_of(checkpoint), str(model))
    return checkpoint


def _without_norms(file: AlignmentFile, *, invert: bool) -> ConfigError:
    if invert:
        reason = f"it rotates the residual stream, and the result gets the norms that {file.origin.model} has"
        return ConfigError(file.label, reason, "Name that model: --norms-of MODEL")
    reason = f"it rotates the residual stream, and the result gets the norms of the anchor, {file.origin.anchor}"
    return ConfigError(file.label, reason, "Name the anchor: --anchor ANCHOR")
