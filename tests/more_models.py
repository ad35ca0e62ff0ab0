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

WHISPER = {"max_source_positions": 12, "max_target_positions": 32, "num_mel_bins": 8}
GATED = {"feed_forward_proj": "gated-gelu"}
SIDES = {"text_config": {"projection_size": 32}}
MORE |= {
    "clip-pictures": ("CLIPVisionModelWithProjection", {}),
    "clip-text": ("CLIPTextModelWithProjection", {}),
    "siglip": ("SiglipModel", SIDES),
    "siglip2": ("Siglip2Model", SIDES),
    "siglip-pictures": ("SiglipVisionModel", {}),
    "siglip2-pictures": ("Siglip2VisionModel", {}),
    "siglip-text": ("SiglipTextModel", {}),
    "siglip-classifier": ("SiglipForImageClassification", {}),
    "dinov2": ("Dinov2Model", {}),
    "dinov2-swiglu": ("Dinov2WithRegistersModel", {"use_swiglu_ffn": True}),
    "dinov2-classifier": ("Dinov2ForImageClassification", {}),
    "dinov2-registers-classifier": ("Dinov2WithRegistersForImageClassification", {}),
    "dinov3": ("DINOv3ViTModel", {"num_register_tokens": 2}),
    "dinov3-gated": ("DINOv3ViTModel", {"use_gated_mlp": True, "hidden_act": "silu"}),
    "bart": ("BartForConditionalGeneration", {}),
    "bart-classifier": ("BartForSequenceClassification", {"num_labels": 3}),
    "mbart": ("MBartForConditionalGeneration", {}),
    "pegasus": ("PegasusForConditionalGeneration", {}),
    "marian": ("MarianMTModel", {"decoder_start_token_id": 0}),
    "m2m100": ("M2M100ForConditionalGeneration", {}),
    "whisper": ("WhisperForConditionalGeneration", WHISPER),
    "whisper-sounds": ("WhisperForAudioClassification", WHISPER),
    "t5": ("T5ForConditionalGeneration", {"feed_forward_proj": "relu"}),
    "flan-t5": ("T5ForConditionalGeneration", GATED | UNTIED),
    "t5-encoder": ("T5EncoderModel", GATED),
    "mt5": ("MT5ForConditionalGeneration", GATED),
    "umt5": ("UMT5ForConditionalGeneration", GATED),
    "umt5-encoder": ("UMT5EncoderModel", GATED),
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
