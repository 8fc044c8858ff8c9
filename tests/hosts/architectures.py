"""A tiny random model of any architecture that transformers generates text with, by model type.

Sizes are set by the names that configurations share; `DIFFERS` has what an architecture needs beyond that.
"""

from __future__ import annotations

import ast
import copy
import dataclasses
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

LAYERS = 4
LARGEST = 20_000_000  # parameters; more means that a size was missed
# These read images too, and get text alone.
_READERS = {
    "aria",
    "cohere2_vision",
    "cohere_compass",
    "exaone4_5",
    "hyperclovax_vision_v2",
    "idefics",
    "idefics2",
    "internvl",
    "llava",
    "mistral3",
    "paligemma",
    "qwen2_5_vl",
    "qwen2_vl",
    "qwen3_vl",
    "qwen3_vl_moe",
    "smolvlm",
}
TYPES = sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *_READERS} & set(CONFIG_MAPPING))

# Value: the fields that have it.
_SIZES = """
97: vocab_size audio_vocab_size decoder_vocab_size text_vocab_size vocab_size_per_layer_input unpadded_vocab_size
64: hidden_size d_model n_embd dim_model embedding_size word_embed_proj_dim lru_width projection_dim
64: input_embedding_size output_embedding_size embedding_dim emb_dim cross_attention_hidden_size
96: intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim n_inner d_inner dff dim_ff ffn_hidden_size
96: intermediate_size_mlp shared_intermediate_size feed_forward_size dense_intermediate_size
96: prefix_dense_intermediate_size depth_decoder_ffn_dim
32: moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size
32: moe_shared_expert_intermediate_size shared_experts_intermediate_size
4: num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_encoder_layers
4: num_decoder_layers num_blocks depth
8: num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads
8: num_encoder_attention_heads num_decoder_attention_heads attention_heads swa_num_attention_heads
8: head_dim dim_head d_head attention_head_size swa_head_dim global_head_dim kv_channels rotary_dim
8: qk_nope_head_dim qk_rope_head_dim v_head_dim query_pre_attn_scalar hidden_size_per_layer_input
8: linear_key_head_dim linear_value_head_dim linear_head_dim index_head_dim indexer_head_dim
8: mamba_d_state mamba_d_head mamba_head_dim state_size ssm_state_size mamba_chunk_size chunk_size
2: num_key_value_heads num_kv_heads swa_num_key_value_heads index_n_heads indexer_n_heads indexer_kv_heads
2: num_experts_per_tok moe_topk moe_k top_k_experts n_shared_experts num_shared_experts moe_num_shared_experts
2: linear_num_key_heads mamba_n_groups mamba_ngroups n_groups full_attention_interval num_dense_layers
2: first_k_dense_replace altup_num_inputs
4: num_experts n_routed_experts num_local_experts moe_num_experts linear_num_value_heads linear_num_heads
4: laurel_rank mamba_dt_rank time_step_rank mamba_num_heads
16: mamba_n_heads n_mamba_heads sliding_window sliding_window_size attention_window_size window_size
16: local_attention kv_lora_rank q_lora_rank attention_chunk_size
512: max_position_embeddings n_positions n_ctx max_seq_len max_target_positions context_length
1: n_group topk_group bos_token_id decoder_start_token_id
0: pad_token_id
0.3: initializer_range init_std
None: eos_token_id forced_eos_token_id suppress_tokens begin_suppress_tokens
False: tie_word_embeddings
"""
SIZES: dict[str, Any] = {
    name: ast.literal_eval(value)
    for value, names in (line.split(":") for line in _SIZES.split("\n") if line)
    for name in names.split()
}
_ALTERNATING = ["sliding_attention", "full_attention"] * 2
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_MROPE = {**_ROPE, "mrope_section": [2, 1, 1]}
DIFFERS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "blt": {"encoder_hash_byte_group_vocab": 97},
    "cohere_compass_text": {
        "layer_types": _ALTERNATING,
        "rope_parameters": dict.fromkeys(_ALTERNATING, _ROPE),
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 32, "moe_top_k": 2},
    },
    "dots3_note_audio_encoder": {"adapter_input_size": 64},
    "dots3_note_vision_encoder": {"adapter_in_dim": 64},
    "dots3_note_text": {"num_key_value_heads": 8},
    "falcon_h1": {"mamba_d_ssm": 128},
    "gemma3n_text": {
        "intermediate_size": 96,
        "num_kv_shared_layers": 2,
        "activation_sparsity_pattern": [0.0] * LAYERS,
    },
    "gemma4_text": {"global_head_dim": 16, "num_kv_shared_layers": 2},
    "gemma4_unified_text": {"global_head_dim": 16, "num_kv_shared_layers": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "hrm_text": {"initializer_range": 0.1},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "laguna": {"layer_types": _ALTERNATING},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": {"num_layers": 2},
    "mamba2": {"num_heads": 16},
    "mellum": {"layer_types": _ALTERNATING},
    "mimi": {"sliding_window": 16},
    "minimax_m3_vl_text": {
        "layer_types": ["minimax_m3_sparse", "full_attention"] * 2,
        "index_block_size": 4,
        "index_topk_blocks": 2,
    },
    "moshi": {"sliding_window": 16},
    "moshi_depth": {"sliding_window": 16},
    "nemotron_h": {"layers_block_type": ["mamba", "attention", "moe", "attention"]},
    "qwen4_exp_text": {"indexer_budget": 64, "indexer_compress_ratio": 4, "indexer_kv_heads": 1},
    "qwen2_vl_text": {"rope_parameters": _MROPE},
    "qwen2_vl_vision": {"embed_dim": 64},
    "qwen2_5_vl_text": {"rope_parameters": _MROPE},
    "reformer": {"axial_pos_embds": False},
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
}


