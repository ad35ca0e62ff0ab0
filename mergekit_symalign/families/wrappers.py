"""Models around a text model: the text model's family, with its config and its names elsewhere."""

from __future__ import annotations

from typing import Any

from mergekit_symalign.families.schema import Family, Wrapper


def text_class(config: Any) -> str:
    """The transformers class of a text model inside another model, as a model of its own; by its config."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    model_type = str(getattr(config, "model_type", None))
    return str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type, model_type))


def without_pictures(wrapper: Wrapper) -> Wrapper:
    """The same around nothing but a text model, whose config is the whole config."""
    return wrapper.model_copy(update={"config": "", "passes_through": (), "tensors": {}})


def wrapped(wrapper: Wrapper, text: Family) -> Family:
    """The family of a model around a text model of this family."""
    changes = {
        "name": f"{wrapper.name}-{text.name}",
        "title": f"{wrapper.title} with {text.title}",
        "config": wrapper.config,
        "prefix": wrapper.text,
        "task_heads": {**text.task_heads, **wrapper.tensors},
        "passes_through": wrapper.passes_through,
        "towers": wrapper.towers,
        "stored_prefixes": wrapper.stored_prefixes,
    }
    return text.model_copy(update=changes)
