"""One layer of the text decoder: attention, then a dense network or a mixture of experts, each behind an RMS norm."""

from flax import nnx
from jaxtyping import Array, Float

from l4jax.config import TextConfig
from l4jax.model.attention import Attention, Tokens
from l4jax.model.cache import LayerCache
from l4jax.model.mlp import MLP
from l4jax.model.moe import MixtureOfExperts, Routing
from l4jax.model.norm import RMSNorm
from l4jax.sharding import constrain


class Block(nnx.Module):
    def __init__(self, config: TextConfig, layer: int, *, rngs: nnx.Rngs, dtype):
        width, epsilon = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(width, epsilon, dtype=dtype)
        self.self_attn = Attention(config, use_rope=config.uses_rope(layer), rngs=rngs, dtype=dtype)
        self.post_attention_layernorm = RMSNorm(width, epsilon, dtype=dtype)
        self.has_experts = config.uses_experts(layer)
        if self.has_experts:
            self.feed_forward = MixtureOfExperts(config, rngs=rngs, dtype=dtype)
        else:
            self.feed_forward = MLP(width, config.intermediate_size_mlp, rngs=rngs, dtype=dtype)

    def __call__(
        self, x: Float[Array, "B T D"], tokens: Tokens, cache: LayerCache | None, index, router_bias
    ) -> tuple[Float[Array, "B T D"], LayerCache | None, Routing | None]:
        """Returns the residual stream, the cache, and what the router did (None in a dense layer)."""
        attended, cache = self.self_attn(self.input_layernorm(x), tokens, cache, index)
        x = constrain(x + attended, "batch", "length", None)
        y = self.post_attention_layernorm(x)
        if self.has_experts:
            y, routing = self.feed_forward(y, tokens.valid, router_bias, index)
        else:
            y, routing = self.feed_forward(y), None
        return constrain(x + y, "batch", "length", None), cache, routing
