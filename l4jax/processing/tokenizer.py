"""Text to ids and back: Llama 4's byte-pair vocabulary, and a byte vocabulary with the same control tokens.

Text never becomes a control token: a user who types `<|eot|>` gets ten or so ordinary ids. Control tokens are put in
by name, from `special`. The ids are those of Meta's `llama4/tokenizer.py`; `tokenizer.json` of Hugging Face holds the
same ranks in another spelling. tiktoken does the merging: 17 times faster than the `tokenizers` library.
"""

import abc
import base64
import binascii
import codecs
import itertools
import json
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

# The word pattern of o200k, which Llama 4 shares.
WORD_PATTERN = "|".join(
    [
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
NUM_SPECIAL = 2048
# tiktoken's regex engine gives up on longer input. The cuts are Meta's, so the ids are too.
MAX_PIECE_CHARS, MAX_RUN_CHARS = 400_000, 25_000

BYTE_SPECIAL = (
    *("<|begin_of_text|>", "<|end_of_text|>", "<|eom|>", "<|eot|>", "<|finetune_right_pad|>"),
    *("<|header_start|>", "<|header_end|>", "<|step|>", "<|python_start|>", "<|python_end|>"),
    *("<|image_start|>", "<|image_end|>", "<|tile_x_separator|>", "<|tile_y_separator|>", "<|image|>", "<|patch|>"),
)


def special_tokens(first_id: int) -> dict[str, int]:
    """Returns name -> id of the 2,048 control tokens, counted from `first_id` (200000 in the released models)."""
    reserved = "<|{}reserved_special_token_{}|>".format
    names = ["<|begin_of_text|>", "<|end_of_text|>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"]
    names += ["<|header_start|>", "<|header_end|>", "<|eom|>", "<|eot|>", "<|step|>"]
    names += [reserved("text_post_train_", i) for i in range(6)]
    names += ["<|python_start|>", "<|python_end|>", "<|finetune_right_pad|>"]
    names += [reserved("text_post_train_", i) for i in range(8, 69)]
    names += ["<|image_start|>", "<|image_end|>", *(reserved("vision_", i) for i in range(2))]
    names += ["<|tile_x_separator|>", "<|tile_y_separator|>", *(reserved("vision_", i) for i in range(2, 6))]
    names += ["<|image|>", reserved("vision_", 6), "<|patch|>", *(reserved("vision_", i) for i in range(7, 1048))]
    names += [reserved("reasoning_", i) for i in range(8)]
    names += ["<|reasoning_thinking_start|>", "<|reasoning_thinking_end|>"]
    names += [reserved("", i) for i in range(NUM_SPECIAL - len(names))]
    return {name: first_id + i for i, name in enumerate(names)}


class BaseTokenizer(abc.ABC):
    """What both tokenizers do. Ids from 0 are text, then come the control tokens, up to `vocab_size`.

    Attributes:
        special: name -> id of the control tokens, `<|eot|>` among them.
        vocab_size: number of ids, the control tokens included.
        bos_id, eos_id, eom_id, eot_id, pad_id: the ones in daily use.
        stop_ids: the ids that end an answer.
    """

    def __init__(self, special: Mapping[str, int], vocab_size: int, where: str):
        missing = [name for name in BYTE_SPECIAL if name not in special]
        if missing:
            raise ValueError(f"{where} lacks the control tokens {', '.join(missing)}; it is not a Llama 4 tokenizer")
        self.special = dict(special)
        self.vocab_size = vocab_size
        self.bos_id = special["<|begin_of_text|>"]
        self.eos_id = special["<|end_of_text|>"]
        self.eom_id = special["<|eom|>"]
        self.eot_id = special["<|eot|>"]
        self.pad_id = special["<|finetune_right_pad|>"]
        self.stop_ids = (self.eos_id, self.eom_id, self.eot_id)
        self._special_bytes = {index: name.encode() for name, index in special.items()}

    @abc.abstractmethod
    def _encode_text(self, text: str) -> list[int]: ...

    @abc.abstractmethod
    def _text_bytes(self, index: int) -> bytes: ...

    @abc.abstractmethod
    def save(self, directory: str | Path) -> Path:
        """Puts the tokenizer into a checkpoint directory, for `load_tokenizer`; returns the file."""

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        """Returns the ids of `text`, which never hold a control token except the BOS and EOS asked for."""
        ids = self._encode_text(text)
        return [*([self.bos_id] if bos else []), *ids, *([self.eos_id] if eos else [])]

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """Returns the text of `ids`; bytes that are not UTF-8 become U+FFFD, control tokens their names or nothing.

        Raises:
            ValueError: an id is outside the vocabulary.
        """
        pieces = (self.token_bytes(index, skip_special=skip_special) for index in ids)
        return b"".join(pieces).decode("utf-8", errors="replace")

    def token_bytes(self, index: int, *, skip_special: bool = False) -> bytes:
        """Returns the bytes that one id stands for; a character may be spread over several ids.

        Raises:
            ValueError: the id is outside the vocabulary.
        """
        index = int(index)
        if index in self._special_bytes:
            return b"" if skip_special else self._special_bytes[index]
        if not 0 <= index < self.vocab_size:
            raise ValueError(f"token id {index} is outside the vocabulary of {self.vocab_size} ids")
        return self._text_bytes(index)


class Tokenizer(BaseTokenizer):
    """Llama 4's byte-pair tokenizer. Make one with `Tokenizer.from_file`."""

    def __init__(self, ranks: dict[bytes, int], path: Path, *, pattern: str = WORD_PATTERN, names=()):
        """Takes mergeable ranks, the file that they came from, and (id, name) pairs that replace released names."""
        import tiktoken  # a tenth of a second, for those who only ask for --help

        special = special_tokens(len(ranks))
        by_id = {index: name for name, index in special.items()} | dict(names)
        super().__init__({name: index for index, name in by_id.items()}, len(ranks) + NUM_SPECIAL, str(path))
        self.path = path
        self.ranks = ranks
        self._encoding = tiktoken.Encoding(
            path.name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={}, explicit_n_vocab=len(ranks)
        )

    @classmethod
    def from_file(cls, path: str | Path) -> "Tokenizer":
        """Reads Meta's `tokenizer.model` or Hugging Face's `tokenizer.json`.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is damaged or holds another kind of tokenizer.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no tokenizer file {path}; expected tokenizer.model (Meta) or tokenizer.json (HF)")
        if path.suffix != ".json":
            return cls(_ranks_from_meta(path), path)
        ranks, pattern, names = _ranks_from_hf(path)
        return cls(ranks, path, pattern=pattern, names=names)

    def _encode_text(self, text: str) -> list[int]:
        ids = []
        for piece in split_text(text):
            ids += self._encoding.encode_ordinary(piece)
        return ids

    def _text_bytes(self, index: int) -> bytes:
        return self._encoding.decode_single_token_bytes(index)

    def save(self, directory: str | Path) -> Path:
        """Copies the tokenizer file as it was read; returns the copy."""
        target = Path(directory) / ("tokenizer.json" if self.path.suffix == ".json" else "tokenizer.model")
        if not (target.exists() and target.samefile(self.path)):
            shutil.copyfile(self.path, target)
        return target


class ByteTokenizer(BaseTokenizer):
    """One id a byte (0 to 255), then the control tokens by which Llama 4 is driven, then reserved ones.

    For models too small for 202,048 embeddings. `vocab_size` may exceed the 272 that are needed.
    """

    FILE = "byte_tokenizer.json"

    def __init__(self, vocab_size: int = 256 + len(BYTE_SPECIAL)):
        names = list(BYTE_SPECIAL)
        if vocab_size < 256 + len(names):
            raise ValueError(f"vocab_size={vocab_size} is too small for bytes and control tokens; at least 272")
        names += [f"<|reserved_special_token_{i}|>" for i in range(vocab_size - 256 - len(names))]
        super().__init__({name: 256 + i for i, name in enumerate(names)}, vocab_size, "ByteTokenizer")

    def _encode_text(self, text: str) -> list[int]:
        # Lone surrogates have no UTF-8; tiktoken replaces them too.
        return list(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode("utf-8"))

    def _text_bytes(self, index: int) -> bytes:
        return bytes([index])

    def save(self, directory: str | Path) -> Path:
        """Writes `byte_tokenizer.json`; returns it."""
        target = Path(directory) / self.FILE
        target.write_text(json.dumps({"vocab_size": self.vocab_size}) + "\n")
        return target


def load_tokenizer(directory: str | Path) -> BaseTokenizer:
    """Returns the tokenizer of a checkpoint directory: Meta's, Hugging Face's or ours.

    Raises:
        FileNotFoundError: the directory holds none of the files.
        ValueError: a file is damaged.
    """
    directory = Path(directory)
    for name in ("tokenizer.model", "tokenizer.json"):
        if (directory / name).is_file():
            return Tokenizer.from_file(directory / name)
    path = directory / ByteTokenizer.FILE
    if path.is_file():
        size = _read_json(path).get("vocab_size")
        if not isinstance(size, int):
            raise ValueError(f"{path} is damaged: vocab_size={size!r} is not a whole number")
        return ByteTokenizer(size)
    raise FileNotFoundError(
        f"no tokenizer in {directory}; expected tokenizer.model (Meta), tokenizer.json (HF) or {ByteTokenizer.FILE}"
    )


class StreamDecoder:
    """Turns ids into text as they come, and holds back the bytes of a character that is not complete.

    The pieces joined equal `tokenizer.decode` of all ids.
    """

    def __init__(self, tokenizer: BaseTokenizer, *, skip_special: bool = True):
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, index: int) -> str:
        """Takes the next id; returns the text that it completes, often empty."""
        return self._decoder.decode(self._tokenizer.token_bytes(index, skip_special=self._skip_special))

    def finish(self) -> str:
        """Returns what an unfinished character leaves behind: U+FFFD or nothing. The decoder can start anew."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest


def split_text(text: str) -> Iterator[str]:
    """Yields `text` in pieces of at most 400,000 characters and runs of at most 25,000 (non-)space characters."""
    for start in range(0, len(text), MAX_PIECE_CHARS):
        piece = text[start : start + MAX_PIECE_CHARS]
        last = 0
        if len(piece) > MAX_RUN_CHARS:
            for run in re.finditer(r"\s+|\S+", piece):
                for cut in range(run.start() + MAX_RUN_CHARS, run.end(), MAX_RUN_CHARS):
                    yield piece[last:cut]
                    last = cut
        yield piece[last:]


def _ranks_from_meta(path: Path) -> dict[bytes, int]:
    ranks = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise ValueError(f"{path} line {number} is not 'base64 rank'; fetch the file again") from None
    return _checked(ranks, path)


def _ranks_from_hf(path: Path) -> tuple[dict[bytes, int], str, list[tuple[int, str]]]:
    """Returns ranks, word pattern and (id, name) of the control tokens of a `tokenizer.json`."""
    content = _read_json(path)
    model = content.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(vocab, dict) or model.get("type", "BPE") != "BPE" or content.get("normalizer"):
        raise ValueError(f"{path} is not a plain byte-level BPE tokenizer as Llama 4's")
    byte_of = _byte_of_character()
    try:
        names = [(int(token["id"]), str(token["content"])) for token in content.get("added_tokens", ())]
        control = {name for _, name in names}
        ranks = {bytes(byte_of[c] for c in token): int(rank) for token, rank in vocab.items() if token not in control}
        merged = [vocab["".join(m.split(" ") if isinstance(m, str) else m)] for m in model.get("merges", ())]
    except (KeyError, TypeError, ValueError, AttributeError):
        raise ValueError(f"{path} is damaged: its vocabulary cannot be read; fetch the file again") from None
    if any(later < earlier for earlier, later in itertools.pairwise(merged)):
        raise ValueError(f"{path} merges in another order than its ids; it is not a Llama 4 tokenizer")
    return _checked(ranks, path), _pattern_from_hf(content), names


def _pattern_from_hf(content: Mapping[str, Any]) -> str:
    step = content.get("pre_tokenizer") or {}
    for part in step.get("pretokenizers", [step]):
        if part.get("type") == "Split" and "Regex" in part.get("pattern", {}):
            return part["pattern"]["Regex"]
    return WORD_PATTERN


def _byte_of_character() -> dict[str, int]:
    """Returns GPT-2's spelling of bytes as characters: printable ones stand for themselves, others from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def _checked(ranks: dict[bytes, int], path: Path) -> dict[bytes, int]:
    if set(ranks.values()) != set(range(len(ranks))) or any(bytes([b]) not in ranks for b in range(256)):
        raise ValueError(f"{path} is damaged: {len(ranks)} tokens, but ranks have gaps or bytes are missing")
    return ranks


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); fetch the file again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} does not hold a JSON object")
    return content
