"""The gated feed-forward network of dense layers and of shared experts."""

import jax
from flax import nnx
from jaxtyping import Array, Float

from l4jax.model.linear import Linear
from l4jax.sharding import constrain


class MLP(nnx.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, width: int, hidden: int, *, rngs: nnx.Rngs, dtype):
        self.gate_proj = Linear("BTD,DF->BTF", (width, hidden), ("embed", "mlp"), rngs=rngs, dtype=dtype)
        self.up_proj = Linear("BTD,DF->BTF", (width, hidden), ("embed", "mlp"), rngs=rngs, dtype=dtype)
        self.down_proj = Linear("BTF,FD->BTD", (hidden, width), ("mlp", "embed"), rngs=rngs, dtype=dtype)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        hidden = jax.nn.silu(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(constrain(hidden, "dense_batch", "length", "mlp"))
