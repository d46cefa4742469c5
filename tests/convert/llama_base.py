"""A Llama of transformers as a GGUF file in float32, as llama.cpp's own converter would write it.

Only what a plain Llama has: no vocabulary (token ids are given), rotary positions of one base.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from torch import Tensor, nn

ENDS = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
PARTS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write_base(model: nn.Module, path: Path) -> Path:
    """Write the file."""
    config: Any = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        if name in ENDS:
            writer.add_tensor(ENDS[name], tensor.float().numpy())
            continue
        _, _, block, rest = name.split(".", 3)
        module, _, kind = rest.rpartition(".")
        part = PARTS[module]
        if part in heads:
            tensor = pairs_of_halves(tensor, heads[part])
        data = np.ascontiguousarray(tensor.float().numpy())
        writer.add_tensor(f"blk.{block}.{part}.{kind}", data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def pairs_of_halves(tensor: Tensor, heads: int) -> Tensor:
    """Slow reference: row j of a head's first half, then row j of its second half, and so on."""
    size = len(tensor) // heads
    order = [
        head * size + half * (size // 2) + j
        for head in range(heads)
        for j in range(size // 2)
        for half in range(2)
    ]
    return tensor[order]
