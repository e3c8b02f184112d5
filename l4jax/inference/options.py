"""What a caller may choose. No jax here, so that `l4jax generate --help` answers at once."""

import dataclasses
import difflib
import secrets
from dataclasses import dataclass
from typing import Any

DTYPES = ("auto", "bfloat16", "float32", "float16")
DEFAULT_MAX_LEN = 8192
"""Tokens of prompt and answer together, for which memory is set aside."""
CHAT_TOKENS = 1024
"""Tokens of one answer in a chat."""
MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16


@dataclass(frozen=True)
class SamplingOptions:
    """How an answer is drawn; the names are transformers'."""

    max_new_tokens: int = 128
    """Tokens to generate at most; fewer if the model's `max_len` is reached before."""
    temperature: float = 0.6
    """0 takes the likeliest token every time."""
    top_p: float = 0.9
    """Keep the likeliest tokens that together reach this probability; 1 keeps all."""
    top_k: int = 0
    """Keep this many of the likeliest tokens; 0 keeps all."""
    min_p: float = 0.0
    """Keep tokens at least this fraction as likely as the likeliest; 0 keeps all."""
    repetition_penalty: float = 1.0
    """Above 1 makes tokens of the prompt and the answer less likely to come again."""
    seed: int | None = None
    """Of the random draws; None draws one."""
    stop_strings: tuple[str, ...] = ()
    """The answer ends before the first of these."""
    eos_token_id: tuple[int, ...] | None = None
    """The answer ends with the first of these; None: the ids that the model ends with."""
    logprobs: int = 0
    """How many of the likeliest tokens to report for each token, with their log-probabilities; at most 20."""

    def __post_init__(self):
        for name in ("stop_strings", "eos_token_id"):
            value = getattr(self, name)
            if isinstance(value, str | int):
                object.__setattr__(self, name, (value,))
            elif value is not None:
                object.__setattr__(self, name, tuple(value))
        self._check("max_new_tokens", self.max_new_tokens >= 1, "at least 1")
        self._check("temperature", 0 <= self.temperature < float("inf"), "0 or more")
        self._check("top_p", 0 < self.top_p <= 1, "above 0 and at most 1")
        self._check("top_k", self.top_k >= 0, "0 (off) or more")
        self._check("min_p", 0 <= self.min_p <= 1, "in 0..1")
        self._check("repetition_penalty", 0 < self.repetition_penalty < float("inf"), "above 0")
        self._check("seed", self.seed is None or 0 <= self.seed < 1 << 32, "in 0..4294967295")
        self._check("logprobs", 0 <= self.logprobs <= MAX_LOGPROBS, f"in 0..{MAX_LOGPROBS}")
        few = len(self.stop_strings) <= MAX_STOP_STRINGS
        self._check("stop_strings", few and all(self.stop_strings), f"at most {MAX_STOP_STRINGS}, none of them empty")

    def _check(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise ValueError(f"{name}={getattr(self, name)!r} must be {expected}")

    @classmethod
    def create(cls, **options: Any) -> "SamplingOptions":
        """Returns options from keyword arguments.

        Raises:
            ValueError: there is no such option, or its value is impossible.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        for name in options:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"options are {', '.join(known)}"
                raise ValueError(f"unknown sampling option {name!r}; {hint}")
        return cls(**options)

    def with_seed(self) -> "SamplingOptions":
        """Returns these options with a seed drawn, if there is none."""
        return self if self.seed is not None else dataclasses.replace(self, seed=secrets.randbits(32))
