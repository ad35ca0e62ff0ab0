"""Stand-ins for classes whose code is on the Hub: a Llama that keeps its tensors as they do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM, PretrainedConfig, PreTrainedModel

State = dict[str, Tensor]


class _OfTheHub(PreTrainedModel):
    """Computes what a Llama of the same weights does.

    Attributes:
        names: parts of its tensors' names -> how Llama calls them.
    """

    names: ClassVar[Mapping[str, str]]

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        same = {key: getattr(config, key) for key in _Config.__annotations__ if "bias" not in key}
        biases = {"attention_bias": config.qkv_bias, "mlp_bias": config.bias}
        self._llama = [LlamaForCausalLM(LlamaConfig(**same, **biases))]  # in a list: no module of this one
        for name, x in self.from_llama(self._llama[0].state_dict()).items():
            _put(self, name, nn.Parameter(x.clone()))
        self.post_init()

    def forward(self, input_ids: Tensor) -> tuple[Tensor]:
        logits = functional_call(self._llama[0], self.to_llama(self.state_dict()), (input_ids,)).logits
        return (logits,)

    def to_llama(self, state: State) -> State:
        return {_renamed(name, self.names): x for name, x in state.items()}

    def from_llama(self, state: State) -> State:
        back = {new: old for old, new in self.names.items()}
        return {_renamed(name, back): x for name, x in state.items()}


class _Config(PretrainedConfig):
    vocab_size: int = 97
    hidden_size: int = 48
    intermediate_size: int = 80
    num_hidden_layers: int = 2
    num_attention_heads: int = 6
    num_key_value_heads: int = 2
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    bias: bool = False


class ExaoneConfig(_Config):
    model_type = "exaone"


class InternLM2Config(_Config):
    model_type = "internlm2"


class InternLM3Config(_Config):
    model_type = "internlm3"
    qkv_bias: bool = True
    bias: bool = True


class ExaoneForCausalLM(_OfTheHub):
    config_class = ExaoneConfig
    names: ClassVar = {
        "transformer.wte.": "model.embed_tokens.",
        "transformer.ln_f.": "model.norm.",
        "transformer.h.": "model.layers.",
        ".attn.attention.out_proj.": ".self_attn.o_proj.",
        ".attn.attention.": ".self_attn.",
        ".ln_1.": ".input_layernorm.",
        ".ln_2.": ".post_attention_layernorm.",
        ".c_fc_0.": ".gate_proj.",
        ".c_fc_1.": ".up_proj.",
        ".c_proj.": ".down_proj.",
    }


class InternLM3ForCausalLM(_OfTheHub):
    config_class = InternLM3Config
    names: ClassVar = {}


class InternLM2ForCausalLM(_OfTheHub):
    """Queries, keys and values are one tensor: for each KV head its queries, then its key and its value."""

    config_class = InternLM2Config
    names: ClassVar = {
        "model.tok_embeddings.": "model.embed_tokens.",
        "output.": "lm_head.",
        ".attention_norm.": ".input_layernorm.",
        ".ffn_norm.": ".post_attention_layernorm.",
        ".attention.wo.": ".self_attn.o_proj.",
        ".feed_forward.w1.": ".mlp.gate_proj.",
        ".feed_forward.w3.": ".mlp.up_proj.",
        ".feed_forward.w2.": ".mlp.down_proj.",
    }

    def to_llama(self, state: State) -> State:
        found = super().to_llama(state)
        for name in [name for name in found if "wqkv" in name]:
            query, key, value = found.pop(name).unflatten(0, (2, -1, 8)).split((3, 1, 1), dim=1)
            for part, x in (("q", query), ("k", key), ("v", value)):
                found[name.replace("attention.wqkv", f"self_attn.{part}_proj")] = x.flatten(0, 2)
        return found

    def from_llama(self, state: State) -> State:
        found = super().from_llama(state)
        for name in [name for name in found if "q_proj" in name]:
            parts = [found.pop(name.replace("q_proj", f"{part}_proj")).unflatten(0, (2, -1, 8)) for part in "qkv"]
            found[name.replace("self_attn.q_proj", "attention.wqkv")] = torch.cat(parts, dim=1).flatten(0, 2)
        return found


CLASSES: tuple[type[_OfTheHub], ...] = (ExaoneForCausalLM, InternLM2ForCausalLM, InternLM3ForCausalLM)


def register() -> None:
    """Let transformers know their configs, as if their code had come with the checkpoints."""
    for kind in CLASSES:
        AutoConfig.register(kind.config_class.model_type, kind.config_class, exist_ok=True)


def hub_model(kind: type[_OfTheHub]) -> PreTrainedModel:
    """In float64, not yet random."""
    return kind(kind.config_class(architectures=[kind.__name__])).double().eval()


def _renamed(name: str, names: Mapping[str, str]) -> str:
    for old, new in names.items():
        name = name.replace(old, new)
    return name


def _put(module: nn.Module, name: str, x: nn.Parameter) -> None:
    *path, last = name.split(".")
    for part in path:
        if not hasattr(module, part):
            module.add_module(part, nn.Module())
        module = getattr(module, part)
    module.register_parameter(last, x)
