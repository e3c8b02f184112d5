"""Greedy answers to many short prompts at once: how well a model reads scenes that it was not trained on.

Prompts of one batch share a padded prefill and one compiled loop of decode steps. For single answers and chats there is
`l4jax/inference`; this is for thousands of them in a few seconds.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int

from l4jax.inference.sampling import likeliest
from l4jax.processing.chat import Encoded, Message, Processor


class BatchAnswerer:
    """Answers prompts by always taking the likeliest token.

    Args:
        graphdef: structure of the model.
        params: its arrays.
        processor: the model's.
        batch_size: prompts that are answered together.
        prompt_tokens: longest prompt.
        prompt_tiles: most tiles of a prompt.
        new_tokens: longest answer.
    """

    def __init__(
        self,
        graphdef: nnx.GraphDef,
        params: dict[str, Any],
        processor: Processor,
        *,
        batch_size: int,
        prompt_tokens: int,
        prompt_tiles: int,
        new_tokens: int,
    ):
        self._params, self._processor = params, processor
        self._batch_size, self._prompt_tokens, self._tiles = batch_size, prompt_tokens, prompt_tiles
        stop_ids = jnp.array(processor.tokenizer.stop_ids)
        self._generate = jax.jit(functools.partial(greedy, graphdef, new_tokens=new_tokens, stop_ids=stop_ids))

    def answer(self, prompts: Sequence[Sequence[Message]]) -> list[str]:
        """Returns the answers, in order.

        Raises:
            ValueError: a prompt is longer, or has more tiles, than the limits given.
        """
        answers = []
        for start in range(0, len(prompts), self._batch_size):
            encoded = [self._processor.encode(prompt) for prompt in prompts[start : start + self._batch_size]]
            ids = np.asarray(self._generate(self._params, **self._batch(encoded)))
            answers += [self._text(row) for row in ids[: len(encoded)]]
        return answers

    def _batch(self, prompts: Sequence[Encoded]) -> dict[str, np.ndarray]:
        ids = np.zeros((self._batch_size, self._prompt_tokens), np.int32)
        lengths = np.ones(self._batch_size, np.int32)  # rows without a prompt hold one meaningless token
        side = prompts[0].tiles.shape[-1]
        tiles = np.zeros((self._batch_size, self._tiles, 3, side, side), np.float32)
        for row, prompt in enumerate(prompts):
            prompt.check_length(self._prompt_tokens)
            if len(prompt.tiles) > self._tiles:
                raise ValueError(f"a prompt has {len(prompt.tiles)} tiles, there is room for {self._tiles}")
            ids[row, : len(prompt.ids)], lengths[row] = prompt.ids, len(prompt.ids)
            tiles[row, : len(prompt.tiles)] = prompt.tiles
        return {"ids": ids, "lengths": lengths, "tiles": tiles}

    def _text(self, ids: np.ndarray) -> str:
        stops = np.flatnonzero(np.isin(ids, self._processor.tokenizer.stop_ids))
        return self._processor.decode(ids[: stops[0]] if len(stops) else ids)


def greedy(
    graphdef: nnx.GraphDef,
    params: dict[str, Any],
    ids: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    tiles: Array,
    *,
    new_tokens: int,
    stop_ids: Int[Array, "k"],
) -> Int[Array, "B n"]:
    """Returns the `new_tokens` likeliest tokens after each prompt, which is padded on the right.

    The loop ends when every row has drawn a stop token, so short answers cost little; what was not drawn is 0.
    """
    model = nnx.merge(graphdef, params)
    batch_size, length = ids.shape
    segment_ids = (jnp.arange(length) < lengths[:, None]).astype(jnp.int32)
    cache = model.init_cache(batch_size, length + new_tokens)
    logits, cache = model(ids, tiles=tiles, segment_ids=segment_ids, cache=cache, logits_at=lengths - 1)
    first = likeliest(logits[:, -1])
    drawn = jnp.zeros((batch_size, new_tokens), jnp.int32).at[:, 0].set(first)

    def goes_on(carry) -> Array:
        step, drawn, _ = carry
        return (step < new_tokens) & ~jnp.isin(drawn, stop_ids).any(axis=1).all()

    def decode(carry):
        step, drawn, cache = carry
        last = jax.lax.dynamic_slice_in_dim(drawn, step - 1, 1, axis=1)
        logits, cache = model(last, cache=cache)
        token = likeliest(logits[:, -1])
        return step + 1, drawn.at[:, step].set(token), cache

    return jax.lax.while_loop(goes_on, decode, (1, drawn, cache))[1]


@dataclass(frozen=True)
class ReadingScore:
    """How well scenes were read."""

    digits: float
    """Share of digits that stand at their place in the answer."""
    scenes: float
    """Share of scenes with every digit right, none missing and none added."""

    @classmethod
    def of(cls, answers: Sequence[str], truths: Sequence[str]) -> "ReadingScore":
        pairs = list(zip(answers, truths, strict=True))
        right = sum(said == true for answer, truth in pairs for said, true in zip(answer, truth, strict=False))
        return cls(
            digits=right / sum(len(truth) for truth in truths),
            scenes=sum(answer == truth for answer, truth in pairs) / len(pairs),
        )