def tiny_config(config_class: type[PreTrainedConfig], **changes: Any) -> PreTrainedConfig:
    """The configuration of a class with every size that it has made small."""
    default = config_class()
    names = [field.name for field in dataclasses.fields(config_class)]
    values = {name: value for name, value in SIZES.items() if name in names}
    if "layer_types" not in names and "sliding_window" in names:
        values["sliding_window"] = None  # a window would be every layer's
    layers = getattr(default, "num_hidden_layers", None)
    for name in names:
        each = vars(default).get(name)
        if isinstance(each, list | tuple) and len(each) == layers:  # one a layer
            values[name] = _some_of_each(list(each))
    for name in config_class.sub_configs:
        part = getattr(default, name, None)
        if isinstance(part, PreTrainedConfig):
            values[name] = tiny_config(type(part), **DIFFERS.get(part.model_type, {}))
    if "is_decoder" in names:
        values["is_decoder"] = True
    return config_class(**copy.deepcopy({**values, **changes}))


def _some_of_each(kinds: list[Any]) -> list[Any]:
    """As many as the tiny model has layers, all kinds in turn."""
    distinct = [kind for place, kind in enumerate(kinds) if kind not in kinds[:place]]
    return [distinct[place % len(distinct)] for place in range(LAYERS)]


def build(model_type: str, seed: int = 0) -> PreTrainedModel:
    """The tiny random model of a type, in float32 and eval mode."""
    config = tiny_config(CONFIG_MAPPING[model_type], **DIFFERS.get(model_type, {}))
    model_class = _model_class(type(config))
    if not isinstance(config, model_class.config_class):
        config = config.get_text_config(decoder=True)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in model_class(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{size} parameters: some size of its own is missing in DIFFERS")
    torch.manual_seed(seed)
    model = model_class(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() and bool((parameter == parameter.flatten()[0]).all()):
                # Biases, sinks, gates and the like would do nothing.
                parameter.add_(torch.empty_like(parameter).uniform_(-0.3, 0.3))
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def _model_class(config_class: type[PreTrainedConfig]) -> type[PreTrainedModel]:
    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
        if config_class in auto._model_mapping:
            return auto._model_mapping[config_class]
    raise ValueError(f"no model that generates text has a {config_class.__name__}")
