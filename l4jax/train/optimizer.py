"""The optimizer: AdamW under a linear warm-up and a cosine, with the gradient clipped."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from l4jax.train.config import OptimizerConfig


def learning_rate_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Returns the learning rate by step: up from 0 in `warmup_steps`, down along a cosine until `steps`."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.learning_rate,
        warmup_steps=config.warmup_steps,
        decay_steps=max(steps, config.warmup_steps + 1),
        end_value=config.learning_rate * config.final_fraction,
    )


def decays(params: Any) -> Any:
    """Returns a tree of bools: True for matrices, which weight decay pulls to zero; embeddings, norms and biases stay.

    Judged by the name of the parameter, since stacked layers give norm scales a second dimension.
    """
    spared = ("embedding", "scale", "bias", "class_embedding", "positional_embedding_vlm")

    def is_matrix(path, _) -> bool:
        names = {str(getattr(entry, "key", getattr(entry, "name", entry))) for entry in path}
        return not names.intersection(spared)

    return jax.tree_util.tree_map_with_path(is_matrix, params)


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """Multiplies all gradients by `min(1, max_norm / norm)`, with the norm over all of them together.

    As optax's, but by a product: XLA folds it into what follows, and keeps no second copy of the gradients.
    """

    def update(grads, state, params=None):
        factor = jnp.minimum(1.0, max_norm / jnp.maximum(optax.tree.norm(grads), 1e-30))
        return jax.tree.map(lambda g: g * factor.astype(g.dtype), grads), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def make_optimizer(
    config: OptimizerConfig, steps: int, first_moment_dtype: str = "float32"
) -> optax.GradientTransformation:
    """Returns clip -> Adam -> weight decay -> learning rate, for parameters as plain pytrees."""
    return optax.chain(
        clip_by_global_norm(config.clip_norm),
        optax.adamw(
            learning_rate_schedule(config, steps),
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            mu_dtype=first_moment_dtype,
            weight_decay=config.weight_decay,
            mask=decays,
        ),
    )
