"""Small models of the classes that are not in `models.FAMILIES`: what their configs need beside their sizes."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from mergekit_symalign.families.known import _by_class, _wrapper_by_class, family_around
from mergekit_symalign.families.schema import Family
from mergekit_symalign.trial.models import class_of, randomise, small_model

SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
LLAMA = {"text_config": {"model_type": "llama"}, "image_token_id": 90, "tie_word_embeddings": False}
IMAGES = {"image_token_index": 90, "tie_word_embeddings": False}
QWEN_TOWER = {"depth": 4, "hidden_size": 32, "num_heads": 4, "intermediate_size": 40, "out_hidden_size": 48}
QWEN_TOWER |= {"patch_size": 14}
QWEN = {"text_config": MROPE, "image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92}
QWEN |= {"tie_word_embeddings": False, "vision_end_token_id": 93}
DEEP = {"deepstack_visual_indexes": [0, 1, 2], "num_position_embeddings": 16}
GEMMA2 = {"model_type": "gemma2"} | SLIDING
SPARSE = {"first_k_dense_replace": 1, "n_group": 2}
INDEXED = {"index_topk": 6, "index_n_heads": 2, "index_head_dim": 8, "mlp_layer_types": ["dense", "sparse"]}
SHARED = {"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "intermediate_size": 64}
UNTIED = {"tie_word_embeddings": False}

# Name -> transformers class, and its config beyond the sizes.
MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "ministral": ("MinistralForCausalLM", {"sliding_window": 8}),
    "ministral3": ("Ministral3ForCausalLM", {}),
    "cwm": ("CwmForCausalLM", SLIDING),
    "olmo": ("OlmoForCausalLM", {}),
    "olmo3": ("Olmo3ForCausalLM", SLIDING),
    "exaone4": ("Exaone4ForCausalLM", {"sliding_window": None, "layer_types": ["full_attention"] * 2} | UNTIED),
    "exaone4-hybrid": ("Exaone4ForCausalLM", SLIDING | UNTIED),
    "glm": ("GlmForCausalLM", {"attention_bias": True}),
    "seed-oss": ("SeedOssForCausalLM", {"attention_bias": True, "attention_out_bias": False}),
    "ernie4.5": ("Ernie4_5ForCausalLM", {"use_bias": True} | UNTIED),
    "helium": ("HeliumForCausalLM", {}),
    "eurobert": ("EuroBertForMaskedLM", UNTIED),
    "hunyuan": ("HunYuanDenseV1ForCausalLM", UNTIED),
    "apertus": ("ApertusForCausalLM", {}),
    "arcee": ("ArceeForCausalLM", {}),
    "nemotron": ("NemotronForCausalLM", {"partial_rotary_factor": 0.5}),
    "phimoe": ("PhimoeForCausalLM", {"attention_bias": True, "lm_head_bias": True}),
    "granitemoe": ("GraniteMoeForCausalLM", UNTIED),
    "vaultgemma": ("VaultGemmaForCausalLM", SLIDING | UNTIED),
    "opt": ("OPTForCausalLM", {"word_embed_proj_dim": 48, "tie_word_embeddings": True}),
    "qwen2-moe": ("Qwen2MoeForCausalLM", {"shared_expert_intermediate_size": 40}),
    "glm4-moe": ("Glm4MoeForCausalLM", SHARED | {"use_qk_norm": True, "partial_rotary_factor": 0.5}),
    "solar-open": ("SolarOpenForCausalLM", SHARED),
    "minimax-m2": ("MiniMaxM2ForCausalLM", {"rotary_dim": 4}),
    "minicpm3": ("MiniCPM3ForCausalLM", {"attention_bias": True} | UNTIED),
    "youtu": ("YoutuForCausalLM", UNTIED | {"pad_token_id": None}),
    "deepseek-v2": ("DeepseekV2ForCausalLM", SPARSE | {"topk_method": "group_limited_greedy"}),
    "deepseek-v2-lite": ("DeepseekV2ForCausalLM", SPARSE | {"q_lora_rank": None, "n_group": 1}),
    "deepseek-v3": ("DeepseekV3ForCausalLM", SPARSE | {"attention_bias": True}),
    "deepseek-v3-halves": ("DeepseekV3ForCausalLM", SPARSE | {"rope_interleave": False, "q_lora_rank": None}),
    "mistral4": ("Mistral4ForCausalLM", SPARSE),
    "glm4.7-flash": ("Glm4MoeLiteForCausalLM", {}),
    "deepseek-v3.2": ("DeepseekV32ForCausalLM", INDEXED),
    "glm5": ("GlmMoeDsaForCausalLM", INDEXED | {"indexer_types": ["full", "shared"]}),
    "axk1": ("AXK1ForCausalLM", {"mlp_layer_types": ["dense", "sparse"]}),
    "xlm-roberta": ("XLMRobertaModel", {}),
    "camembert": ("CamembertForMaskedLM", {}),
    "modernbert-bare": ("ModernBertModel", {}),
    "qwen3-embedding": ("Qwen3Model", {}),
    "reward": ("LlamaForSequenceClassification", {}),
    "reranker": ("Qwen3ForSequenceClassification", {}),
    "gemma3-classifier": ("Gemma3TextForSequenceClassification", SLIDING),
    "gpt2-classifier": ("GPT2ForSequenceClassification", {}),
    "gpt2-tokens": ("GPT2ForTokenClassification", {}),
    "neox-tokens": ("GPTNeoXForTokenClassification", {}),
    "bert-choice": ("BertForMultipleChoice", {}),
    "distilbert-answers": ("DistilBertForQuestionAnswering", {}),
    "gemma3-vl": (
        "Gemma3ForConditionalGeneration",
        IMAGES | {"mm_tokens_per_image": 1, "vision_config": {"vision_use_head": False}},
    ),
    "mistral3-vl": ("Mistral3ForConditionalGeneration", IMAGES | {"text_config": {"model_type": "ministral3"}}),
    "paligemma": ("PaliGemmaForConditionalGeneration", IMAGES | {"projection_dim": 48, "text_config": GEMMA2}),
    "internvl": ("InternVLForConditionalGeneration", IMAGES | {"text_config": {"model_type": "qwen2"}}),
    "llava": ("LlavaForConditionalGeneration", IMAGES),
    "idefics3": ("Idefics3ForConditionalGeneration", LLAMA | {"scale_factor": 2}),
    "smolvlm": ("SmolVLMForConditionalGeneration", LLAMA | {"scale_factor": 2}),
    "qwen2.5-vl": ("Qwen2_5_VLForConditionalGeneration", QWEN | {"vision_config": QWEN_TOWER | {"window_size": 28}}),
    "qwen3-vl": ("Qwen3VLForConditionalGeneration", QWEN | {"vision_config": QWEN_TOWER | DEEP}),
    "qwen3-vl-moe": ("Qwen3VLMoeForConditionalGeneration", QWEN | {"vision_config": QWEN_TOWER | DEEP}),
    "glm4v": ("Glm4vForConditionalGeneration", QWEN | {"vision_config": QWEN_TOWER | {"image_size": 28}}),
}


def family_for(class_name: str) -> Family:
    """By the class's default config."""
    wrapper = _wrapper_by_class().get(class_name)
    if wrapper is None:
        return _by_class()[class_name]
    return family_around(wrapper, class_of(class_name).config_class(), class_name)


def more_model(name: str, seed: int = 0) -> PreTrainedModel:
    """A random model of the table above, in float64."""
    class_name, settings = MORE[name]
    return randomise(small_model(class_name, family_for(class_name), settings), seed)
