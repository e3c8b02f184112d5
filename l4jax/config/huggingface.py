"""Hugging Face's `config.json`, in any spelling that was ever released, and back."""

import dataclasses
import difflib
import warnings
from collections.abc import Collection, Mapping
from typing import Any

from l4jax.config.architecture import MAX_LAYERS, Llama4Config, RopeScaling, TextConfig, VisionConfig, check_sizes

_TOP_KEYS = ("image_token_index", "boi_token_index", "eoi_token_index")
_TEXT_KEYS = {f.name for f in dataclasses.fields(TextConfig)} | {
    "interleave_moe_layer_step",
    "no_rope_layer_interval",
    "rope_parameters",
}
_VISION_KEYS = {f.name for f in dataclasses.fields(VisionConfig)} | {"rope_parameters"}

# Keys with no effect on the forward pass: bookkeeping of transformers, training leftovers, derived data.
_IGNORED_KEYS = {
    *("architectures", "model_type", "transformers_version", "torch_dtype", "dtype", "_name_or_path", "auto_map"),
    *("_attn_implementation", "_attn_implementation_autoset", "_commit_hash", "_experts_implementation"),
    *("use_cache", "cache_implementation", "initializer_range", "max_length", "min_length", "do_sample", "temperature"),
    *("top_k", "top_p", "typical_p", "num_beams", "num_beam_groups", "diversity_penalty", "early_stopping"),
    *("length_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "repetition_penalty", "bad_words_ids"),
    *("num_return_sequences", "output_scores", "return_dict_in_generate", "forced_bos_token_id", "forced_eos_token_id"),
    *("remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens"),
    *("return_dict", "output_hidden_states", "output_attentions", "torchscript", "use_bfloat16", "pruned_heads"),
    *("chunk_size_feed_forward", "is_encoder_decoder", "is_decoder", "cross_attention_hidden_size", "sep_token_id"),
    *("add_cross_attention", "tie_encoder_decoder", "decoder_start_token_id", "tokenizer_class", "prefix"),
    *("task_specific_params", "problem_type", "finetuning_task", "id2label", "label2id", "tf_legacy_loss"),
    *("for_llm_compressor", "output_router_logits", "router_aux_loss_coef", "router_jitter_noise", "layer_types"),
    *("vision_feature_layer", "vision_feature_select_strategy", "quantization_config", "unsloth_fixed"),
    *("image_token_id", "boi_token_id", "eoi_token_id"),
}

# Keys that the model is built around: any other value would be another model.
_FIXED_KEYS = {
    "hidden_act": ("silu", "gelu"),
    "tie_word_embeddings": (False,),
    "attention_bias": (False,),
    "attention_dropout": (0,),
    "projector_dropout": (0,),
    "multi_modal_projector_bias": (False,),
    "num_channels": (3,),
}


def config_from_hf(config: Mapping[str, Any]) -> Llama4Config:
    """Returns the model of a `config.json`: `Llama4Config.from_hf`."""
    if config.get("model_type") == "llama4_text" or "text_config" not in config:
        return Llama4Config(text_config=_text_from_hf(config))
    refuse_unknown(config, {"text_config", "vision_config", *_TOP_KEYS}, "config.json")
    vision = config.get("vision_config")
    top = {name: int(config[name]) for name in _TOP_KEYS if config.get(name) is not None}
    return Llama4Config(
        text_config=_text_from_hf(config["text_config"]),
        vision_config=None if vision is None else _vision_from_hf(vision),
        **top,
    )


def config_to_hf(config: Llama4Config) -> dict[str, Any]:
    """Returns the content of a `config.json`: `Llama4Config.to_hf`."""
    text = _text_to_hf(config.text_config)
    if config.vision_config is None:
        return {"architectures": ["Llama4ForCausalLM"], **text}
    vision = dataclasses.asdict(config.vision_config)
    vision["rope_parameters"] = {"rope_type": "default", "rope_theta": vision.pop("rope_theta")}
    return {
        "architectures": ["Llama4ForConditionalGeneration"],
        "model_type": "llama4",
        "tie_word_embeddings": False,
        **{name: getattr(config, name) for name in _TOP_KEYS},
        "text_config": text,
        "vision_config": {
            "model_type": "llama4_vision_model",
            "hidden_act": "gelu",
            "vision_feature_select_strategy": "default",
            **vision,
        },
    }


def refuse_unknown(config: Mapping[str, Any], known: Collection[str], where: str) -> None:
    """Checks that every key is known, or is one without effect.

    Raises:
        ValueError: one is neither, or says that this is no Llama 4; the nearest known key is named.
    """
    for key, value in config.items():
        if key in _FIXED_KEYS:
            if value not in _FIXED_KEYS[key]:
                raise ValueError(f"{where}: {key}={value!r} is not Llama 4, expected {_FIXED_KEYS[key][0]!r}")
        elif key not in known and key not in _IGNORED_KEYS and value is not None:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys are {', '.join(sorted(known))}"
            raise ValueError(f"{where}: unknown key {key!r}; {hint}")


def _integers(value, length_limit: int, name: str) -> tuple[int, ...]:
    if not isinstance(value, list | tuple) or len(value) > length_limit:
        raise ValueError(f"text_config: {name} must be a list of at most {length_limit} whole numbers")
    return tuple(int(v) for v in value)


def _text_from_hf(config: Mapping[str, Any]) -> TextConfig:
    where = "text_config"
    refuse_unknown(config, _TEXT_KEYS, where)
    check_sizes(where, num_hidden_layers=(config.get("num_hidden_layers"), MAX_LAYERS))
    required = {f.name for f in dataclasses.fields(TextConfig) if f.default is dataclasses.MISSING}
    if missing := sorted(required - {"num_local_experts"} - set(config)):
        raise ValueError(f"{where}: {', '.join(missing)} must be given")
    num_layers = config["num_hidden_layers"]
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = float(rope.pop("rope_theta", None) or config.get("rope_theta") or TextConfig.rope_theta)

    interval = config.get("no_rope_layer_interval") or 4
    no_rope = config.get("no_rope_layers") or [int((layer + 1) % interval != 0) for layer in range(num_layers)]
    moe_layers = config.get("moe_layers")
    num_experts = config.get("num_local_experts", 16)
    if moe_layers is None:
        step = config.get("interleave_moe_layer_step", 1)
        moe_layers = list(range(step - 1, num_layers, step)) if step and num_experts else []
    eos = config.get("eos_token_id")
    fields = {name: config[name] for name in _SIMPLE_TEXT_KEYS if config.get(name) is not None}
    text = TextConfig(
        **fields,
        num_local_experts=num_experts,
        moe_layers=_integers(moe_layers, num_layers, "moe_layers"),
        no_rope_layers=_integers(no_rope, num_layers, "no_rope_layers"),
        attention_chunk_size=config.get("attention_chunk_size", 8192),
        rope_theta=theta,
        rope_scaling=_rope_scaling_from_hf(rope),
        # Files of April 2025 hold the number 4 here.
        attn_temperature_tuning=bool(config.get("attn_temperature_tuning", True)),
        bos_token_id=config.get("bos_token_id"),
        eos_token_id=() if eos is None else tuple(eos) if isinstance(eos, list | tuple) else (eos,),
        pad_token_id=config.get("pad_token_id"),
    )
    scaling = text.rope_scaling
    if text.num_local_experts == 16 and scaling and (scaling.factor, scaling.high_freq_factor) == (8, 4):
        warnings.warn(
            "rope scaling 8/4 is what Scout's first files said; Meta corrected it to factor 16, high_freq_factor 1 on "
            "2025-04-08. The file is obeyed; fetch config.json again if this is Scout",
            stacklevel=2,
        )
    return text


_SIMPLE_TEXT_KEYS = (
    *("vocab_size", "hidden_size", "intermediate_size", "intermediate_size_mlp", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "num_experts_per_tok", "use_qk_norm"),
    *("floor_scale", "attn_scale", "rms_norm_eps", "max_position_embeddings"),
)


def _rope_scaling_from_hf(rope: Mapping[str, Any]) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default" if not rope else "llama3"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise ValueError(f"text_config: rope_type={kind!r} is not one of Llama 4's: 'default', 'llama3'")
    return RopeScaling(
        factor=float(rope["factor"]),
        low_freq_factor=float(rope["low_freq_factor"]),
        high_freq_factor=float(rope["high_freq_factor"]),
        original_max_position_embeddings=int(rope["original_max_position_embeddings"]),
    )


def _text_to_hf(text: TextConfig) -> dict[str, Any]:
    fields = dataclasses.asdict(text)
    scaling, theta = fields.pop("rope_scaling"), fields.pop("rope_theta")
    rope = {"rope_type": "llama3", **scaling} if scaling else {"rope_type": "default"}
    return {
        "model_type": "llama4_text",
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "attention_bias": False,
        **{name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()},
        # What interleave_moe_layer_step would say is in moe_layers; 0 marks a dense model, as in Guard 4.
        "interleave_moe_layer_step": text.moe_layers[0] + 1 if text.moe_layers else 0,
        "rope_parameters": {"rope_theta": theta, **rope},
    }


def _vision_from_hf(config: Mapping[str, Any]) -> VisionConfig:
    refuse_unknown(config, _VISION_KEYS, "vision_config")
    fields = {f.name: config[f.name] for f in dataclasses.fields(VisionConfig) if config.get(f.name) is not None}
    rope = config.get("rope_parameters") or {}
    if rope.get("rope_theta") is not None:
        fields["rope_theta"] = rope["rope_theta"]
    return VisionConfig(**fields)
