"""Small random models of every family, with weights sharp enough that a wrong transform shows."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

SIZES = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}

FAMILIES: dict[str, tuple[type, type[PreTrainedModel], dict]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "llama-mha": (LlamaConfig, LlamaForCausalLM, {"num_key_value_heads": 6, "head_dim": 8}),
    "llama-tied": (
        LlamaConfig,
        LlamaForCausalLM,
        {"tie_word_embeddings": True, "num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 10},
    ),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": 8}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {"num_key_value_heads": 1}),
    "qwen2-tied": (Qwen2Config, Qwen2ForCausalLM, {"tie_word_embeddings": True}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {}),
    "qwen3-mha": (Qwen3Config, Qwen3ForCausalLM, {"num_key_value_heads": 6, "head_dim": 12}),
}


def make_model(family: str, seed: int, **overrides: object) -> PreTrainedModel:
    """A random model in float64 with sharpened weights, norms and biases away from 1 and 0."""
    config_type, model_type, own = FAMILIES[family]
    config = config_type(**(SIZES | own | overrides), architectures=[model_type.__name__])
    generator = torch.Generator().manual_seed(seed)
    model = model_type(config).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if parameter.ndim == 2:
                parameter.copy_(noise * 1.5 / parameter.shape[1] ** 0.5)
            elif name.endswith("bias"):
                parameter.copy_(0.5 * noise)
            else:
                parameter.copy_(1 + 0.3 * noise)
    return model


def perturbed(model: PreTrainedModel, relative: float, seed: int) -> PreTrainedModel:
    """A sibling: every weight moved by noise of this size relative to the tensor's own."""
    generator = torch.Generator().manual_seed(seed)
    copy = type(model)(model.config).double().eval()
    copy.load_state_dict(model.state_dict())
    with torch.no_grad():
        for parameter in copy.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(noise * relative * parameter.std())
    return copy


def with_weights(model: PreTrainedModel, state: dict[str, torch.Tensor]) -> PreTrainedModel:
    """A model of the same config with other weights."""
    copy = type(model)(model.config).to(next(iter(state.values())).dtype).eval()
    copy.load_state_dict(state)
    return copy


def save(model: PreTrainedModel, path: Path, dtype: torch.dtype = torch.float32, **kwargs: object) -> Path:
    """Write a copy of the model in ``dtype``; ``model`` stays as it is."""
    copy = type(model)(model.config).to(dtype)
    copy.load_state_dict(model.state_dict())
    copy.save_pretrained(path, **kwargs)
    return path


@torch.no_grad()
def logits(model: PreTrainedModel, seed: int = 0) -> torch.Tensor:
    """Logits on random tokens, [batch, sequence, vocabulary], in the model's dtype."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(model.config.vocab_size, (3, 24), generator=generator)
    return model(tokens).logits


def relative_deviation(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference, in standard deviations of ``a``."""
    return float((a.double() - b.double()).abs().max() / a.double().std())
