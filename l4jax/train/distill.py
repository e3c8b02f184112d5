"""Co-distillation: a student learns from the tokens and from a teacher's distribution over them.

Meta trained Maverick beside Behemoth with a loss that "dynamically weights the soft and hard targets"; the formula was
not published. Here, for each token with target y,

    L = (1 - w) * -log p_S(y) + w * KL(p_T || p_S)

where w, which no gradient flows through, is one of: a constant; a schedule; `teacher`, 1 - p_T(y), which trusts the
hard target as far as the teacher finds it plausible; `gap`, sigmoid((log p_T(y) - log p_S(y)) / tau), which leans on
the teacher where it knows better than the student. With `top_k` the teacher's distribution is its k likeliest tokens
and one more for the rest.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from l4jax import ops
from l4jax.model.llama4 import Llama4, head_logits
from l4jax.train.config import DistillConfig, ParallelConfig, RouterConfig
from l4jax.train.loss import masked_sum
from l4jax.train.objective import NextToken, Rows


class SoftTargets(NamedTuple):
    """What a teacher says of each position."""

    ids: Int[Array, "B T k"] | None
    """The tokens it finds likeliest; None: all, in order."""
    logprobs: Float[Array, "B T k"]
    """Their log-probabilities, float32."""
    target: Float[Array, "B T"]
    """That of the token that follows in the text."""


class TokenNumbers(NamedTuple):
    """Of each position, float32."""

    loss: Float[Array, "B T"]
    hard: Float[Array, "B T"]
    """-log p_S(y)."""
    soft: Float[Array, "B T"]
    """KL(p_T || p_S)."""
    weight: Float[Array, "B T"]
    """w."""
    right: Float[Array, "B T"]
    """1 where the student finds no token likelier than the target."""
    agreement: Float[Array, "B T"]
    """1 where student and teacher find the same token likeliest."""


def soft_targets(logits_BTV: Float[Array, "B T V"], targets_BT: Int[Array, "B T"], top_k: int) -> SoftTargets:
    """Returns a teacher's targets, of its logits."""
    logprobs_BTV = jax.nn.log_softmax(logits_BTV.astype(jnp.float32))
    target_BT = jnp.take_along_axis(logprobs_BTV, targets_BT[..., None], axis=-1)[..., 0]
    if not 0 < top_k < logits_BTV.shape[-1]:
        return SoftTargets(None, logprobs_BTV, target_BT)
    logprobs_BTk, ids_BTk = jax.lax.top_k(logprobs_BTV, top_k)
    return SoftTargets(ids_BTk, logprobs_BTk, target_BT)


def divergence(
    logprobs_BTV: Float[Array, "B T V"], ids_BTk: Int[Array, "B T k"] | None, teacher_BTk: Float[Array, "B T k"]
) -> Float[Array, "B T"]:
    """Returns KL(teacher || student) over k tokens and one for the rest; over all of them without `ids`.

    Args:
        logprobs_BTV: of the student.
        ids_BTk: the tokens.
        teacher_BTk: the teacher's log-probabilities of these.
    """
    if ids_BTk is None:
        return (jnp.exp(teacher_BTk) * (teacher_BTk - logprobs_BTV)).sum(-1)
    student_BTk = jnp.take_along_axis(logprobs_BTV, ids_BTk, axis=-1)
    kl_BT = (jnp.exp(teacher_BTk) * (teacher_BTk - student_BTk)).sum(-1)
    rest_T, rest_S = (jnp.clip(1.0 - jnp.exp(x).sum(-1), 1e-7, 1.0) for x in (teacher_BTk, student_BTk))
    return kl_BT + rest_T * (jnp.log(rest_T) - jnp.log(rest_S))


