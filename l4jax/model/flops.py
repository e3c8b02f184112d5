"""What the model asks for, counted: parameters that a token meets, and FLOPs; nothing made twice, nothing padded."""

import numpy as np

from l4jax.config import Llama4Config


def matmul_parameters(config: Llama4Config) -> int:
    """Returns the parameters that a text token is multiplied with: the active ones without the embedding."""
    text = config.text_config
    width = text.hidden_size
    attention = 2 * width * (text.num_attention_heads + text.num_key_value_heads) * text.head_dim
    expert, num_moe = 3 * width * text.intermediate_size, len(text.moe_layers)
    dense = (text.num_hidden_layers - num_moe) * 3 * width * text.intermediate_size_mlp
    moe = num_moe * ((text.num_experts_per_tok + 1) * expert + width * text.num_local_experts)
    return text.num_hidden_layers * attention + dense + moe + width * text.vocab_size


def attention_flops(config: Llama4Config, start: int, stop: int) -> float:
    """Returns the FLOPs of scores and weighted sums for tokens at positions `start..stop-1` of one sequence."""
    text, total = config.text_config, 0.0
    positions = np.arange(start, stop, dtype=np.float64) if stop - start < 1 << 20 else None
    for layer in range(text.num_hidden_layers):
        chunk = text.attention_chunk_size if text.uses_rope(layer) else None
        if positions is not None:
            seen = (positions + 1 if chunk is None else positions % chunk + 1).sum()
        else:
            seen = (stop - start) * ((start + stop + 1) / 2 if chunk is None else (chunk + 1) / 2)
        total += 4 * text.num_attention_heads * text.head_dim * float(seen)
    return total


def training_flops(config: Llama4Config, rows: int, length: int) -> float:
    """Returns the FLOPs of a training step on full rows of text: forward, and twice that backward."""
    return 3 * rows * (2 * matmul_parameters(config) * length + attention_flops(config, 0, length))
