"""What a Llama 4 model is: frozen dataclasses, presets, and translation from and to the published config files.

Field names are Hugging Face's (`configuration_llama4.py`). No jax here, so that `l4jax --help` and `inspect` answer
at once.
"""

import dataclasses
import difflib
import json
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAX_LAYERS, MAX_EXPERTS, MAX_WIDTH, MAX_VOCAB = 1024, 4096, 1 << 18, 1 << 22  # larger sizes are a broken file


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's frequency scaling: long wavelengths are divided by `factor`."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """The text decoder."""

    vocab_size: int
    hidden_size: int
    """D, the width of the residual stream."""
    intermediate_size: int
    """F, the width of every expert, routed and shared."""
    intermediate_size_mlp: int
    """The width of the feed-forward network of layers without experts."""
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    num_local_experts: int
    """E, routed experts in each mixture layer; 0 for a dense model."""
    num_experts_per_tok: int = 1
    moe_layers: tuple[int, ...] = ()
    """Layers (counted from 0) with routed experts."""
    no_rope_layers: tuple[int, ...] = ()
    """Per layer 1 for rotary positions, 0 for none. The name is the published one, and backwards."""
    attention_chunk_size: int | None = 8192
    """Tokens; layers with rotary positions attend inside chunks of this length. None: to everything before."""
    rope_theta: float = 500000.0
    rope_scaling: RopeScaling | None = None
    use_qk_norm: bool = True
    attn_temperature_tuning: bool = True
    floor_scale: int = 8192
    attn_scale: float = 0.1
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 131072
    """Tokens; the longest context that the weights were trained for."""
    bos_token_id: int | None = 200000
    eos_token_id: tuple[int, ...] = (200001, 200007, 200008)
    pad_token_id: int | None = 200018

    def __post_init__(self):
        _check_sizes(
            "text_config",
            num_hidden_layers=(self.num_hidden_layers, MAX_LAYERS),
            hidden_size=(self.hidden_size, MAX_WIDTH),
            intermediate_size=(self.intermediate_size, MAX_WIDTH),
            intermediate_size_mlp=(self.intermediate_size_mlp, MAX_WIDTH),
            vocab_size=(self.vocab_size, MAX_VOCAB),
            num_attention_heads=(self.num_attention_heads, MAX_WIDTH),
            num_key_value_heads=(self.num_key_value_heads, MAX_WIDTH),
            head_dim=(self.head_dim, MAX_WIDTH),
        )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} is not divisible by "
                f"num_key_value_heads={self.num_key_value_heads}; every key head serves the same number of query heads"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} is odd; rotary positions turn pairs, so it must be even")
        if len(self.no_rope_layers) != self.num_hidden_layers:
            raise ValueError(
                f"no_rope_layers has {len(self.no_rope_layers)} entries for {self.num_hidden_layers} layers; "
                "give one entry a layer (1 = rotary positions, 0 = none)"
            )
        if self.moe_layers:
            if not 0 < self.num_local_experts <= MAX_EXPERTS:
                raise ValueError(f"num_local_experts={self.num_local_experts} must be in 1..{MAX_EXPERTS}")
            if not 1 <= self.num_experts_per_tok <= self.num_local_experts:
                raise ValueError(
                    f"num_experts_per_tok={self.num_experts_per_tok} must be in 1..{self.num_local_experts}, "
                    "the number of experts"
                )
            if not all(0 <= layer < self.num_hidden_layers for layer in self.moe_layers):
                raise ValueError(f"moe_layers={list(self.moe_layers)} names layers past {self.num_hidden_layers - 1}")
        for name in ("attention_chunk_size", "floor_scale"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name}={value} must be positive")

    def uses_rope(self, layer: int) -> bool:
        """Whether `layer` rotates queries and keys, and so attends inside chunks."""
        return bool(self.no_rope_layers[layer])

    def uses_experts(self, layer: int) -> bool:
        """Whether the feed-forward part of `layer` is a mixture of experts."""
        return layer in self.moe_layers

    @property
    def cycle_length(self) -> int:
        """P, the period of the layer pattern: the smallest number of layers after which the kinds repeat."""
        kinds = [(self.uses_rope(layer), self.uses_experts(layer)) for layer in range(self.num_hidden_layers)]
        return next(p for p in range(1, len(kinds) + 1) if all(k == kinds[i % p] for i, k in enumerate(kinds)))


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """The vision tower, its adapter and the projector into the text width."""

    hidden_size: int = 1408
    image_size: int = 336
    """Side of a tile in pixels."""
    patch_size: int = 14
    num_hidden_layers: int = 34
    num_attention_heads: int = 16
    intermediate_size: int = 5632
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    pixel_shuffle_ratio: float = 0.5
    projector_input_dim: int = 4096
    projector_output_dim: int = 4096
    vision_output_dim: int = 4096

    def __post_init__(self):
        _check_sizes(
            "vision_config",
            num_hidden_layers=(self.num_hidden_layers, MAX_LAYERS),
            hidden_size=(self.hidden_size, MAX_WIDTH),
            intermediate_size=(self.intermediate_size, MAX_WIDTH),
            num_attention_heads=(self.num_attention_heads, MAX_WIDTH),
            image_size=(self.image_size, MAX_WIDTH),
            patch_size=(self.patch_size, MAX_WIDTH),
        )
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size={self.image_size} is not a multiple of patch_size={self.patch_size}")
        if self.head_dim * self.num_attention_heads != self.hidden_size or self.head_dim % 4:
            raise ValueError(
                f"hidden_size={self.hidden_size} over num_attention_heads={self.num_attention_heads} must be a "
                "multiple of 4: half of the rotated pairs belong to the column, half to the row"
            )
        if self.patches_per_side % self.pixels_shuffled:
            raise ValueError(
                f"{self.patches_per_side} patches a side cannot be merged by {self.pixels_shuffled} "
                f"(pixel_shuffle_ratio={self.pixel_shuffle_ratio})"
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def patches_per_side(self) -> int:
        return self.image_size // self.patch_size

    @property
    def pixels_shuffled(self) -> int:
        """How many patches, in each direction, become one token."""
        return round(1 / self.pixel_shuffle_ratio)

    @property
    def tokens_per_tile(self) -> int:
        return (self.patches_per_side // self.pixels_shuffled) ** 2


@dataclass(frozen=True, kw_only=True)
class Llama4Config:
    """A whole model: the text decoder and, if it sees, the vision tower."""

    text_config: TextConfig
    vision_config: VisionConfig | None = None
    image_token_index: int = 200092
    """Id of `<|patch|>`, the token that a row of picture features replaces."""
    boi_token_index: int = 200080
    eoi_token_index: int = 200081

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "Llama4Config":
        """Reads the content of an HF `config.json`, in any spelling that was ever released.

        Raises:
            ValueError: a key that could change the result is not known, or a value is impossible.
        """
        if config.get("model_type") == "llama4_text" or "text_config" not in config:
            return cls(text_config=_text_from_hf(config))
        _refuse_unknown(config, {"text_config", "vision_config", *_TOP_KEYS}, "config.json")
        vision = config.get("vision_config")
        top = {name: int(config[name]) for name in _TOP_KEYS if config.get(name) is not None}
        return cls(
            text_config=_text_from_hf(config["text_config"]),
            vision_config=None if vision is None else _vision_from_hf(vision),
            **top,
        )

    def to_hf(self) -> dict[str, Any]:
        """Returns the content of a `config.json` that transformers loads into the same model."""
        text = _text_to_hf(self.text_config)
        if self.vision_config is None:
            return {"architectures": ["Llama4ForCausalLM"], **text}
        vision = dataclasses.asdict(self.vision_config)
        vision["rope_parameters"] = {"rope_type": "default", "rope_theta": vision.pop("rope_theta")}
        return {
            "architectures": ["Llama4ForConditionalGeneration"],
            "model_type": "llama4",
            "tie_word_embeddings": False,
            **{name: getattr(self, name) for name in _TOP_KEYS},
            "text_config": text,
            "vision_config": {
                "model_type": "llama4_vision_model",
                "hidden_act": "gelu",
                "vision_feature_select_strategy": "default",
                **vision,
            },
        }

    @classmethod
    def from_meta(cls, params: Mapping[str, Any]) -> "Llama4Config":
        """Reads the content of Meta's `params.json`, also when it is nested under `model`."""
        params = params.get("model", params)
        _refuse_unknown(params, _META_KEYS, "params.json")
        text = _text_from_meta(params)
        vision = params.get("vision_args")
        return cls(text_config=text, vision_config=None if vision is None else _vision_from_meta(vision))


def load_config(directory: str | Path) -> Llama4Config:
    """Reads `config.json` (l4jax and HF) or `params.json` (Meta) from a checkpoint directory."""
    directory = Path(directory)
    for name, read in (("config.json", Llama4Config.from_hf), ("params.json", Llama4Config.from_meta)):
        path = directory / name
        if path.is_file():
            try:
                content = json.loads(path.read_text())
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                raise ValueError(f"{path} is not JSON ({error}); fetch it again") from error
            if not isinstance(content, dict):
                raise ValueError(f"{path} holds a {type(content).__name__}, expected an object")
            try:
                return read(content)
            except KeyError as error:
                raise ValueError(f"{path} has no key {error}; fetch it again") from error
    raise FileNotFoundError(
        f"no model in {directory}: expected config.json (HF, l4jax) or params.json (Meta); "
        f"presets are {', '.join(PRESETS)}"
    )


# --- Hugging Face -------------------------------------------------------------------------------------------------

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


def _refuse_unknown(config: Mapping[str, Any], known, where: str) -> None:
    for key, value in config.items():
        if key in _FIXED_KEYS:
            if value not in _FIXED_KEYS[key]:
                raise ValueError(f"{where}: {key}={value!r} is not Llama 4, expected {_FIXED_KEYS[key][0]!r}")
        elif key not in known and key not in _IGNORED_KEYS and value is not None:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys are {', '.join(sorted(known))}"
            raise ValueError(f"{where}: unknown key {key!r}; {hint}")


def _check_sizes(where: str, **sizes: tuple[int, int]) -> None:
    for name, (value, limit) in sizes.items():
        if not isinstance(value, int) or not 0 < value <= limit:
            raise ValueError(f"{where}: {name}={value!r} must be a whole number in 1..{limit}")


def _integers(value, length_limit: int, name: str) -> tuple[int, ...]:
    if not isinstance(value, list | tuple) or len(value) > length_limit:
        raise ValueError(f"text_config: {name} must be a list of at most {length_limit} whole numbers")
    return tuple(int(v) for v in value)


def _text_from_hf(config: Mapping[str, Any]) -> TextConfig:
    where = "text_config"
    _refuse_unknown(config, _TEXT_KEYS, where)
    _check_sizes(where, num_hidden_layers=(config.get("num_hidden_layers"), MAX_LAYERS))
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
    _refuse_unknown(config, _VISION_KEYS, "vision_config")
    fields = {f.name: config[f.name] for f in dataclasses.fields(VisionConfig) if config.get(f.name) is not None}
    rope = config.get("rope_parameters") or {}
    if rope.get("rope_theta") is not None:
        fields["rope_theta"] = rope["rope_theta"]
    return VisionConfig(**fields)


# --- Meta ---------------------------------------------------------------------------------------------------------

_META_KEYS = {
    *("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "vocab_size", "multiple_of", "ffn_dim_multiplier"),
    *("ffn_exp", "norm_eps", "attention_chunk_size", "rope_theta", "use_scaled_rope", "rope_scaling_factor"),
    *("rope_high_freq_factor", "nope_layer_interval", "use_qk_norm", "attn_temperature_tuning", "floor_scale"),
    *("attn_scale", "moe_args", "vision_args", "quantization_args", "lora_args", "max_batch_size", "max_seq_len"),
}


def _text_from_meta(params: Mapping[str, Any]) -> TextConfig:
    _check_sizes("params.json", dim=(params.get("dim"), MAX_WIDTH), n_layers=(params.get("n_layers"), MAX_LAYERS))
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


# --- Presets ------------------------------------------------------------------------------------------------------


def layer_pattern(num_layers: int, *, moe_step: int = 1, nope_interval: int | None = 4) -> dict[str, tuple[int, ...]]:
    """Returns `moe_layers` and `no_rope_layers` for the published patterns. `moe_step` 0: a dense model."""
    return {
        "moe_layers": tuple(range(moe_step - 1, num_layers, moe_step)) if moe_step else (),
        "no_rope_layers": tuple(int(not nope_interval or (i + 1) % nope_interval != 0) for i in range(num_layers)),
    }


_SCOUT = TextConfig(
    vocab_size=202048,
    hidden_size=5120,
    intermediate_size=8192,
    intermediate_size_mlp=16384,
    num_hidden_layers=48,
    num_attention_heads=40,
    num_key_value_heads=8,
    head_dim=128,
    num_local_experts=16,
    rope_scaling=RopeScaling(16.0, 1.0, 1.0, 8192),
    max_position_embeddings=10485760,
    **layer_pattern(48),
)
_MAVERICK = dataclasses.replace(
    _SCOUT,
    num_local_experts=128,
    use_qk_norm=False,
    rope_scaling=None,
    max_position_embeddings=1048576,
    **layer_pattern(48, moe_step=2),
)
_GUARD = dataclasses.replace(
    _SCOUT,
    intermediate_size_mlp=8192,
    num_local_experts=0,
    attention_chunk_size=None,
    rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8192),
    max_position_embeddings=131072,
    **layer_pattern(48, moe_step=0, nope_interval=None),
)


def _behemoth(num_layers: int) -> TextConfig:
    # ESTIMATE: Meta published 288B active and nearly 2T parameters, 16 experts; width and depth are ours, to fit those.
    return dataclasses.replace(
        _SCOUT,
        hidden_size=16384,
        intermediate_size=24576,
        intermediate_size_mlp=49152,
        num_hidden_layers=num_layers,
        num_attention_heads=128,
        **layer_pattern(num_layers),
    )


# The structure of the large models at a size for tests: distinct widths, so that no transposition goes unseen.
_SMALL = dataclasses.replace(
    _SCOUT,
    vocab_size=512,
    hidden_size=64,
    intermediate_size=48,
    intermediate_size_mlp=96,
    num_hidden_layers=8,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    num_local_experts=4,
    rope_scaling=RopeScaling(16.0, 1.0, 1.0, 64),
    attention_chunk_size=8,
    floor_scale=4,
    max_position_embeddings=4096,
    bos_token_id=256,
    eos_token_id=(257, 258, 259),
    pad_token_id=260,
    **layer_pattern(8),
)
_SMALL_VISION = VisionConfig(
    hidden_size=32,
    image_size=56,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=128,
    projector_input_dim=40,
    projector_output_dim=40,
    vision_output_dim=40,
)
# The shapes of the CPU comparison with transformers (scripts/bench_cpu.py).
_MINI = dataclasses.replace(
    _SMALL,
    vocab_size=32768,
    hidden_size=512,
    intermediate_size=1024,
    intermediate_size_mlp=2048,
    num_attention_heads=8,
    head_dim=64,
    num_local_experts=16,
    rope_scaling=None,
    attention_chunk_size=512,
    floor_scale=512,
    max_position_embeddings=1 << 20,
)


def _small(text: TextConfig) -> Llama4Config:
    tokens = {"image_token_index": 271, "boi_token_index": 266, "eoi_token_index": 267}  # of ByteTokenizer
    return Llama4Config(text_config=text, vision_config=_SMALL_VISION, **tokens)


PRESETS: dict[str, Llama4Config] = {
    "scout": Llama4Config(text_config=_SCOUT, vision_config=VisionConfig()),
    "maverick": Llama4Config(text_config=_MAVERICK, vision_config=VisionConfig()),
    "guard-4": Llama4Config(text_config=_GUARD, vision_config=VisionConfig()),
    "behemoth-estimate-94": Llama4Config(text_config=_behemoth(94), vision_config=VisionConfig()),
    "behemoth-estimate-96": Llama4Config(text_config=_behemoth(96), vision_config=VisionConfig()),
    "small-scout": _small(_SMALL),
    "small-maverick": _small(
        dataclasses.replace(
            _SMALL, num_local_experts=8, use_qk_norm=False, rope_scaling=None, **layer_pattern(8, moe_step=2)
        )
    ),
    "small-guard": _small(
        dataclasses.replace(
            _SMALL,
            num_hidden_layers=3,
            num_local_experts=0,
            attention_chunk_size=None,
            rope_scaling=RopeScaling(8.0, 1.0, 4.0, 64),
            **layer_pattern(3, moe_step=0, nope_interval=None),
        )
    ),
    "mini-scout": Llama4Config(text_config=_MINI),
    "mini-maverick": Llama4Config(
        text_config=dataclasses.replace(_MINI, num_local_experts=128, use_qk_norm=False, **layer_pattern(8, moe_step=2))
    ),
}


def preset(name: str) -> Llama4Config:
    """Returns a named architecture.

    Raises:
        ValueError: there is no such preset.
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "choose one of"
        raise ValueError(f"unknown preset {name!r}; {hint} {', '.join(PRESETS)}")
    return PRESETS[name]
