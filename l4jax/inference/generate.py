"""Answers, one event a token: the loop over the engine, stop conditions, and text that is never taken back.

Text is held back while it could still change: bytes of an unfinished character, and what may be the beginning of a stop
string. Rows of a batch end on their own; those that ended idle until all have.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import jax
import numpy as np
from jaxtyping import Float32, Int32

from l4jax.inference.engine import Drawn, Engine
from l4jax.inference.options import MAX_LOGPROBS, SamplingOptions
from l4jax.processing.tokenizer import BaseTokenizer, StreamDecoder

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Prompt:
    """What one answer is given to."""

    ids: Int32[np.ndarray, " T"]
    tiles: Float32[np.ndarray, "n 3 X X"] | None = None


@dataclass(frozen=True)
class Event:
    """One more token of one row."""

    row: int
    id: int
    text: str
    """What can be shown now; often empty, and it may belong to tokens before this one."""
    logprob: float
    """In the model's own distribution, before penalty and temperature."""
    top_logprobs: tuple[tuple[int, float], ...]
    """(id, log-probability) of the likeliest tokens, if asked for."""
    finish_reason: FinishReason | None
    """On the last event of a row: "stop" at an end-of-text token or stop string, "length" when the tokens ran out."""


@dataclass(frozen=True)
class Generation:
    """A whole answer; printed, it is its text."""

    text: str
    """Without control tokens and without the stop string; empty if the model has no tokenizer."""
    ids: list[int]
    """Every token drawn, the one that ended the answer included."""
    logprobs: list[float]
    top_logprobs: list[tuple[tuple[int, float], ...]]
    finish_reason: FinishReason
    prompt_tokens: int

    @property
    def completion_tokens(self) -> int:
        return len(self.ids)

    def __str__(self) -> str:
        return self.text


def stream(
    engine: Engine,
    prompts: Sequence[Prompt],
    options: Sequence[SamplingOptions],
    *,
    tokenizer: BaseTokenizer | None,
    eos_token_id: Sequence[int],
) -> Iterator[Event]:
    """Yields the tokens of all rows as they are drawn, row after row within a step.

    Args:
        engine: of the model.
        prompts: one a row.
        options: one a row.
        tokenizer: None yields no text.
        eos_token_id: what ends an answer whose options do not say.

    Raises:
        ValueError: a prompt does not fit the model, or stop strings are asked for without a tokenizer.
    """
    if tokenizer is None and any(row.stop_strings for row in options):
        raise ValueError("stop strings need a tokenizer; give eos_token_id instead")
    options = [row.with_seed() for row in options]
    rows = [
        _Row(index, row, tokenizer, eos_token_id, room=engine.max_len - len(prompt.ids))
        for index, (prompt, row) in enumerate(zip(prompts, options, strict=True))
    ]
    num_top = MAX_LOGPROBS if any(row.logprobs for row in options) else 0
    # All prompts are read before the first token is given out, so that a bad one among them fails early.
    state = None
    first = []
    for row, prompt in zip(rows, prompts, strict=True):
        prefilled = engine.prefill(prompt.ids, prompt.tiles)
        if state is None:
            state, drawn = engine.start(prefilled, row.options, batch_size=len(rows), num_top=num_top)
        else:
            state, drawn = engine.insert(state, prefilled, row.options, row.index, num_top=num_top)
        first.append(drawn)
    for row, drawn in zip(rows, jax.device_get(first), strict=True):
        yield row.push(_Token.of(drawn, 0))
    while active := [row for row in rows if row.finish_reason is None]:
        mask = np.zeros(len(rows), bool)
        mask[[row.index for row in active]] = True
        state, drawn = engine.decode(state, mask, num_top=num_top)
        drawn = jax.device_get(drawn)
        for row in active:
            yield row.push(_Token.of(drawn, row.index))


def collect(events: Iterator[Event], prompts: Sequence[Prompt]) -> list[Generation]:
    """Returns whole answers, in the order of the prompts."""
    rows: list[list[Event]] = [[] for _ in prompts]
    for event in events:
        rows[event.row].append(event)
    return [
        Generation(
            text="".join(event.text for event in row),
            ids=[event.id for event in row],
            logprobs=[event.logprob for event in row],
            top_logprobs=[event.top_logprobs for event in row],
            finish_reason=row[-1].finish_reason,
            prompt_tokens=len(prompt.ids),
        )
        for row, prompt in zip(rows, prompts, strict=True)
    ]


@dataclass(frozen=True)
class _Token:
    id: int
    logprob: float
    top: list[tuple[int, float]]

    @classmethod
    def of(cls, drawn: Drawn, row: int) -> "_Token":
        """Takes one row of tokens that were brought to the host."""
        top = zip(drawn.top_ids[row].tolist(), drawn.top_logprobs[row].tolist(), strict=True)
        return cls(int(drawn.tokens[row]), float(drawn.logprobs[row]), list(top))


class _Row:
    """One answer in the making."""

    def __init__(self, index: int, options: SamplingOptions, tokenizer: BaseTokenizer | None, eos, *, room: int):
        self.index, self.options = index, options
        self.finish_reason: FinishReason | None = None
        self._eos = frozenset(eos if options.eos_token_id is None else options.eos_token_id)
        self._left = min(options.max_new_tokens, room)
        self._text = TextStream(tokenizer, options.stop_strings) if tokenizer else None

    def push(self, token: _Token) -> Event:
        self._left -= 1
        text, ended = "", token.id in self._eos
        if self._text and not ended:
            text = self._text.push(token.id)
        if ended or (self._text and self._text.stopped):
            self.finish_reason = "stop"
        elif self._left == 0:
            self.finish_reason = "length"
        if self._text and self.finish_reason:
            text += self._text.finish()
        top = tuple(token.top[: self.options.logprobs])
        return Event(self.index, token.id, text, token.logprob, top, self.finish_reason)


class TextStream:
    """Turns ids into text that is final: no half characters, nothing from a stop string on."""

    def __init__(self, tokenizer: BaseTokenizer, stop_strings: Sequence[str] = ()):
        self.stopped = False
        """Whether a stop string has come; no more text follows."""
        self._decoder = StreamDecoder(tokenizer)
        self._stop_strings = stop_strings
        self._held = ""

    def push(self, index: int) -> str:
        """Takes the next id; returns the text that can be shown now."""
        return self._release(self._decoder.push(index), last=False)

    def finish(self) -> str:
        """Returns the rest."""
        return self._release(self._decoder.finish(), last=True)

    def _release(self, text: str, last: bool) -> str:
        if self.stopped:
            return ""
        held = self._held + text
        found = [at for stop in self._stop_strings if (at := held.find(stop)) >= 0]
        if found:
            self.stopped = True
            return held[: min(found)]
        keep = 0 if last else max((_overlap(held, stop) for stop in self._stop_strings), default=0)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]


def _overlap(text: str, stop: str) -> int:
    """Returns how many characters at the end of `text` could begin `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
