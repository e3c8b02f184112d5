"""The mixture of experts: a sigmoid router, routed experts, one shared expert.

Only what the router chose is computed: rows are sorted by expert, multiplied group by group, and put back. Nothing is
dropped. The router's score multiplies the expert's *input*, which is not the same as its output, for SwiGLU is not
linear (HF `modeling_llama4.Llama4TextMoe`).
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from l4jax import ops
from l4jax.config import TextConfig
from l4jax.model.linear import Linear, param
from l4jax.model.mlp import MLP


class Experts(nnx.Module):
    """The weights of all experts of one layer, stacked."""

    def __init__(self, num_experts: int, width: int, hidden: int, *, rngs: nnx.Rngs, dtype):
        wide, narrow = (num_experts, width, hidden), (num_experts, hidden, width)
        self.gate_proj = param(rngs, wide, ("expert", "embed", "mlp"), dtype, fan_in=width)
        self.up_proj = param(rngs, wide, ("expert", "embed", "mlp"), dtype, fan_in=width)
        self.down_proj = param(rngs, narrow, ("expert", "mlp", "embed"), dtype, fan_in=hidden)

    def __call__(self, rows_RD: Float[Array, "R D"], group_sizes_E: Int[Array, "E"]) -> Float[Array, "R D"]:
        """Applies expert e to its `group_sizes_E[e]` rows; rows are sorted by expert."""
        hidden_RF = ops.grouped_swiglu(rows_RD, self.gate_proj[...], self.up_proj[...], group_sizes_E)
        return ops.grouped_matmul(hidden_RF, self.down_proj[...], group_sizes_E)


class MixtureOfExperts(nnx.Module):
    def __init__(self, config: TextConfig, *, rngs: nnx.Rngs, dtype):
        width, hidden, num_experts = config.hidden_size, config.intermediate_size, config.num_local_experts
        self.num_experts, self.top_k = num_experts, config.num_experts_per_tok
        self.router = Linear("MD,DE->ME", (width, num_experts), ("embed", None), rngs=rngs, dtype=dtype)
        self.experts = Experts(num_experts, width, hidden, rngs=rngs, dtype=dtype)
        self.shared_expert = MLP(width, hidden, rngs=rngs, dtype=dtype)

    def __call__(
        self, x_MD: Float[Array, "M D"], router_bias_E: Float[Array, "E"] | None = None
    ) -> tuple[Float[Array, "M D"], Int[Array, "E"]]:
        """Returns the layer's output and how many rows each expert took.

        Args:
            x_MD: tokens, flattened.
            router_bias_E: added to the logits for the choice alone, not to the scores (load balance in training).
        """
        logits_ME = self.router(x_MD)
        choice_ME = logits_ME if router_bias_E is None else logits_ME + router_bias_E.astype(logits_ME.dtype)
        _, experts_Mk = jax.lax.top_k(choice_ME, self.top_k)
        # Gathering the chosen logits, where the references scatter -inf, keeps gradients free of NaN.
        chosen_Mk = jnp.take_along_axis(logits_ME, experts_Mk, axis=1)
        scores_Mk = jax.nn.sigmoid(chosen_Mk.astype(jnp.float32)).astype(x_MD.dtype)

        experts_R = experts_Mk.reshape(-1)
        order_R = jnp.argsort(experts_R, stable=True)
        group_sizes_E = jnp.bincount(experts_R, length=self.num_experts)
        rows_RD = x_MD[order_R // self.top_k] * scores_Mk.reshape(-1)[order_R, None]
        rows_RD = self.experts(rows_RD, group_sizes_E)
        routed_MkD = rows_RD[jnp.argsort(order_R)].reshape(-1, self.top_k, x_MD.shape[-1])
        return self.shared_expert(x_MD) + routed_MkD.sum(axis=1), group_sizes_E
