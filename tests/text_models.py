"""The text model inside a small vision-language model, as a causal model of its own."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from mergekit_symalign.families.resolve import resolve
from mergekit_symalign.families.wrappers import text_class
from mergekit_symalign.trial.models import class_of

_ELSEWHERE = {"qwen2_5_vl_text": "Qwen2ForCausalLM", "qwen3_vl_moe_text": "Qwen3MoeForCausalLM"}
_OF_THE_CLASS = ("model_type", "architectures", "dtype", "transformers_version", "_name_or_path")


def text_model(outer: PreTrainedModel) -> PreTrainedModel:
    """With the weights that it has inside the outer model, in float64."""
    inner = outer.config.text_config
    kind = class_of(_ELSEWHERE.get(inner.model_type) or text_class(inner))
    values: dict[str, Any] = {key: x for key, x in inner.to_dict().items() if key not in _OF_THE_CLASS}
    tied = {"tie_word_embeddings": outer.config.tie_word_embeddings}
    model: PreTrainedModel = kind._from_config(kind.config_class(**values | tied, architectures=[kind.__name__]))
    state = outer.state_dict()
    model.double().eval().load_state_dict({name: state[inside(outer, name)] for name in model.state_dict()})
    return model


def inside(outer: PreTrainedModel, name: str) -> str:
    """What a tensor of the text model is called inside the outer model."""
    prefix = resolve(outer.config, model="outer").family.prefix
    return prefix + name.removeprefix("model.") if name.startswith("model.") else name
