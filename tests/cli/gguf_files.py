"""A tiny model as a GGUF file."""

from __future__ import annotations

from pathlib import Path

import gguf
import torch
from tokenizers import pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

POSITIONS = 128
# Bytes and merges, for GGUF wants some; the end comes before them.
TOKENS = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "ab", "cd"]


def tiny_llama() -> LlamaForCausalLM:
    """Random weights that float16 holds exactly, wide enough to tell one from another."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1 + len(TOKENS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=POSITIONS,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config).half().float().eval()


def write_gguf(file: Path, end: str = "<|endoftext|>") -> LlamaForCausalLM:
    """Write the tiny model as llama.cpp's converter would, in float32, and give it back."""
    model = tiny_llama()
    config, writer = model.config, gguf.GGUFWriter(file, "llama")
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([end, *TOKENS])
    writer.add_token_types([gguf.TokenType.CONTROL] + [gguf.TokenType.NORMAL] * len(TOKENS))
    writer.add_token_merges(["a b", "c d"])
    writer.add_eos_token_id(0)
    writer.add_bos_token_id(0)  # transformers 5.16 wants one
    writer.add_add_bos_token(False)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, value in model.state_dict().items():
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        turned = heads.get(name.split(".")[-2])
        if turned:  # llama.cpp rotates neighbours, transformers halves
            halves = value.reshape(turned, 2, value.shape[0] // turned // 2, value.shape[1])
            value = halves.swapaxes(1, 2).reshape(value.shape)
        stored = names.get_name(name, try_suffixes=(".weight",))
        assert stored is not None, name
        writer.add_tensor(stored, value.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model
