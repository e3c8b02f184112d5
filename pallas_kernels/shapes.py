"""Layer shapes of the Llama 4 family and small ones with the same structure, by name.

Tests, benchmarks and tile tables share them, so that a number always says which shape it belongs to.
"""

from typing import NamedTuple


class TextShape(NamedTuple):
    """Sizes of one text layer, in the letters of the project's legend.

    Attributes:
        hidden_size: D, model width.
        intermediate_size: F, width of one expert.
        num_experts: E.
        num_heads: N, query heads.
        num_kv_heads: K, key/value heads.
        head_dim: H.
        chunk_size: tokens per attention chunk in chunked layers.
    """

    hidden_size: int
    intermediate_size: int
    num_experts: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    chunk_size: int


class VisionShape(NamedTuple):
    """Sizes of one vision layer: X patches (the class token included), heads and head width."""

    num_patches: int
    num_heads: int
    head_dim: int


TEXT_SHAPES = {
    "scout": TextShape(5120, 8192, 16, 40, 8, 128, 8192),
    "maverick": TextShape(5120, 8192, 128, 40, 8, 128, 8192),
    "mini-scout": TextShape(512, 1024, 16, 8, 2, 64, 512),
    "mini-maverick": TextShape(512, 1024, 128, 8, 2, 64, 512),
    "nano-scout": TextShape(64, 96, 4, 4, 2, 16, 32),
    "nano-maverick": TextShape(32, 48, 16, 6, 2, 8, 16),
}

VISION_SHAPES = {
    "llama4-vision": VisionShape(577, 16, 88),
    "nano-vision": VisionShape(37, 4, 8),
}
