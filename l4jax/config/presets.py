"""Named architectures: the released models, Behemoth by estimate, and small ones with the true structure."""

import dataclasses
import difflib

from l4jax.config.architecture import Llama4Config, RopeScaling, TextConfig, VisionConfig


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
