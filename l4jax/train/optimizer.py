"""The optimizer: AdamW or Muon under a linear warm-up and a cosine, with the gradient clipped."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from l4jax.train.config import OptimizerConfig
from l4jax.train.state import path_name

SPARED = {"embedding", "scale", "bias", "class_embedding", "positional_embedding_vlm", "log_scale"}
"""Names of parameters that are no matrices: weight decay does not pull them to zero."""
MUON_RMS = 0.2
"""Of Muon's updates, as of AdamW's about, so that learning rate and decay mean the same (arXiv 2502.16982)."""


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
    return jax.tree.map_with_path(lambda path, _: not SPARED.intersection(path_name(path).split(".")), params)


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """Multiplies all gradients by `min(1, max_norm / norm)`, with the norm over all of them together; without a finite
    norm they are 0.

    As optax's, but by a product: XLA folds it into what follows, and keeps no second copy of the gradients.
    """

    def update(grads, state, params=None):
        norm = optax.tree.norm(grads)
        factor, finite = jnp.minimum(1.0, max_norm / jnp.maximum(norm, 1e-30)), jnp.isfinite(norm)
        return jax.tree.map(lambda g: jnp.where(finite, g * factor.astype(g.dtype), 0.0), grads), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def make_optimizer(
    config: OptimizerConfig,
    steps: int,
    first_moment_dtype: str = "float32",
    scale_by: Callable[[str, int], optax.GradientTransformation] | None = None,
) -> optax.GradientTransformation:
    """Returns clip -> Adam (or Muon) -> weight decay -> learning rate, for parameters as plain pytrees.

    Args:
        scale_by: MetaP's, `metap.scale_by` with its settings: of the name of a scale and a power.
    """
    learning_rate = learning_rate_schedule(config, steps)
    if config.name == "muon":
        step = optax.contrib.muon(
            learning_rate,
            eps=config.eps,
            weight_decay=config.weight_decay,
            weight_decay_mask=decays,
            mu_dtype=first_moment_dtype,
            adam_b1=config.b1,
            adam_b2=config.b2,
            adam_weight_decay=config.weight_decay,
            muon_weight_dimension_numbers=matrix_axes,
            consistent_rms=MUON_RMS,
        )
        return optax.chain(clip_by_global_norm(config.clip_norm), step)
    parts = [
        optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps, mu_dtype=first_moment_dtype),
        optax.add_decayed_weights(config.weight_decay, decays),
        optax.scale_by_learning_rate(learning_rate),
    ]
    if scale_by is not None:
        parts = [scale_by("eps", -1), parts[0], scale_by("learning_rate", 1), *parts[1:]]
    return optax.chain(clip_by_global_norm(config.clip_norm), *parts)


def matrix_axes(params: Any) -> Any:
    """Returns which axes of each parameter are a matrix's rows and columns for Muon; None for what AdamW takes.

    Heads belong to the outputs of q, k and v and to the inputs of o. Leading axes, of stacked layers and of experts,
    hold a matrix each.
    """

    def axes(path, leaf) -> optax.contrib.MuonDimensionNumbers | None:
        names, last = path_name(path).split("."), leaf.ndim - 1
        if SPARED.intersection(names) or {"lm_head", "router", "patch_embedding"}.intersection(names):
            return None
        if {"q_proj", "k_proj", "v_proj"}.intersection(names):
            return optax.contrib.MuonDimensionNumbers(last - 2, (last - 1, last))
        if "o_proj" in names:
            return optax.contrib.MuonDimensionNumbers((last - 2, last - 1), last)
        return optax.contrib.MuonDimensionNumbers(last - 1, last)

    return jax.tree.map_with_path(axes, params)
