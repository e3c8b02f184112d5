"""What a step minimises. Every objective is a function of parameters and rows, and gives a loss and sums to report.

Sums, not means: they are added over microbatches, steps and devices, and divided by their counts when a line of metrics
is written. The first axis of what is counted by token is the bucket: the source of the document, and whether it has
pictures.
"""

from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from l4jax.model.llama4 import Llama4
from l4jax.model.quant import train_in_low_precision
from l4jax.train.balance import balance_loss, z_loss
from l4jax.train.config import ParallelConfig, RouterConfig
from l4jax.train.loss import head_losses, masked_sum

Rows = dict[str, jax.Array]
"""Some rows of a batch (`step.Batch`) with `targets` and `counts` [B, T] and `total` [], the tokens that count in the
whole batch."""
Numbers = dict[str, Any]
"""Arrays that may be added up: `buckets`, sums over the tokens of each bucket [b] by name, `tokens` among them; and
`router_load` [L, E], if there are routers."""


class Objective(Protocol):
    """Loss and numbers of some rows. `fixed` holds arrays that no step changes, such as the weights of a teacher."""

    def __call__(
        self, params: dict[str, Any], rows: Rows, fixed: Any, router_bias: jax.Array, step: jax.Array
    ) -> tuple[Float[Array, ""], Numbers]: ...


class NextToken:
    """Cross entropy of the next token over the tokens that count, and what keeps the router's load even.

    Args:
        graphdef: structure of the model.
        parallel: how it is computed.
        num_sources: of the mixture.
    """

    def __init__(
        self,
        graphdef: nnx.GraphDef,
        parallel: ParallelConfig,
        router: RouterConfig = RouterConfig(),  # noqa: B008, it is frozen
        num_sources: int = 1,
    ):
        self.graphdef, self.parallel, self.router, self.num_sources = graphdef, parallel, router, num_sources

    def __call__(self, params, rows: Rows, fixed, router_bias, step):
        model = computing_model(self.graphdef, params, self.parallel)
        hidden_BTD, routing = self.hidden(model, rows, router_bias)
        loss, numbers = self.token_loss(model, hidden_BTD, rows, fixed, step)
        if routing is not None:
            share = rows["counts"].sum() / rows["total"]  # of the batch that these rows are
            if self.router.balance_loss:
                loss += self.router.balance_loss * balance_loss(routing) * share
            if self.router.z_loss:
                loss += self.router.z_loss * z_loss(routing) * share
            numbers["router_load"] = routing.load
        return loss, numbers

    def hidden(self, model: Llama4, rows: Rows, router_bias):
        """Returns what the head multiplies, and what the routers did."""
        hidden_BTD, _, routing = model.hidden(
            rows["ids"],
            tiles=rows["tiles"],
            positions=rows["positions"],
            segment_ids=rows["segment_ids"],
            router_bias=router_bias,
            remat=self.parallel.remat,
        )
        return hidden_BTD, routing

    def token_loss(self, model: Llama4, hidden_BTD, rows: Rows, fixed, step) -> tuple[Float[Array, ""], Numbers]:
        """Returns the mean loss over `rows["total"]` tokens, and numbers."""
        losses_BT, right_BT = head_losses(hidden_BTD, model.lm_head.kernel[...], rows["targets"])
        loss = masked_sum(losses_BT, rows["counts"]) / rows["total"]
        return loss, self.by_bucket(rows, loss=losses_BT, accuracy=right_BT)

    def by_bucket(self, rows: Rows, **values_BT: Float[Array, "B T"]) -> Numbers:
        """Returns numbers: the sums of values over the tokens that count in each bucket."""
        bucket_BT = 2 * (rows["source_ids"] - 1) + rows["pictures"]
        values_BT |= {"tokens": jnp.ones(bucket_BT.shape, jnp.float32)}
        num_buckets = 2 * self.num_sources
        sums = {name: sum_by(values, rows["counts"], bucket_BT, num_buckets) for name, values in values_BT.items()}
        return {"buckets": sums}


def computing_model(graphdef: nnx.GraphDef, params: dict[str, Any], parallel: ParallelConfig) -> nnx.Module:
    """Returns what trains in the precision in which a run computes."""
    model = nnx.merge(graphdef, jax.tree.map(lambda p: p.astype(parallel.compute_dtype), params))
    return model if parallel.low_precision == "none" else train_in_low_precision(model, parallel.low_precision)


def sum_by(
    values_BT: Float[Array, "B T"], counts_BT: Array, bucket_BT: Int[Array, "B T"], num_buckets: int
) -> Float[Array, "b"]:
    """Returns the sums of the values that count, one for each bucket.

    Comparisons fuse into one pass over the tokens and stay on their devices, as a scatter would not.
    """
    inside = counts_BT & (bucket_BT == jnp.arange(num_buckets)[:, None, None])
    return jnp.where(inside, values_BT, 0.0).sum((1, 2))
