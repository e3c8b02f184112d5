"""The vision tower: a transformer over the patches of each tile, a pixel shuffle, and an adapter.

Tiles never see one another. The class token comes last, rotary positions are two-dimensional (column first, counted
from 1), and the adapter ends in a second GELU (HF `Llama4VisionModel`).
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from l4jax import ops
from l4jax.config import VisionConfig
from l4jax.model.linear import Linear, param
from l4jax.model.norm import LayerNorm
from l4jax.model.rope import rotate, vision_angles
from l4jax.model.stack import Stack
from l4jax.sharding import constrain


def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The exact GELU, by the error function."""
    return jax.nn.gelu(x, approximate=False)


def patchify(tiles: Float[Array, "n 3 S S"], patch_size: int) -> Float[Array, "n X f"]:
    """Returns flat patches, row-major; inside a patch the channel is slowest, then the row, then the column."""
    n, channels, side, _ = tiles.shape
    grid = side // patch_size
    patches = tiles.reshape(n, channels, grid, patch_size, grid, patch_size).transpose(0, 2, 4, 1, 3, 5)
    return patches.reshape(n, grid * grid, channels * patch_size * patch_size)


def pixel_shuffle(x: Float[Array, "n X D"], factor: int) -> Float[Array, "n x d"]:
    """Merges `factor` x `factor` neighbouring patches into one token; channels order as (row, column, feature)."""
    n, num_patches, width = x.shape
    side = round(num_patches**0.5)
    x = x.reshape(n, side // factor, factor, side // factor, factor, width).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(n, num_patches // factor**2, width * factor**2)


class VisionAttention(nnx.Module):
    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs, dtype):
        width, shape = config.hidden_size, (config.hidden_size, config.num_attention_heads, config.head_dim)

        def project():
            axes = ("embed", "heads", None)
            return Linear("BXD,DNH->BXNH", shape, axes, use_bias=True, rngs=rngs, dtype=dtype)

        self.q_proj, self.k_proj, self.v_proj = project(), project(), project()
        out = (*shape[1:], width)
        self.o_proj = Linear("BXNH,NHD->BXD", out, ("heads", None, "embed"), use_bias=True, rngs=rngs, dtype=dtype)

    def __call__(self, x: Float[Array, "B X D"], cos, sin) -> Float[Array, "B X D"]:
        q, k, v = (constrain(p(x), "tile", None, "heads", None) for p in (self.q_proj, self.k_proj, self.v_proj))
        return self.o_proj(ops.full_attention(rotate(q, cos, sin), rotate(k, cos, sin), v))


class VisionMLP(nnx.Module):
    def __init__(self, widths: tuple[int, int, int], *, use_bias: bool, rngs: nnx.Rngs, dtype):
        self.fc1 = Linear("BXD,DF->BXF", widths[:2], ("embed", "vision_mlp"), use_bias=use_bias, rngs=rngs, dtype=dtype)
        self.fc2 = Linear("BXF,FD->BXD", widths[1:], ("vision_mlp", "embed"), use_bias=use_bias, rngs=rngs, dtype=dtype)

    def __call__(self, x: Float[Array, "B X D"]) -> Float[Array, "B X d"]:
        return self.fc2(constrain(gelu(self.fc1(x)), "tile", None, "vision_mlp"))


class VisionBlock(nnx.Module):
    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs, dtype):
        width = config.hidden_size
        self.input_layernorm = LayerNorm(width, config.norm_eps, dtype=dtype)
        self.self_attn = VisionAttention(config, rngs=rngs, dtype=dtype)
        self.post_attention_layernorm = LayerNorm(width, config.norm_eps, dtype=dtype)
        self.mlp = VisionMLP((width, config.intermediate_size, width), use_bias=True, rngs=rngs, dtype=dtype)

    def __call__(self, x: Float[Array, "B X D"], cos, sin) -> Float[Array, "B X D"]:
        x = constrain(x + self.self_attn(self.input_layernorm(x), cos, sin), "tile", None, None)
        return constrain(x + self.mlp(self.post_attention_layernorm(x)), "tile", None, None)


class VisionAdapter(nnx.Module):
    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs, dtype):
        shuffled = config.hidden_size * config.pixels_shuffled**2
        widths = (shuffled, config.projector_input_dim, config.projector_output_dim)
        self.factor = config.pixels_shuffled
        self.mlp = VisionMLP(widths, use_bias=False, rngs=rngs, dtype=dtype)

    def __call__(self, x: Float[Array, "n X D"]) -> Float[Array, "n x d"]:
        return gelu(self.mlp(pixel_shuffle(x, self.factor)))


class VisionModel(nnx.Module):
    def __init__(self, config: VisionConfig, *, scan: bool, rngs: nnx.Rngs, dtype):
        width, num_patches = config.hidden_size, config.patches_per_side**2
        pixels = 3 * config.patch_size**2
        self.config = config
        self.patch_embedding = Linear("BXI,ID->BXD", (pixels, width), (None, "embed"), rngs=rngs, dtype=dtype)
        self.class_embedding = param(rngs, (width,), ("embed",), dtype, fan_in=width)
        self.positional_embedding_vlm = param(rngs, (num_patches + 1, width), (None, "embed"), dtype, fan_in=width)
        self.layernorm_pre = LayerNorm(width, config.norm_eps, dtype=dtype)
        self.layernorm_post = LayerNorm(width, config.norm_eps, dtype=dtype)

        def make_block(_, rngs):
            return VisionBlock(config, rngs=rngs, dtype=dtype)

        self.layers = Stack(make_block, config.num_hidden_layers, 1, scan=scan, rngs=rngs)
        self.vision_adapter = VisionAdapter(config, rngs=rngs, dtype=dtype)

    def __call__(self, tiles: Float[Array, "n 3 S S"], remat: str = "none") -> Float[Array, "n x d"]:
        """Returns `tokens_per_tile` feature rows a tile; `tiles` holds pixels in [-1, 1]. `remat`: see `Llama4`."""
        tiles = constrain(tiles.astype(self.class_embedding.dtype), "tile", None, None, None)
        patches = patchify(tiles, self.config.patch_size)
        x = self.patch_embedding(patches)
        last = jnp.broadcast_to(self.class_embedding[...], (x.shape[0], 1, x.shape[2]))
        x = jnp.concatenate([x, last], axis=1) + self.positional_embedding_vlm[...]
        angles = vision_angles(self.config)[None]
        cos, sin = jnp.cos(angles), jnp.sin(angles)

        def apply(block, x, state, index, _):
            return block(x, cos, sin), state, None

        x, _, _ = self.layers(apply, self.layernorm_pre(x), remat=remat)
        return self.vision_adapter(self.layernorm_post(x)[:, :-1])
