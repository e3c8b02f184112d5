"""Messages to model input: ids, tiles, and which of the ids are the model's own words.

A conversation is encoded piece by piece, as Meta's `llama4/chat_format.py` does: text is encoded alone and control
tokens are put between the pieces, so nothing that a user writes can end a turn. A picture becomes
`<|image_start|>`, its tiles of `<|patch|>` with separators, one view of the whole, `<|image_end|>`.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Int32

from l4jax.config import Llama4Config, VisionConfig
from l4jax.processing.image import ImageSource, load_image, tile_image
from l4jax.processing.tokenizer import BaseTokenizer
from l4jax.processing.tools import ToolFormat, add_tools, render_tool_calls, tool_call
from l4jax.processing.video import load_video

IMAGE_PLACEHOLDER = "<|image|>"
ROLES = ("system", "user", "assistant", "tool", "ipython")

Message = Mapping[str, Any]


@dataclass(frozen=True)
class Encoded:
    """What the model takes for one prompt."""

    ids: Int32[np.ndarray, "T"]
    tiles: Float32[np.ndarray, "n 3 X X"]
    """All pictures' tiles in the order of their patch tokens; n = 0 without pictures."""
    grids: tuple[tuple[int, int], ...]
    """Rows and columns of tiles, per picture."""
    answer_mask: Bool[np.ndarray, "T"]
    """True on the tokens to learn: what the assistant says, end of turn included, or all text of a document."""
    num_patch_tokens: int
    """How many of the ids stand for parts of pictures."""

    def check_length(self, limit: int, new_tokens: int = 0) -> None:
        """Checks that the prompt, and the new tokens to come, fit into `limit` tokens.

        Raises:
            ValueError: they do not.
        """
        if len(self.ids) + new_tokens <= limit:
            return
        pictures = f", {self.num_patch_tokens:,} of them for {len(self.grids)} pictures" if self.grids else ""
        more = f" and {new_tokens:,} new tokens are asked for" if new_tokens else ""
        raise ValueError(
            f"the prompt is {len(self.ids):,} tokens{pictures}{more}, the limit is {limit:,}; "
            "shorten it or raise the limit"
        )


