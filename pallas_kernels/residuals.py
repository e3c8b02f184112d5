"""Names for what backward passes keep, by which a rematerialisation policy of the caller can ask for it."""

from jax import Array
from jax.ad_checkpoint import checkpoint_name


def name_attention(out: Array, lse: Array) -> tuple[Array, Array]:
    """Returns the results of attention as "attention" and "attention_lse": kept, attention is not computed twice."""
    return checkpoint_name(out, "attention"), checkpoint_name(lse, "attention_lse")