def soft_weight(
    settings: DistillConfig, teacher_BT: Float[Array, "B T"], student_BT: Float[Array, "B T"], progress: Array
) -> Float[Array, "B T"]:
    """Returns w of each token.

    Args:
        settings: name of the weighting, and its numbers.
        teacher_BT: the teacher's log-probability of the target.
        student_BT: the student's.
        progress: 0 at the first step, 1 at the last.
    """
    start = jnp.full(teacher_BT.shape, settings.constant)
    weightings = {
        "constant": lambda: start,
        "linear": lambda: start * (1 - progress),
        "cosine": lambda: start * 0.5 * (1 + jnp.cos(jnp.pi * progress)),
        "teacher": lambda: 1 - jnp.exp(teacher_BT),
        "gap": lambda: jax.nn.sigmoid((teacher_BT - student_BT) / settings.tau),
    }
    return jax.lax.stop_gradient(weightings[settings.weight]())


class Distill(NextToken):
    """The objective; `fixed` holds the weights of the teacher, or rows have its targets, under `teacher`."""

    def __init__(
        self,
        graphdef: nnx.GraphDef,
        parallel: ParallelConfig,
        router: RouterConfig,
        num_sources: int,
        *,
        settings: DistillConfig,
        teacher: nnx.GraphDef,
        steps: int,
    ):
        super().__init__(graphdef, parallel, router, num_sources)
        self.settings, self.teacher, self.steps = settings, teacher, steps

    def token_loss(self, model: Llama4, hidden_BTD, rows: Rows, fixed: dict[str, Any], step):
        targets = rows["teacher"] if "teacher" in rows else self.soft_targets(fixed, rows)
        progress = jnp.broadcast_to(step / self.steps, rows["targets"].shape)  # what is mapped over has positions
        of_tokens = ops.map_logits(
            self.token_numbers,
            head_logits,
            hidden_BTD,
            model.lm_head.kernel[...],
            (rows["targets"], jax.lax.stop_gradient(targets), progress),
        )
        loss = masked_sum(of_tokens.loss, rows["counts"]) / rows["total"]
        names = {"loss": "hard", "accuracy": "right", "soft_loss": "soft", "soft_weight": "weight"}
        values = {name: getattr(of_tokens, field) for name, field in names.items()}
        return loss, self.by_bucket(rows, **values, teacher_loss=-targets.target, teacher_agreement=of_tokens.agreement)

    def soft_targets(self, fixed: dict[str, Any], rows: Rows) -> SoftTargets:
        """Returns what the teacher says of rows."""
        teacher = nnx.merge(self.teacher, jax.lax.stop_gradient(fixed))
        hidden_BTd, _ = self.hidden(teacher, rows, None)
        return ops.map_logits(
            lambda logits, targets: soft_targets(logits, targets, self.settings.top_k),
            head_logits,
            hidden_BTd,
            teacher.lm_head.kernel[...],
            rows["targets"],
        )

    def token_numbers(self, logits_BTV: Float[Array, "B T V"], others) -> TokenNumbers:
        """Returns the loss of each position, and what it is made of."""
        targets_BT, teacher, progress_BT = others
        logprobs_BTV = jax.nn.log_softmax(logits_BTV.astype(jnp.float32))
        chosen_BT = jnp.take_along_axis(logprobs_BTV, targets_BT[..., None], axis=-1)[..., 0]
        soft_BT = divergence(logprobs_BTV, teacher.ids, teacher.logprobs)
        weight_BT = soft_weight(self.settings, teacher.target, chosen_BT, progress_BT)
        best_BT = logprobs_BTV.argmax(-1)
        teachers_BT = teacher.logprobs.argmax(-1) if teacher.ids is None else teacher.ids[..., 0]
        return TokenNumbers(
            loss=(1 - weight_BT) * -chosen_BT + weight_BT * soft_BT,
            hard=-chosen_BT,
            soft=soft_BT,
            weight=weight_BT,
            right=(chosen_BT >= logprobs_BTV.max(-1)).astype(jnp.float32),
            agreement=(best_BT == teachers_BT).astype(jnp.float32),
        )
