"""Meta's `params.json`."""

import math
from collections.abc import Mapping
from typing import Any

from l4jax.config.architecture import (
    MAX_LAYERS,
    MAX_WIDTH,
    Llama4Config,
    RopeScaling,
    TextConfig,
    VisionConfig,
    check_sizes,
)
from l4jax.config.huggingface import refuse_unknown

_META_KEYS = {
    *("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "vocab_size", "multiple_of", "ffn_dim_multiplier"),
    *("ffn_exp", "norm_eps", "attention_chunk_size", "rope_theta", "use_scaled_rope", "rope_scaling_factor"),
    *("rope_high_freq_factor", "nope_layer_interval", "use_qk_norm", "attn_temperature_tuning", "floor_scale"),
    *("attn_scale", "moe_args", "vision_args", "quantization_args", "lora_args", "max_batch_size", "max_seq_len"),
}


def config_from_meta(params: Mapping[str, Any]) -> Llama4Config:
    """Returns the model of a `params.json`: `Llama4Config.from_meta`."""
    params = params.get("model", params)
    refuse_unknown(params, _META_KEYS, "params.json")
    text = _text_from_meta(params)
    vision = params.get("vision_args")
    return Llama4Config(text_config=text, vision_config=None if vision is None else _vision_from_meta(vision))


def _text_from_meta(params: Mapping[str, Any]) -> TextConfig:
    check_sizes("params.json", dim=(params.get("dim"), MAX_WIDTH), n_layers=(params.get("n_layers"), MAX_LAYERS))
    width, num_layers, multiple = params["dim"], params["n_layers"], params.get("multiple_of", 256)
    # The width formulas of Meta's `ffn.py` and `moe.py`; every division truncates, as there.
    dense = int((params.get("ffn_dim_multiplier") or 1.0) * int(2 * (params.get("ffn_exp") or 4) * width / 3))
    moe = params.get("moe_args") or {}
    step = moe.get("interleave_moe_layer_step", 1)
    num_experts = max(moe.get("num_experts", 0), 0)
    expert = dense
    if moe.get("auto_scale_F", True) and moe:
        expert = int(dense / (moe.get("capacity_factor", 1.0) + moe.get("top_k", 1)))
    nope = params.get("nope_layer_interval")
    scaling = None
    if params.get("use_scaled_rope"):
        high = float(params.get("rope_high_freq_factor") or 1)
        scaling = RopeScaling(float(params.get("rope_scaling_factor") or 16), 1.0, high, 8192)
    return TextConfig(
        vocab_size=params["vocab_size"],
        hidden_size=width,
        intermediate_size=_round_up(expert, multiple),
        intermediate_size_mlp=_round_up(dense, multiple),
        num_hidden_layers=num_layers,
        num_attention_heads=params["n_heads"],
        num_key_value_heads=params.get("n_kv_heads") or params["n_heads"],
        head_dim=params.get("head_dim") or width // params["n_heads"],
        num_local_experts=num_experts,
        num_experts_per_tok=moe.get("top_k", 1),
        moe_layers=tuple(range(step - 1, num_layers, step)) if num_experts and step else (),
        no_rope_layers=tuple(int(not nope or (layer + 1) % nope != 0) for layer in range(num_layers)),
        attention_chunk_size=params.get("attention_chunk_size"),
        rope_theta=float(params.get("rope_theta", 500000.0)),
        rope_scaling=scaling,
        use_qk_norm=params.get("use_qk_norm", False),
        # DEVIATION: Meta's code leaves this to the caller, off by default. HF and every server have it on; it has no
        # effect before position 8191.
        attn_temperature_tuning=True,
        floor_scale=int(params.get("floor_scale", 8192)),
        attn_scale=params.get("attn_scale", 0.1),
        rms_norm_eps=params.get("norm_eps", 1e-5),
    )


def _vision_from_meta(vision: Mapping[str, Any]) -> VisionConfig:
    return VisionConfig(
        hidden_size=vision["dim"],
        image_size=vision["image_size"]["height"],
        patch_size=vision["patch_size"]["height"],
        num_hidden_layers=vision["n_layers"],
        num_attention_heads=vision["n_heads"],
        intermediate_size=int(vision["dim"] * vision["mlp_ratio"]),
        pixel_shuffle_ratio=vision["pixel_shuffle_ratio"],
        projector_input_dim=vision["output_dim"],
        projector_output_dim=vision["output_dim"],
        vision_output_dim=vision["output_dim"],
    )


def _round_up(value: int, multiple: int) -> int:
    return math.ceil(value / multiple) * multiple
