"""The gated feed-forward network of dense layers and of shared experts."""

import jax
from flax import nnx
from jaxtyping import Array, Float

from l4jax.model.linear import Linear


class MLP(nnx.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, width: int, hidden: int, *, rngs: nnx.Rngs, dtype):
        self.gate_proj = Linear("MD,DF->MF", (width, hidden), ("embed", "mlp"), rngs=rngs, dtype=dtype)
        self.up_proj = Linear("MD,DF->MF", (width, hidden), ("embed", "mlp"), rngs=rngs, dtype=dtype)
        self.down_proj = Linear("MF,FD->MD", (hidden, width), ("mlp", "embed"), rngs=rngs, dtype=dtype)

    def __call__(self, x_MD: Float[Array, "M D"]) -> Float[Array, "M D"]:
        return self.down_proj(jax.nn.silu(self.gate_proj(x_MD)) * self.up_proj(x_MD))
