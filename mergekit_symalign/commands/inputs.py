"""What two models are compared on: prompts, or random tokens or images."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from mergekit.options import MergeOptions
from torch import Tensor

from mergekit_symalign.activations.calibration import Calibration, calibrate
from mergekit_symalign.activations.defaults import DEFAULT_PROMPTS
from mergekit_symalign.activations.images import in_batches, patches_of
from mergekit_symalign.activations.runner import Batch
from mergekit_symalign.commands.models import StoredModel
from mergekit_symalign.errors import CalibrationError
from mergekit_symalign.graph.readers import require_embedded, tokenizer_of

RANDOM_LENGTH = 64  # tokens of each random prompt
_SEED = 0


def reads_text(model: StoredModel) -> bool:
    return any("vocabulary" in spec.axes for spec in model.checkpoint.layout.outside.values())


def inputs_for(
    model: StoredModel, prompts: Path | None, tokens: int, options: MergeOptions, *, random: bool
) -> list[Batch]:
    """The batches on which a model and another one are compared.

    Raises:
        CalibrationError: if there are no usable prompts and no random ones are asked for.
    """
    if random:
        batches = list(_random_tokens(model, tokens) if reads_text(model) else _random_images(model, tokens))
    elif reads_text(model):
        batches = list(_prompts(model, prompts, tokens, options).batches())
    else:
        raise CalibrationError(f"model {model.name}", "it does not read text", "Use --random for random images")
    return [type(b)(b.ids.to(model.device), b.valid.to(model.device)) for b in batches]


def _prompts(model: StoredModel, prompts: Path | None, tokens: int, options: MergeOptions) -> Calibration:
    try:
        tokenizer = tokenizer_of(model.checkpoint.model, options)
    except CalibrationError as error:
        raise CalibrationError(error.where, error.reason, f"{error.remedy}, or use --random") from error
    found = calibrate(prompts or DEFAULT_PROMPTS, tokenizer, {}, tokens=tokens)
    require_embedded(found, model.checkpoint)
    return found


def _random_tokens(model: StoredModel, tokens: int) -> Iterator[Batch]:
    rows, left = model.runner.model.get_input_embeddings().weight.shape[0], tokens
    generator = torch.Generator().manual_seed(_SEED)
    sequences: list[tuple[int, ...]] = []
    while left > 0:
        ids: Tensor = torch.randint(rows, (min(left, RANDOM_LENGTH),), generator=generator)
        sequences.append(tuple(ids.tolist()))
        left -= len(ids)
    return Calibration(tuple(sequences)).batches()


def _random_images(model: StoredModel, tokens: int) -> Iterator[Batch]:
    config = model.runner.model.config
    patches = patches_of(config)
    count = max(1, -(-tokens // patches))
    generator = torch.Generator().manual_seed(_SEED)
    size = (count, config.num_channels, config.image_size, config.image_size)
    yield from in_batches(torch.randn(size, generator=generator), patches, max(1, 4096 // patches))
