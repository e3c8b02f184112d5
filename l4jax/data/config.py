"""What a run reads: the settings under `data`."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class DigitsConfig:
    """Scenes of handwritten digits, made on this machine (`l4jax/data/scenes.py`)."""

    train_scenes: int
    """Scenes to build for training; they are drawn anew in every pass over them."""
    eval_scenes: int
    """Scenes to build for evaluation."""
    warm_up_scenes: int = 0
    """Scenes seen before all others, mostly of one digit and hardly bent; they shorten the plateau before reading."""
    train_part: str = "train"
    """Digits to train on: `train`, or `fit` while settings are being chosen."""
    eval_part: str = "held_out"
    """Digits to evaluate on: `held_out`, or `choose` while settings are being chosen."""
    blank_images: bool = False
    """Show black pictures: what can be answered without looking."""


@dataclass(frozen=True, kw_only=True)
class CaptionsConfig:
    """One handwritten digit on one tile and its caption, made on this machine (`l4jax/data/made.py`)."""

    part: Literal["train", "held_out", "fit", "choose"] = "train"
    """Which digits; `fit` and `choose` divide `train`, to choose settings."""
    blank_images: bool = False
    """Show black pictures: what can be said without looking."""
    wrong_fraction: float = 0.0
    """Share of the pictures whose caption names another digit, as in text from the web."""

    def __post_init__(self):
        if not 0 <= self.wrong_fraction <= 1:
            raise ValueError(f"captions.wrong_fraction={self.wrong_fraction} must be in 0..1")


@dataclass(frozen=True, kw_only=True)
class PythonDocsConfig:
    """The topics of Python's own help in pieces (`l4jax/data/made.py`)."""

    part: Literal["train", "held_out"] = "train"
    """A tenth of the paragraphs is held out."""
    piece_bytes: int = 126
    """Longest piece; pieces end between words, and lines are joined."""

    def __post_init__(self):
        if self.piece_bytes < 16:
            raise ValueError(f"python_docs.piece_bytes={self.piece_bytes} must be at least 16")


@dataclass(frozen=True, kw_only=True)
class RecallConfig:
    """Keys and values to recall over a distance (`l4jax/data/made.py`)."""

    length: int
    """Tokens of a document."""
    pairs: int
    """Keys with a value; at most 46."""
    chunk: int
    """Tokens; what is near lies in one chunk of attention, what is far in different ones."""
    distance: Literal["near", "far", "both"] = "both"
    questions: int = 8
    """Values asked for in a chunk."""
    ask_everywhere: bool = True
    """Ask in every chunk, not in the last alone."""
    learn_echoes: bool = True
    """Learn the key after each value too; in evaluations only values count."""
    documents: int = 1_000_000

    def __post_init__(self):
        for name in ("chunk", "questions", "documents"):
            if getattr(self, name) < 1:
                raise ValueError(f"recall.{name}={getattr(self, name)} must be at least 1")
        if not 1 <= self.pairs <= 46:
            raise ValueError(f"recall.pairs={self.pairs} must be in 1..46, the symbols for keys")
        if self.length % self.chunk or 3 * self.pairs + self.chunk >= self.length:
            raise ValueError(
                f"recall.length={self.length} must be chunks of {self.chunk}, one of them after {self.pairs} pairs"
            )


@dataclass(frozen=True, kw_only=True)
class BalanceConfig:
    """Balancing of captions over a list of words and phrases (`l4jax/data/balance.py`)."""

    entries: str
    """File with one entry a line."""
    most: int
    """Documents that an entry keeps in the mean, if more have it; 20,000 in MetaCLIP's 400 million."""

    def __post_init__(self):
        if self.most < 1:
            raise ValueError(f"balance.most={self.most} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One component of the mixture: a path, or what is made on this machine."""

    path: str | None = None
    """JSONL or Parquet file, a directory of either, or a TFDS directory, in the schema of `l4jax/data/schema.py`."""
    digits: DigitsConfig | None = None
    """Scenes of digits and questions about them."""
    captions: CaptionsConfig | None = None
    """Digits and their names."""
    python_docs: PythonDocsConfig | None = None
    """English text."""
    recall: RecallConfig | None = None
    """Keys and values."""
    balance: BalanceConfig | None = None
    """Leave out documents until common captions are no longer more common than rare ones; of a path."""
    weight: float = 1.0
    """Documents drawn from this source, relative to the others; may change when a run goes on. 0: none."""
    split: str = "train"
    """Split of a TFDS directory; slices such as `train[:10%]` too."""
    picture_dir: str | None = None
    """Directory that pictures may not lie outside of; by default that of the file that names them."""


SOURCE_KINDS = ("path", "digits", "captions", "python_docs", "recall")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What a run reads, and the shape of a batch."""

    sources: dict[str, SourceConfig]
    """The mixture, by name."""
    rows: int
    """B, rows of a batch."""
    row_tokens: int
    """T, tokens of a row; documents are packed into rows."""
    row_tiles: int = 0
    """Tiles that the documents of one row may have together; 0 for text alone."""
    shuffle: bool = True
    """Take the documents of a source in a new random order in every pass, not in that of the file."""
    num_workers: int = 0
    """Processes that read, tokenise and tile ahead; 0: the training process does it itself."""
    long_documents: Literal["error", "split", "drop"] = "error"
    """What becomes of a document that does not fit into a row. `split` cuts pre-training documents, never a picture."""
    skip_malformed: bool = False
    """Leave out documents that cannot be read, with a warning for each of the first, instead of stopping."""
    tokenizer: str = "bytes"
    """Directory with a tokenizer file, or `bytes`."""
    max_tiles: int = 16
    """Tiles a picture may be cut into, the view of the whole not counted."""
    max_frames: int = 16
    """Frames taken of a video, evenly spread; each is one tile."""

    def __post_init__(self):
        for name in ("rows", "row_tokens", "max_tiles", "max_frames"):
            if getattr(self, name) < 1:
                raise ValueError(f"data.{name}={getattr(self, name)} must be at least 1")
        for name in ("row_tiles", "num_workers"):
            if getattr(self, name) < 0:
                raise ValueError(f"data.{name}={getattr(self, name)} must not be negative")
        for name, source in self.sources.items():
            key = f"data.sources.{name}"
            if sum(getattr(source, kind) is not None for kind in SOURCE_KINDS) != 1:
                raise ValueError(f"{key} must have one of {', '.join(SOURCE_KINDS)}")
            if source.balance is not None and source.path is None:
                raise ValueError(f"{key}.balance is for a path; what is made on this machine is balanced")
            if not 0 <= source.weight < float("inf"):
                raise ValueError(f"{key}.weight={source.weight} must be 0 or more, and finite")
        if not any(source.weight for source in self.sources.values()):
            what = "every weight is 0" if self.sources else "it names nothing"
            raise ValueError(
                f"data.sources is no mixture: {what}; name a source, such as sources: {{web: {{path: web.jsonl}}}}"
            )
