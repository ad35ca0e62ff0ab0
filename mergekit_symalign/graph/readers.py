"""What turns inputs into numbers: tokenizers, image processors, and whether a model has a row for each token."""

from __future__ import annotations

from typing import Any

from mergekit.architecture import WeightInfo
from mergekit.common import ModelReference
from mergekit.options import MergeOptions
from transformers import AutoImageProcessor, AutoTokenizer

from mergekit_symalign.activations.calibration import Calibration
from mergekit_symalign.errors import CalibrationError
from mergekit_symalign.families.resolve import lookup
from mergekit_symalign.graph.checkpoint_checks import Checkpoint


def tokenizer_of(model: ModelReference, options: MergeOptions) -> Any:
    """
    Raises:
        CalibrationError: if it cannot be loaded.
    """
    return _loaded(AutoTokenizer, model, options, "its tokenizer cannot be loaded", "tokenizer files")


def image_processor_of(model: ModelReference, options: MergeOptions) -> Any:
    """
    Raises:
        CalibrationError: if it cannot be loaded.
    """
    what, files = "its image processor cannot be loaded", "its preprocessor_config.json"
    return _loaded(AutoImageProcessor, model, options, what, files)


def _loaded(kind: Any, model: ModelReference, options: MergeOptions, what: str, files: str) -> Any:
    try:
        return kind.from_pretrained(
            model.model.path,
            revision=model.model.revision,
            cache_dir=options.transformers_cache,
            trust_remote_code=options.trust_remote_code,
        )
    except Exception as error:  # transformers raises many kinds
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise CalibrationError(f"model {model}", f"{what} ({reason[0]})", f"Put {files} beside its weights") from error


def require_embedded(calibration: Calibration, checkpoint: Checkpoint) -> None:
    """Every token must have its row in the embedding, and a learned position where the model learns them."""
    require_embedded_ids(max(map(max, calibration.sequences)), checkpoint)
    require_positions(max(map(len, calibration.sequences)), checkpoint)


def require_positions(longest: int, checkpoint: Checkpoint) -> None:
    """
    Raises:
        CalibrationError: if a prompt of this many tokens is longer than the model's learned positions.
    """
    layout = checkpoint.layout
    padding = lookup(checkpoint.config, "pad_token_id") or 0
    for name, spec in layout.outside.items():
        header = checkpoint.stored(WeightInfo(name=name))
        if spec.axes[0] != "position" or spec.in_front or header is None:  # in front: relative ones, for any length
            continue
        there = header.shape[0] - (padding + 1 if layout.family.positions_after_padding else 0)
        if longest > there:
            raise CalibrationError(
                f"model {checkpoint.model}",
                f"a prompt has {longest} tokens, but the model has learned positions for {there} only ({name})",
                f"Use at most {there} tokens of each prompt (calibration_sequence_length, --sequence-length), or "
                "shorter prompts",
            )


def require_embedded_ids(largest: int, checkpoint: Checkpoint) -> None:
    """
    Raises:
        CalibrationError: if a token has no row in the embedding.
    """
    for name, spec in checkpoint.layout.outside.items():
        header = checkpoint.stored(WeightInfo(name=name))
        if spec.axes[0] == "vocabulary" and not spec.optional and header is not None:
            rows = header.shape[0]
            if largest >= rows:
                raise CalibrationError(
                    f"model {checkpoint.model}",
                    f"the prompts contain token {largest}, but {name} has only {rows} rows",
                    "Check that the tokenizers belong to these models",
                )
