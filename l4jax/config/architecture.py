"""What a Llama 4 model is: frozen dataclasses, checked when they are made.

Field names are Hugging Face's (`configuration_llama4.py`). The formats of published files know these
classes, so that methods import them when they are called.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MAX_LAYERS, MAX_EXPERTS, MAX_WIDTH, MAX_VOCAB = 1024, 4096, 1 << 18, 1 << 22  # larger sizes are a broken file


def check_sizes(where: str, **sizes: tuple[int, int]) -> None:
    """Checks that each `name=(value, limit)` is a whole number in 1..limit.

    Raises:
        ValueError: one is not.
    """
    for name, (value, limit) in sizes.items():
        if not isinstance(value, int) or not 0 < value <= limit:
            raise ValueError(f"{where}: {name}={value!r} must be a whole number in 1..{limit}")


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
        check_sizes(
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
        check_sizes(
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
        from l4jax.config.huggingface import config_from_hf

        return config_from_hf(config)

    def to_hf(self) -> dict[str, Any]:
        """Returns the content of a `config.json` that transformers loads into the same model."""
        from l4jax.config.huggingface import config_to_hf

        return config_to_hf(self)

    @classmethod
    def from_meta(cls, params: Mapping[str, Any]) -> "Llama4Config":
        """Reads the content of Meta's `params.json`, also when it is nested under `model`."""
        from l4jax.config.meta import config_from_meta

        return config_from_meta(params)