class Processor:
    """Encodes conversations and prompts for one model, and decodes its answers."""

    def __init__(
        self,
        tokenizer: BaseTokenizer,
        vision_config: VisionConfig | None = None,
        *,
        max_tiles: int = 16,
        max_frames: int = 16,
        tool_format: ToolFormat = "json",
    ):
        """Makes a processor.

        Args:
            tokenizer: the checkpoint's.
            vision_config: None for a model that reads only text.
            max_tiles: tiles a picture may be cut into, the view of the whole not counted.
            max_frames: frames taken of a video; each is one tile.
            tool_format: how past tool calls are written.
        """
        if max_tiles < 1 or max_frames < 1:
            raise ValueError(f"max_tiles={max_tiles} and max_frames={max_frames} must be at least 1")
        self.tokenizer = tokenizer
        self.vision_config = vision_config
        self.max_tiles = max_tiles
        self.max_frames = max_frames
        self.tool_format = tool_format

    @classmethod
    def for_model(cls, tokenizer: BaseTokenizer, config: Llama4Config, **options) -> "Processor":
        """Returns a processor after checking that tokenizer and model mean the same ids.

        Raises:
            ValueError: they do not.
        """
        vocab_size = config.text_config.vocab_size
        if tokenizer.vocab_size > vocab_size:
            raise ValueError(
                f"the tokenizer has {tokenizer.vocab_size} ids, the model's vocab_size is {vocab_size}; "
                "they are of different models"
            )
        if config.vision_config and tokenizer.special["<|patch|>"] != config.image_token_index:
            raise ValueError(
                f"the tokenizer's <|patch|> is id {tokenizer.special['<|patch|>']}, the model's image_token_index is "
                f"{config.image_token_index}; they are of different models"
            )
        return cls(tokenizer, config.vision_config, **options)

    def encode(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> Encoded:
        """Returns a conversation as model input.

        Args:
            messages: dicts with `role` (system, user, assistant, tool or ipython) and `content`: text, or a list of
                `{"type": "text", "text"}`, `{"type": "image", "path" or "image"}`,
                `{"type": "video", "path" or "frames"}`, frames with their `fps` if it is not 1. An assistant message
                may hold `tool_calls`, and `"train": False` if it is not to be learned.
            tools: functions that the model may call, as JSON schemas; they are described in the system message.
            add_generation_prompt: whether to end with the assistant's header, for the model to go on.

        Raises:
            ValueError: a message has another form, or holds a picture that the model cannot take.
            FileNotFoundError: there is no such picture.
        """
        if not isinstance(messages, list | tuple) or not all(isinstance(message, Mapping) for message in messages):
            raise ValueError("messages must be a list of {'role': ..., 'content': ...}")
        draft = _Draft(self)
        draft.control("<|begin_of_text|>")
        for message in add_tools(messages, tools, self.tool_format) if tools else messages:
            self._add_message(draft, message)
        if add_generation_prompt:
            draft.header("assistant")
        return draft.finish()

    def encode_text(self, prompt: str, images: Sequence[ImageSource] = (), *, bos: bool = True) -> Encoded:
        """Returns a plain prompt, as base models take it, as model input; `<|image|>` in it stands for a picture.

        Raises:
            ValueError: the number of placeholders and pictures differ, or a picture cannot be read.
            FileNotFoundError: there is no such picture.
        """
        pieces = prompt.split(IMAGE_PLACEHOLDER)
        if len(pieces) - 1 != len(images):
            raise ValueError(
                f"the prompt has {len(pieces) - 1} {IMAGE_PLACEHOLDER} placeholders, but {len(images)} pictures were "
                f"given; write one {IMAGE_PLACEHOLDER} for each picture"
            )
        draft = _Draft(self)
        if bos:
            draft.control("<|begin_of_text|>")
        draft.text(pieces[0])
        for image, piece in zip(images, pieces[1:], strict=True):
            draft.image(image, self.max_tiles)
            draft.text(piece)
        return draft.finish()

    def encode_document(self, content: str | Sequence[Mapping[str, Any]]) -> Encoded:
        """Returns text and pictures without roles, as pre-training takes them: BOS, content, `<|end_of_text|>`.

        Raises:
            ValueError: the content has another form than that of a message, or a picture cannot be read.
            FileNotFoundError: there is no such picture.
        """
        draft = _Draft(self)
        draft.control("<|begin_of_text|>")
        draft.is_learned = True
        self._add_content(draft, content)
        last = content[-1] if content and not isinstance(content, str) else {}
        draft.is_learned = last.get("train") is not False  # that a text ends here is learned with its end
        draft.control("<|end_of_text|>")
        return draft.finish()

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Returns the text of `ids`, by default without control tokens."""
        return self.tokenizer.decode(ids, skip_special=skip_special)

    def _add_message(self, draft: "_Draft", message: Message) -> None:
        role = message.get("role")
        if role not in ROLES:
            raise ValueError(f"message role {role!r} is not one of {', '.join(ROLES)}")
        # Tool results come under the name of the interpreter that Llama's training data had.
        role = "ipython" if role == "tool" else role
        draft.header(role)
        draft.is_learned = role == "assistant" and message.get("train") is not False
        self._add_content(draft, message.get("content"))
        calls = message.get("tool_calls") or ()
        if calls and (role != "assistant" or not isinstance(calls, list | tuple)):
            raise ValueError(f"tool_calls in a message of role {role!r} is no list of calls by the assistant")
        for piece in render_tool_calls([tool_call(call) for call in calls], self.tool_format):
            draft.text(piece)
        # A call waits for its result, and a result for the model's next words: the turn is not over.
        draft.control("<|eom|>" if calls or role == "ipython" else "<|eot|>")
        draft.is_learned = False

    def _add_content(self, draft: "_Draft", content: Any) -> None:
        if content is None or isinstance(content, str):
            content = [{"type": "text", "text": content or ""}]
        if not isinstance(content, list | tuple):
            raise ValueError(f"message content must be text or a list, not {type(content).__name__}")
        for item in content:
            kind = item.get("type") if isinstance(item, Mapping) else type(item).__name__
            if kind == "text" and isinstance(item.get("text"), str):
                learned = draft.is_learned
                draft.is_learned = learned and item.get("train") is not False
                draft.text(item["text"])
                draft.is_learned = learned
            elif kind == "image" and ("path" in item or "image" in item):
                draft.image(item["path"] if "path" in item else item["image"], self.max_tiles)
            elif kind == "video" and ("path" in item or "frames" in item):
                source = item["path"] if "path" in item else item["frames"]
                fps = item.get("fps", 1.0)
                if not isinstance(fps, int | float) or not 0 < fps < math.inf:
                    raise ValueError(f"fps={fps!r} of a video must be a number above 0, in frames a second")
                for frame in load_video(source, max_frames=self.max_frames, frames_per_second=fps):
                    draft.text(frame.stamp)
                    draft.image(frame.image, 1)
            else:
                raise ValueError(
                    f"message content of type {kind!r} is not understood; expected {{'type': 'text', 'text': ...}}, "
                    "{'type': 'image', 'path': ...} or {'type': 'video', 'path': ...}"
                )


def image_tokens(tokenizer: BaseTokenizer, grid: tuple[int, int], tokens_per_tile: int) -> list[int]:
    """Returns the ids that stand for a picture of `grid` (rows, columns) tiles."""
    special = tokenizer.special
    tile = [special["<|patch|>"]] * tokens_per_tile
    rows, columns = grid
    ids = [special["<|image_start|>"]]
    if rows * columns > 1:
        row = tile + (columns - 1) * [special["<|tile_x_separator|>"], *tile] + [special["<|tile_y_separator|>"]]
        ids += rows * row
    return [*ids, special["<|image|>"], *tile, special["<|image_end|>"]]


class _Draft:
    """A prompt being written."""

    def __init__(self, processor: Processor):
        self._tokenizer = processor.tokenizer
        self._vision = processor.vision_config
        self._ids: list[int] = []
        self._answer: list[bool] = []
        self._tiles: list[np.ndarray] = []
        self._grids: list[tuple[int, int]] = []
        self.is_learned = False

    def _add(self, ids: list[int], *, is_learned: bool) -> None:
        self._ids += ids
        self._answer += [is_learned] * len(ids)

    def text(self, text: str) -> None:
        self._add(self._tokenizer.encode(text), is_learned=self.is_learned)

    def control(self, name: str) -> None:
        self._add([self._tokenizer.special[name]], is_learned=self.is_learned)

    def header(self, role: str) -> None:
        self.control("<|header_start|>")
        self.text(role)
        self.control("<|header_end|>")
        self.text("\n\n")

    def image(self, source: ImageSource, max_tiles: int) -> None:
        if self._vision is None:
            raise ValueError("this model reads only text (it has no vision_config); leave the pictures out")
        tiled = tile_image(load_image(source), image_size=self._vision.image_size, max_tiles=max_tiles)
        # Nobody writes pictures: their tokens are never learned, whoever shows them.
        self._add(image_tokens(self._tokenizer, tiled.grid, self._vision.tokens_per_tile), is_learned=False)
        self._tiles.append(tiled.tiles)
        self._grids.append(tiled.grid)

    def finish(self) -> Encoded:
        side = self._vision.image_size if self._vision else 0
        none = np.zeros((0, 3, side, side), np.float32)
        ids = np.array(self._ids, np.int32)
        return Encoded(
            ids=ids,
            tiles=np.concatenate([none, *self._tiles]),
            grids=tuple(self._grids),
            answer_mask=np.array(self._answer, bool),
            num_patch_tokens=int((ids == self._tokenizer.special["<|patch|>"]).sum()),
        )
