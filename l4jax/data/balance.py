"""Balancing of captions over metadata, as MetaCLIP does it (arXiv 2309.16671, algorithm 1).

A caption counts for every entry of a list that stands in it. Entries that few captions have keep all of theirs; of one
that `n` captions have, each is kept with probability `most / n`. A caption is kept if one of its entries keeps it; one
without any entry is left out. So what is common no longer drowns what is rare, and noise goes.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int

from l4jax.data.schema import Document, DocumentError
from l4jax.data.sources import Source

_WORD = re.compile(r"\w+")


class Entries:
    """Words and phrases to look for in captions; case and punctuation do not matter."""

    def __init__(self, lines: Iterable[str]):
        self._phrases = {words for line in lines if (words := tuple(_WORD.findall(line.lower())))}
        self._longest = max(map(len, self._phrases), default=0)

    @classmethod
    def read(cls, path: str | Path) -> "Entries":
        """Reads a file with one entry a line.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it has no entry.
        """
        entries = cls(Path(path).read_text(encoding="utf-8").splitlines())
        if not entries._phrases:
            raise ValueError(f"{path} has no entries; write one word or phrase a line")
        return entries

    def found_in(self, caption: str) -> set[tuple[str, ...]]:
        """Returns the entries that stand in a caption, at word boundaries."""
        words = _WORD.findall(caption.lower())
        return {
            phrase
            for start in range(len(words))
            for length in range(1, min(self._longest, len(words) - start) + 1)
            if (phrase := tuple(words[start : start + length])) in self._phrases
        }


def caption_of(document: Document) -> str:
    """Returns all text of a document."""
    contents = [document.content] if document.messages is None else [m["content"] for m in document.messages]
    items = [item for content in contents for item in ([content] if isinstance(content, str) else content)]
    return " ".join(item if isinstance(item, str) else item.get("text", "") for item in items)


def kept(captions: Sequence[str | None], entries: Entries, most: int, seed: int) -> Int[np.ndarray, "n"]:
    """Returns the indices of the captions that are kept; the same for the same seed.

    Args:
        captions: None where there is none.
        entries: what to balance over.
        most: captions that an entry keeps in the mean, if it has more.
        seed: of the draw.
    """
    found = [entries.found_in(caption) if caption else set() for caption in captions]
    counts = Counter(phrase for phrases in found for phrase in phrases)
    draws = np.random.default_rng(seed).random(len(found))
    # One draw for all entries of a caption would tie them; the chance that none of them keeps it is a product.
    lost = np.array([np.prod([1 - min(1.0, most / counts[phrase]) for phrase in phrases]) for phrases in found])
    return np.flatnonzero(draws >= lost)


def balanced_indices(source: Source, entries: Entries, most: int, seed: int) -> Int[np.ndarray, "n"]:
    """Returns which documents of a source are kept; those that cannot be read are not."""

    def caption(index: int) -> str | None:
        try:
            return caption_of(source[index])
        except DocumentError:
            return None

    return kept([caption(index) for index in range(len(source))], entries, most, seed)
