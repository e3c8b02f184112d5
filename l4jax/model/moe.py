"""The mixture of experts: a sigmoid router, routed experts, one shared expert.

Only what the router chose is computed: rows are sorted by expert, multiplied group by group, and put back. Nothing is
dropped; across devices rows travel to their experts and back (`ops/experts.py`). The router's score multiplies the
expert's *input*, which is not the same as its output, for SwiGLU is not linear (HF `modeling_llama4.Llama4TextMoe`).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from l4jax import ops
from l4jax.config import TextConfig
from l4jax.model.linear import Linear, param
from l4jax.model.mlp import MLP


class Routing(NamedTuple):
    """What a router did, for training to balance and to watch; `stack`ed over layers it has a leading L."""

    load: Int[Array, "*L E"]
    """Rows that each expert took."""
    importance: Float[Array, "*L E"]
    """Sum over tokens of each expert's share of the token's scores, float32."""
    z: Float[Array, "*L"]
    """Sum over tokens of the square of the logits' log-sum-exp, float32."""


class Experts(nnx.Module):
    """The weights of all experts of one layer, stacked."""

    def __init__(self, num_experts: int, width: int, hidden: int, *, rngs: nnx.Rngs, dtype):
        wide, narrow = (num_experts, width, hidden), (num_experts, hidden, width)
        self.gate_proj = param(rngs, wide, ("expert", "expert_embed", "expert_mlp"), dtype, fan_in=width)
        self.up_proj = param(rngs, wide, ("expert", "expert_embed", "expert_mlp"), dtype, fan_in=width)
        self.down_proj = param(rngs, narrow, ("expert", "expert_mlp", "expert_embed"), dtype, fan_in=hidden)


class MixtureOfExperts(nnx.Module):
    def __init__(self, config: TextConfig, *, rngs: nnx.Rngs, dtype):
        width, hidden, num_experts = config.hidden_size, config.intermediate_size, config.num_local_experts
        self.num_experts, self.top_k = num_experts, config.num_experts_per_tok
        self.router = Linear("BTD,DE->BTE", (width, num_experts), ("embed", None), rngs=rngs, dtype=dtype)
        self.experts = Experts(num_experts, width, hidden, rngs=rngs, dtype=dtype)
        self.shared_expert = MLP(width, hidden, rngs=rngs, dtype=dtype)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        valid: Bool[Array, "B T"],
        router_bias_E: Float[Array, "E"] | None = None,
        index: int | Int[Array, ""] = 0,
    ) -> tuple[Float[Array, "B T D"], Routing]:
        """Returns the layer's output and what the router did.

        Args:
            x: tokens.
            valid: which of them are not padding; what routed experts say to padding is not computed.
            router_bias_E: added to the logits for the choice alone, not to the scores (load balance in training).
            index: which layer it is among those whose experts are stacked, where they are.
        """
        logits_BTE = self.router(x)
        choice_BTE = logits_BTE if router_bias_E is None else logits_BTE + router_bias_E.astype(logits_BTE.dtype)
        _, experts_BTk = jax.lax.top_k(choice_BTE, self.top_k)
        # Gathering the chosen logits, where the references scatter -inf, keeps gradients free of NaN.
        chosen_BTk = jnp.take_along_axis(logits_BTE, experts_BTk, axis=-1)
        scores_BTk = jax.nn.sigmoid(chosen_BTk.astype(jnp.float32)).astype(x.dtype)
        experts_BTk = jnp.where(valid[..., None], experts_BTk, self.num_experts)
        weights = (self.experts.gate_proj, self.experts.up_proj, self.experts.down_proj)
        weights = [weight.get_value() for weight in weights]
        layer = None if weights[0].ndim == 3 else index
        routed, load_E = ops.routed_experts(x, experts_BTk, scores_BTk, *weights, layer)
        return self.shared_expert(x) + routed, Routing(load_E, *_statistics(logits_BTE, valid))


def _statistics(logits_BTE: Float[Array, "B T E"], valid: Bool[Array, "B T"]):
    logits_BTE = logits_BTE.astype(jnp.float32)
    scores_BTE = jax.nn.sigmoid(logits_BTE)
    shares_BTE = scores_BTE / (scores_BTE.sum(axis=-1, keepdims=True) + 1e-20)
    z_BT = jnp.square(jax.nn.logsumexp(logits_BTE, axis=-1))
    return jnp.where(valid[..., None], shares_BTE, 0.0).sum((0, 1)), jnp.where(valid, z_BT, 0.0).sum()
