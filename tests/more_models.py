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
LARGER = {"vision_config": {"image_size": 56}}
IMAGES = {"image_token_index": 90, "tie_word_embeddings": False}
QWEN_TOWER = {"depth": 4, "hidden_size": 32, "num_heads": 4, "intermediate_size": 40, "out_hidden_size": 48}
QWEN_TOWER |= {"patch_size": 14}
QWEN = {"text_config": MROPE, "image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92}
QWEN |= {"tie_word_embeddings": False, "vision_end_token_id": 93}
DEEP = {"deepstack_visual_indexes": [0, 1, 2], "num_position_embeddings": 16}
AUDIO = {"d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 4, "encoder_ffn_dim": 40, "num_mel_bins": 8}
AUDIO |= {"max_source_positions": 16}
VOXTRAL = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 4}
VOXTRAL |= {"num_mel_bins": 8, "max_source_positions": 16}
HEARS = {"audio_token_index": 90} | {"tie_word_embeddings": False}
OVIS = {"hidden_size": 48, "vocab_size": 97, "vision_config": {"vocab_size": 20}}
GEMMA2 = {"model_type": "gemma2"} | SLIDING
SHARED = {"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "n_shared_experts": 1}
SPARSE = {"first_k_dense_replace": 1, "n_group": 2}
MAMBA = {"mamba_n_heads": 4, "mamba_d_state": 8, "mamba_d_head": 24, "mamba_n_groups": 1, "mamba_expand": 2}
DELTA = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
DELTA |= {"layer_types": ["linear_attention", "full_attention"], "partial_rotary_factor": 0.5}
INDEXED = {"index_topk": 6, "index_n_heads": 2, "index_head_dim": 8, "mlp_layer_types": ["dense", "sparse"]}
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
    "gptj": ("GPTJForCausalLM", {"rotary_dim": 4}),
    "codegen": ("CodeGenForCausalLM", {"rotary_dim": 4}),
    "bigcode": ("GPTBigCodeForCausalLM", {"multi_query": True}),
    "bigcode-many": ("GPTBigCodeForCausalLM", {"multi_query": False}),
    "gpt-neo": ("GPTNeoForCausalLM", {"window_size": 8, "attention_types": [[["global", "local"], 1]]}),
    "falcon": ("FalconForCausalLM", {"new_decoder_architecture": True} | UNTIED),
    "jais2": ("Jais2ForCausalLM", {}),
    "xglm": ("XGLMForCausalLM", {}),
    "biogpt": ("BioGptForCausalLM", {}),
    "gpt": ("OpenAIGPTLMHeadModel", {}),
    "neox-japanese": ("GPTNeoXJapaneseForCausalLM", {}),
    "emu3": ("Emu3ForCausalLM", {}),
    "hyperclovax": ("HyperCLOVAXForCausalLM", {"use_post_norm": True}),
    "apertus1.5": ("Apertus1p5TextForCausalLM", {}),
    "modernbert-decoder": ("ModernBertDecoderForCausalLM", SLIDING),
    "qwen2-moe": ("Qwen2MoeForCausalLM", {"shared_expert_intermediate_size": 40}),
    "glm4-moe": ("Glm4MoeForCausalLM", SHARED | {"use_qk_norm": True, "partial_rotary_factor": 0.5}),
    "solar-open": ("SolarOpenForCausalLM", SHARED),
    "qwen3-moe-dense": ("Qwen3MoeForCausalLM", {"mlp_only_layers": [1], "decoder_sparse_step": 1}),
    "mellum": ("MellumForCausalLM", {"mlp_layer_types": ["dense", "sparse"]} | SLIDING),
    "dots1": ("Dots1ForCausalLM", SHARED),
    "exaone-moe": ("ExaoneMoeForCausalLM", SHARED | SLIDING),
    "ernie4.5-moe": ("Ernie4_5_MoeForCausalLM", {"moe_num_shared_experts": 2, "moe_k": 2} | UNTIED),
    "hy-v3": ("HYV3ForCausalLM", {}),
    "hunyuan-moe": ("HunYuanMoEV1ForCausalLM", {"moe_topk": 2}),
    "granitemoe-shared": ("GraniteMoeSharedForCausalLM", {"shared_intermediate_size": 40} | UNTIED),
    "cohere2-moe": ("Cohere2MoeForCausalLM", {"num_shared_experts": 1, "first_k_dense_replace": 1} | UNTIED),
    "flex-olmo": ("FlexOlmoForCausalLM", {}),
    "aria": ("AriaTextForCausalLM", {"moe_topk": 2}),
    "afmoe": ("AfmoeForCausalLM", {"num_dense_layers": 1} | SLIDING),
    "qwen3-next": ("Qwen3NextForCausalLM", DELTA | {"shared_expert_intermediate_size": 40, "mlp_only_layers": [0]}),
    "qwen3.5": ("Qwen3_5ForCausalLM", DELTA | UNTIED),
    "qwen3.5-moe": ("Qwen3_5MoeForCausalLM", DELTA | {"shared_expert_intermediate_size": 40}),
    "llama4": (
        "Llama4ForCausalLM",
        {"moe_layers": [1], "no_rope_layers": [1, 0], "num_experts_per_tok": 1, "attention_chunk_size": 64},
    ),
    "llama4-dense": ("Llama4ForCausalLM", {"moe_layers": [0], "no_rope_layers": [1, 1], "use_qk_norm": False}),
    "nanochat": ("NanoChatForCausalLM", {}),
    "lfm2": ("Lfm2ForCausalLM", {"layer_types": ["conv", "full_attention"]}),
    "lfm2-moe": ("Lfm2MoeForCausalLM", {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1}),
    "bamba": ("BambaForCausalLM", MAMBA | {"attn_layer_indices": [1]}),
    "falcon-h1": ("FalconH1ForCausalLM", MAMBA | {"mamba_d_ssm": 96}),
    "granite4-h": (
        "GraniteMoeHybridForCausalLM",
        MAMBA | UNTIED | {"shared_intermediate_size": 40, "layer_types": ["mamba", "attention"]},
    ),
    "granite4": (
        "GraniteMoeHybridForCausalLM",
        MAMBA
        | {"shared_intermediate_size": 40, "layer_types": ["attention"] * 2}
        | {"num_local_experts": 0, "position_embedding_type": "rope"},
    ),
    "jamba": (
        "JambaForCausalLM",
        {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1}
        | {"mamba_d_state": 4, "use_mamba_kernels": False},
    ),
    "nemotron-h": (
        "NemotronHForCausalLM",
        {"layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"], "moe_intermediate_size": 40}
        | {"moe_shared_expert_intermediate_size": 40, "mamba_num_heads": 4, "mamba_head_dim": 8, "n_groups": 1}
        | {"ssm_state_size": 8, "intermediate_size": 64, "use_mamba_kernels": False},
    ),
    "gpt-oss": ("GptOssForCausalLM", {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}),
    "minimax-m2": ("MiniMaxM2ForCausalLM", {"rotary_dim": 4}),
    "granite-swa": ("GraniteSWAForCausalLM", {"layer_rope_theta": [1e4, 0]} | UNTIED),
    "granitemoe-swa": ("GraniteMoeSWAForCausalLM", {"layer_rope_theta": [1e4, 0]} | UNTIED),
    "bloom": ("BloomForCausalLM", {}),
    "mpt": ("MptForCausalLM", {"max_seq_len": 64}),
    "mpnet": ("MPNetForMaskedLM", {}),
    "mpnet-bare": ("MPNetModel", {}),
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
    "roberta-decoder": ("RobertaForCausalLM", {"is_decoder": True}),
    "bert-decoder": ("BertLMHeadModel", {"is_decoder": True}),
    "data2vec": ("Data2VecTextForMaskedLM", {}),
    "ernie": ("ErnieForMaskedLM", {"use_task_id": True}),
    "layoutlm": ("LayoutLMForMaskedLM", {}),
    "bigbird": ("BigBirdForMaskedLM", {"block_size": 2, "num_random_blocks": 1}),
    "roformer": ("RoFormerForMaskedLM", {"embedding_size": 48}),
    "electra": ("ElectraForMaskedLM", {"embedding_size": 48}),
    "tapas": ("TapasForMaskedLM", {}),
    "rembert": ("RemBertForMaskedLM", {"input_embedding_size": 24, "output_embedding_size": 40}),
    "deberta": ("DebertaForMaskedLM", {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}),
    "megatron-bert": ("MegatronBertForMaskedLM", {}),
    "megatron-labels": ("MegatronBertForSequenceClassification", {}),
    "xlm-roberta-xl": ("XLMRobertaXLForMaskedLM", {}),
    "roberta-prelayernorm": ("RobertaPreLayerNormForMaskedLM", {}),
    "esm1b": ("EsmForMaskedLM", {"position_embedding_type": "absolute"}),
    "esm2": ("EsmForMaskedLM", {"position_embedding_type": "rotary"}),
    "gte": ("GteForMaskedLM", {}),
    "nomic-bert": ("NomicBertForMaskedLM", {}),
    "jina-v3": ("JinaEmbeddingsV3ForMaskedLM", {}),
    "modernbert-bare": ("ModernBertModel", {}),
    "qwen3-embedding": ("Qwen3Model", {}),
    "reward": ("LlamaForSequenceClassification", {}),
    "reranker": ("Qwen3ForSequenceClassification", {}),
    "gemma3-classifier": ("Gemma3TextForSequenceClassification", SLIDING),
    "gpt2-classifier": ("GPT2ForSequenceClassification", {}),
    "gpt2-tokens": ("GPT2ForTokenClassification", {}),
    "neox-tokens": ("GPTNeoXForTokenClassification", {}),
    "bert-choice": ("BertForMultipleChoice", {}),
    "bert-answers": ("BertForQuestionAnswering", {}),
    "bert-words": ("BertForMaskedLM", {}),
    "bert-pretraining": ("BertForPreTraining", {}),
    "bert-next": ("BertForNextSentencePrediction", {}),
    "roberta-answers": ("RobertaForQuestionAnswering", {}),
    "deberta-answers": ("DebertaV2ForQuestionAnswering", {}),
    "electra-found": ("ElectraForPreTraining", {"embedding_size": 48}),
    "distilbert-answers": ("DistilBertForQuestionAnswering", {}),
    "gemma3-vl": (
        "Gemma3ForConditionalGeneration",
        IMAGES | {"mm_tokens_per_image": 1, "vision_config": {"vision_use_head": False}},
    ),
    "mistral3-vl": (
        "Mistral3ForConditionalGeneration",
        IMAGES | {"text_config": {"model_type": "ministral3"}} | LARGER,
    ),
    "paligemma": ("PaliGemmaForConditionalGeneration", IMAGES | {"projection_dim": 48, "text_config": GEMMA2}),
    "internvl": (
        "InternVLForConditionalGeneration",
        IMAGES | {"image_token_id": 90, "text_config": {"model_type": "qwen2"}},
    ),
    "llava": ("LlavaForConditionalGeneration", IMAGES),
    "idefics3": ("Idefics3ForConditionalGeneration", LLAMA | {"scale_factor": 2}),
    "smolvlm": ("SmolVLMForConditionalGeneration", LLAMA | {"scale_factor": 2}),
    "qwen2.5-vl": ("Qwen2_5_VLForConditionalGeneration", QWEN | {"vision_config": QWEN_TOWER | {"window_size": 28}}),
    "qwen3-vl": ("Qwen3VLForConditionalGeneration", QWEN | {"vision_config": QWEN_TOWER | DEEP}),
    "qwen3-vl-moe": ("Qwen3VLMoeForConditionalGeneration", QWEN | {"vision_config": QWEN_TOWER | DEEP}),
    "llava-next-video": ("LlavaNextVideoForConditionalGeneration", IMAGES | {"video_token_index": 91}),
    "video-llava": ("VideoLlavaForConditionalGeneration", IMAGES | {"video_token_index": 91}),
    "vip-llava": ("VipLlavaForConditionalGeneration", IMAGES | {"vision_feature_layers": [-2, -1]}),
    "got-ocr": (
        "GotOcr2ForConditionalGeneration",
        IMAGES | {"text_config": {"model_type": "qwen2"}, "vision_config": {"output_channels": 16, "mlp_dim": 40}},
    ),
    "cohere2-vision": ("Cohere2VisionForConditionalGeneration", IMAGES | {"alignment_intermediate_size": 32}),
    "qwen2-audio": ("Qwen2AudioForConditionalGeneration", HEARS | {"audio_config": AUDIO}),
    "voxtral": ("VoxtralForConditionalGeneration", HEARS | {"audio_config": VOXTRAL}),
    "audio-flamingo": ("AudioFlamingo3ForConditionalGeneration", HEARS | {"audio_config": VOXTRAL}),
    "glm-asr": ("GlmAsrForConditionalGeneration", HEARS | {"audio_config": VOXTRAL}),
    "qwen3-asr": (
        "Qwen3ASRForConditionalGeneration",
        HEARS | {"audio_config": AUDIO | {"output_dim": 48, "downsample_hidden_size": 8}},
    ),
    "hunyuan-vl": (
        "HunYuanVLForConditionalGeneration",
        UNTIED | {"vision_config": {"max_image_size": 28, "text_hidden_size": 48, "out_hidden_size": 48}},
    ),
    "deepseek-vl": ("DeepseekVLForConditionalGeneration", IMAGES),
    "lighton-ocr": ("LightOnOcrForConditionalGeneration", IMAGES),
    "ovis2": ("Ovis2ForConditionalGeneration", IMAGES | OVIS),
    "paddleocr": ("PaddleOCRVLForConditionalGeneration", {"text_config": MROPE | {"use_bias": True}} | UNTIED),
    "videollama3": ("VideoLlama3ForConditionalGeneration", IMAGES),
    "hyperclovax-vl": ("HyperCLOVAXVisionV2ForConditionalGeneration", {"vision_config": QWEN_TOWER} | UNTIED),
    "glm4.6v": ("Glm46VForConditionalGeneration", QWEN | {"vision_config": QWEN_TOWER | {"image_size": 28}}),
    "glm-ocr": ("GlmOcrForConditionalGeneration", QWEN | {"vision_config": QWEN_TOWER}),
    "exaone4.5": ("Exaone4_5_ForConditionalGeneration", UNTIED | {"vision_config": QWEN_TOWER}),
    "qwen3.5-vl": (
        "Qwen3_5ForConditionalGeneration",
        QWEN | {"text_config": DELTA, "vision_config": QWEN_TOWER | {"num_position_embeddings": 16}},
    ),
    "qwen3.5-vl-moe": (
        "Qwen3_5MoeForConditionalGeneration",
        QWEN
        | {"text_config": DELTA | {"shared_expert_intermediate_size": 40}}
        | {"vision_config": QWEN_TOWER | {"num_position_embeddings": 16}},
    ),
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
    "pegasus": ("PegasusForConditionalGeneration", {}),
    "whisper": ("WhisperForConditionalGeneration", WHISPER),
    "whisper-sounds": ("WhisperForAudioClassification", WHISPER),
    "t5": ("T5ForConditionalGeneration", {"feed_forward_proj": "relu"}),
    "flan-t5": ("T5ForConditionalGeneration", GATED | UNTIED),
    "t5-encoder": ("T5EncoderModel", GATED),
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
