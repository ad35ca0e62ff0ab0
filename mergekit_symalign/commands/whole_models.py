"""Models that a command loads as a whole."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from mergekit.common import ModelPath, ModelReference
from mergekit.options import MergeOptions
from transformers.utils import logging as transformers_logging

from mergekit_symalign.errors import ArchitectureError
from mergekit_symalign.families.resolve import lookup
from mergekit_symalign.graph.untie import TIED, untie_config


def load_whole(
    weights: ModelReference,
    options: MergeOptions,
    dtype: torch.dtype,
    *,
    config_of: ModelReference | None = None,
    attention: str | None = None,
) -> Any:
    """A model of transformers, ready to be run.

    Whether the head is the embedding belongs to the weights.

    Args:
        weights: the model.
        options: of MergeKit.
        dtype: in which it computes.
        config_of: the model whose config it gets; None for its own.
        attention: how transformers computes it; None for its own choice.
    """
    config = (config_of or weights).config(trust_remote_code=options.trust_remote_code)
    if not lookup(weights.config(trust_remote_code=options.trust_remote_code), TIED):
        untie_config(config)
    source = with_adapter(weights, options)
    kind = getattr(transformers, config.architectures[0], transformers.AutoModelForCausalLM)
    with silent():
        found = kind.from_pretrained(
            source.path,
            revision=source.revision,
            config=config,
            cache_dir=options.transformers_cache,
            trust_remote_code=options.trust_remote_code,
            dtype=dtype,
            attn_implementation=attention,
        )
    return found.eval().requires_grad_(False).to(options.device)


def with_adapter(model: ModelReference, options: MergeOptions) -> ModelPath:
    """Where the whole model is; one with an adapter is merged with it first."""
    merged = model.merged(
        cache_dir=options.lora_merge_cache,
        trust_remote_code=options.trust_remote_code,
        lora_merge_dtype=options.lora_merge_dtype,
    )
    return merged.model


def has_no_loss(model: str, architecture: str) -> ArchitectureError:
    """Of a model that is asked for its loss on texts."""
    reason = f"{architecture} does not predict the next token, so it has no loss on text"
    return ArchitectureError(f"model {model}", reason, "Compare language models that write text")


@contextmanager
def silent() -> Iterator[None]:
    """Without what transformers says beside errors."""
    shown, verbosity = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if shown:
            transformers_logging.enable_progress_bar()
