"""From logits to the next token: penalty, temperature, top-k, top-p, min-p, each row by options and a seed of its own.

Names and order are those of transformers' `generate`. Options are arrays, so one compiled step serves every mixture of
them; nothing is sorted: what top-k and top-p keep lies above one threshold, found by bisection over the bits of a
float32. A token depends on the seed, the options and the logits of its row, never on the rows beside it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from l4jax.inference.options import SamplingOptions


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RowOptions:
    """The options that sampling needs on the device, one entry a row."""

    temperature: Float[Array, " B"]
    top_p: Float[Array, " B"]
    top_k: Int[Array, " B"]
    min_p: Float[Array, " B"]
    repetition_penalty: Float[Array, " B"]
    seed: UInt32[Array, " B"]

    @classmethod
    def of(cls, rows: Sequence[SamplingOptions]) -> "RowOptions":
        """Returns numpy arrays of the options of each row; every row must have a seed."""

        def column(name, dtype):
            return np.array([getattr(row, name) for row in rows], dtype)

        floats = {n: column(n, np.float32) for n in ("temperature", "top_p", "min_p", "repetition_penalty")}
        return cls(**floats, top_k=column("top_k", np.int32), seed=column("seed", np.uint32))


def sample(
    logits: Float[Array, "B V"], seen: Bool[Array, "B V"], options: RowOptions, steps: Int[Array, " B"]
) -> Int[Array, " B"]:
    """Returns the next token of each row.

    Args:
        logits: float32.
        seen: which tokens the prompt and the answer so far hold.
        options: of each row.
        steps: how many tokens each row has drawn before; with the seed they make the random numbers.
    """
    logits = apply_repetition_penalty(logits, seen, options.repetition_penalty)
    greedy = likeliest(logits)

    def draw():
        warm = logits / jnp.where(options.temperature > 0, options.temperature, 1.0)[:, None]
        warm = _if_any(options.top_k > 0, keep_top_k, warm, options.top_k)
        warm = _if_any(options.top_p < 1, keep_top_p, warm, options.top_p)
        warm = keep_min_p(warm, options.min_p)
        drawn = likeliest(warm + gumbel_noise(options.seed, steps, warm.shape[1]))
        return jnp.where(options.temperature > 0, drawn, greedy)

    return jax.lax.cond(jnp.any(options.temperature > 0), draw, lambda: greedy)


def likeliest(logits: Float[Array, "B V"]) -> Int[Array, " B"]:
    """Returns the first index of the largest logit.

    It is `argmax`, which XLA:CPU does not vectorise: nine times faster. A row of NaN gives the last index.
    """
    last = logits.shape[-1] - 1
    is_largest = logits == logits.max(axis=-1, keepdims=True)
    return jnp.min(jnp.where(is_largest, jnp.arange(last + 1, dtype=jnp.int32), last), axis=-1)


def _if_any(wanted: Bool[Array, " B"], keep: Callable, logits: Float[Array, "B V"], option: Array) -> Array:
    """Runs a filter only if some row asks for it."""
    return jax.lax.cond(jnp.any(wanted), keep, lambda logits, _: logits, logits, option)


def apply_repetition_penalty(
    logits: Float[Array, "B V"], seen: Bool[Array, "B V"], penalty: Float[Array, " B"]
) -> Float[Array, "B V"]:
    """Divides positive logits of tokens that were seen by `penalty`, and multiplies negative ones."""
    penalised = jnp.where(logits < 0, logits * penalty[:, None], logits / penalty[:, None])
    return jnp.where(seen, penalised, logits)


def keep_top_k(logits: Float[Array, "B V"], top_k: Int[Array, " B"]) -> Float[Array, "B V"]:
    """Returns -inf in place of all but the `top_k` largest logits; equals of the last one stay. 0 keeps all."""
    limit = jnp.where(top_k > 0, top_k, logits.shape[1]).astype(jnp.float32)
    return _keep_first(logits, jnp.ones_like(logits), limit)


def keep_top_p(logits: Float[Array, "B V"], top_p: Float[Array, " B"]) -> Float[Array, "B V"]:
    """Returns -inf in place of all tokens but the likeliest that reach probability `top_p`, that one included."""
    kept = _keep_first(logits, jax.nn.softmax(logits, axis=-1), top_p)
    return jnp.where(top_p[:, None] < 1, kept, logits)


def keep_min_p(logits: Float[Array, "B V"], min_p: Float[Array, " B"]) -> Float[Array, "B V"]:
    """Returns -inf in place of tokens less than `min_p` times as likely as the likeliest."""
    # log(0) is -inf: then nothing is below it.
    floor = logits.max(axis=-1, keepdims=True) + jnp.log(min_p)[:, None]
    return jnp.where(logits < floor, -jnp.inf, logits)


def _keep_first(logits: Float[Array, "B V"], weights: Float[Array, "B V"], limit: Float[Array, " B"]) -> Array:
    """Keeps, from the largest logit down, every token before which the weights sum to less than `limit`."""
    bits = jax.lax.bitcast_convert_type(logits, jnp.uint32)
    sign = jnp.uint32(1 << 31)
    keys = jnp.where(bits & sign, ~bits, bits | sign)  # unsigned numbers in the order of the floats

    def halve(_, bounds):
        low, high = bounds
        middle = low + (high - low) // 2
        before = jnp.sum(jnp.where(keys > middle[:, None], weights, 0.0), axis=-1)
        enough = before < limit
        return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

    low = jnp.zeros(limit.shape, jnp.uint32)
    _, threshold = jax.lax.fori_loop(0, 32, halve, (low, jnp.full_like(low, (1 << 32) - 1)))
    return jnp.where(keys >= threshold[:, None], logits, -jnp.inf)


def gumbel_noise(seeds: UInt32[Array, " B"], steps: Int[Array, " B"], vocab_size: int) -> Float[Array, "B V"]:
    """Returns noise whose argmax with logits is a draw from their softmax; one stream of numbers for each seed."""

    def row(seed, step):
        return jax.random.gumbel(jax.random.fold_in(jax.random.key(seed), step), (vocab_size,), jnp.float32)

    return jax.vmap(row)(seeds, steps)
