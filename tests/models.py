"""Small random models of every family, with weights sharp enough that a wrong transform shows."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from mergekit_symalign.families.resolve import resolve
from mergekit_symalign.planting import random_elements, transform
from mergekit_symalign.trial.models import EverythingInFloat64, relative_deviation

__all__ = ["EverythingInFloat64", "relative_deviation"]  # the package's own, for the tests that take them from here

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
ENCODER = {"num_key_value_heads": None, "head_dim": None, "tie_word_embeddings": True}
MOE = {"num_experts": 4, "num_experts_per_tok": 2}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
COHERE_LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]

# Name -> transformers class, what its config has beyond SIZES, and which of SIZES it does not know.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {}),
    "llama-mha": ("LlamaForCausalLM", {"num_key_value_heads": 6, "head_dim": 8}),
    "llama-tied": (
        "LlamaForCausalLM",
        {"tie_word_embeddings": True, "num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 10},
    ),
    "mistral": ("MistralForCausalLM", {"sliding_window": 8}),
    "qwen2": ("Qwen2ForCausalLM", {"num_key_value_heads": 1}),
    "qwen2-tied": ("Qwen2ForCausalLM", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3ForCausalLM", {}),
    "qwen3-mha": ("Qwen3ForCausalLM", {"num_key_value_heads": 6, "head_dim": 12}),
    "granite": (
        "GraniteForCausalLM",
        {"head_dim": 8, "attention_bias": True, "mlp_bias": True, "residual_multiplier": 0.5, "logits_scaling": 2.0},
    ),
    "gemma": ("GemmaForCausalLM", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "gemma2": ("Gemma2ForCausalLM", {"sliding_window": 8, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 16}),
    "gemma3": ("Gemma3ForCausalLM", {"sliding_window": 8, "sliding_window_pattern": 2, "query_pre_attn_scalar": 16}),
    "phi3": ("Phi3ForCausalLM", {"head_dim": None, "pad_token_id": 0}),
    "phi4-mini": ("Phi3ForCausalLM", {"head_dim": None, "pad_token_id": 0, "partial_rotary_factor": 0.75}),
    "olmo2": ("Olmo2ForCausalLM", {"head_dim": None}),
    "smollm3": ("SmolLM3ForCausalLM", {"no_rope_layers": [1, 0, 1], "pad_token_id": 0}),
    "starcoder2": ("Starcoder2ForCausalLM", {"head_dim": None}),
    "cohere2": ("Cohere2ForCausalLM", {"sliding_window": 8, "layer_types": COHERE_LAYERS}),
    "glm4": ("Glm4ForCausalLM", {"pad_token_id": 0, "partial_rotary_factor": 0.5}),
    "stablelm": (
        "StableLmForCausalLM",
        {"head_dim": None, "use_qkv_bias": True, "partial_rotary_factor": 0.5, "num_attention_heads": 4},
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        {
            "n_embd": 48,
            "n_head": 6,
            "n_inner": 80,
            "n_layer": 3,
            "n_positions": 64,
            "tie_word_embeddings": True,
            "head_dim": None,
        },
    ),
    "phi2": ("PhiForCausalLM", {"head_dim": None, "partial_rotary_factor": 0.5}),
    "gpt-neox": ("GPTNeoXForCausalLM", {"num_key_value_heads": None, "head_dim": None, "rotary_pct": 0.5}),
    "cohere": ("CohereForCausalLM", {"head_dim": None, "pad_token_id": 0, "tie_word_embeddings": True}),
    "cohere-qk-norm": (
        "CohereForCausalLM",
        {"head_dim": None, "pad_token_id": 0, "tie_word_embeddings": True, "use_qk_norm": True},
    ),
    "bert": ("BertModel", ENCODER),
    "bert-classifier": ("BertForSequenceClassification", ENCODER),
    "roberta": ("RobertaForMaskedLM", ENCODER | {"hidden_act": "relu"}),
    "distilbert": (
        "DistilBertForMaskedLM",
        ENCODER
        | {"hidden_size": None, "intermediate_size": None, "num_hidden_layers": None, "num_attention_heads": None}
        | {"dim": 48, "hidden_dim": 80, "n_layers": 3, "n_heads": 6},
    ),
    "modernbert": ("ModernBertForMaskedLM", ENCODER | TOKENS | {"local_attention": 8}),
    "deberta-v3": (
        "DebertaV2ForMaskedLM",
        ENCODER
        | {"relative_attention": True, "position_buckets": 8, "norm_rel_ebd": "layer_norm", "share_att_key": True}
        | {"pos_att_type": ["p2c", "c2p"], "position_biased_input": False, "type_vocab_size": 0},
    ),
    "deberta-v2": (
        "DebertaV2Model",
        ENCODER | {"relative_attention": True, "position_buckets": 8, "pos_att_type": ["p2c", "c2p"]},
    ),
    "vit": ("ViTModel", ENCODER | {"vocab_size": None, "image_size": 16, "patch_size": 4}),
    "vit-classifier": (
        "ViTForImageClassification",
        ENCODER | {"vocab_size": None, "image_size": 16, "patch_size": 4, "num_labels": 7},
    ),
    "mixtral": ("MixtralForCausalLM", {"num_local_experts": 4}),
    "qwen3-moe": ("Qwen3MoeForCausalLM", MOE | {"moe_intermediate_size": 24}),
    "olmoe": ("OlmoeForCausalLM", MOE | {"head_dim": None, "intermediate_size": 40}),
}


def make_model(family: str, seed: int, *, class_name: str | None = None, **overrides: object) -> PreTrainedModel:
    """A random model in float64 with sharpened weights, norms and biases away from 1 and 0.

    Args:
        family: of the table above.
        seed: of the weights.
        class_name: another transformers class than the table's, of the same config.
        overrides: of the config.
    """
    class_name, own = class_name or FAMILIES[family][0], FAMILIES[family][1]
    model_type = getattr(transformers, class_name)
    sizes = {key: value for key, value in (SIZES | own | overrides).items() if value is not None}
    model = (
        model_type(model_type.config_class(**sizes, architectures=[class_name], experts_implementation="eager"))
        .double()
        .eval()
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if parameter.ndim >= 2 and "norm" not in name:
                parameter.copy_(noise * 1.5 / parameter.shape[-1] ** 0.5)
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


def planted_twin(model: PreTrainedModel, seed: int = 3) -> PreTrainedModel:
    """The same function in other coordinates: a random symmetry in every block."""
    layout = resolve(model.config, model="m")
    return with_weights(model, transform(model.state_dict(), layout, random_elements(layout, seed)))


def save(model: PreTrainedModel, path: Path, dtype: torch.dtype = torch.float32, **kwargs: object) -> Path:
    """Write a copy of the model in ``dtype``; ``model`` stays as it is."""
    copy = type(model)(model.config).to(dtype)
    copy.load_state_dict(model.state_dict())
    copy.save_pretrained(path, **kwargs)
    return path


@torch.no_grad()
def logits(model: PreTrainedModel, seed: int = 0) -> torch.Tensor:
    """Logits (or last hidden states) on random tokens or images, in the model's dtype."""
    generator = torch.Generator().manual_seed(seed)
    if hasattr(model.config, "image_size"):
        size = (3, model.config.num_channels, model.config.image_size, model.config.image_size)
        inputs = torch.randn(size, generator=generator, dtype=torch.float64).to(model.dtype)
    else:
        inputs = torch.randint(3, model.config.vocab_size, (3, 24), generator=generator)  # 0 to 2 may be special
    with EverythingInFloat64() if model.dtype is torch.float64 else nullcontext():
        return model(inputs)[0]


ROUNDINGS = 4  # of a weight on its way through an alignment: saved, turned, scaled, written


def rounding(model: PreTrainedModel, dtype: torch.dtype = torch.float32) -> float:
    """How far the logits move, in their standard deviations, when every weight is off by that many roundings."""
    noisy = perturbed(model, ROUNDINGS * torch.finfo(dtype).eps, 11).state_dict()
    return relative_deviation(logits(model), logits(with_weights(model, {k: x.float() for k, x in noisy.items()})))


def off_by(out: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """The largest ‖out − wanted‖ / ‖wanted‖ of a tensor, in roundings of float32."""
    norms = (
        torch.linalg.vector_norm(out[name].double() - x.double()) / torch.linalg.vector_norm(x.double())
        for name, x in wanted.items()
    )
    return float(max(norms)) / torch.finfo(torch.float32).eps


def word_tokenizer(size: int, prefix: str = "w") -> PreTrainedTokenizerFast:
    """A tokenizer of whole words: `w7` is token 7."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"{prefix}{i}": i for i in range(3, size)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
