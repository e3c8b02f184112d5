"""The message schema: one JSON object a document, checked field by field, its pictures found but not yet read.

    {"id", "source", "capability", "lang", "messages": [{"role", "content": [item, ...], "train"?}, ...], ...}
    {"id", "source", "capability", "lang", "content": [item, ...]}              a document without roles
    item = {"type": "text", "text", "train"?} | {"type": "image", "path" | "b64"}
         | {"type": "video", "frames": [path], "fps"?}

`"train": false` leaves a message, or a text, out of the loss. `content` may be a string, `"text": "..."` stands for a
content of text alone, and fields that are not listed here are kept for the stage that knows them (`answer` and
`verifier` of RL, `chosen` and `rejected` of DPO). Parquet and TFDS may hold pictures as `bytes`.
"""

import base64
import binascii
import difflib
import json
import math
import os
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from l4jax.processing.chat import ROLES

NAMES = ("id", "source", "capability", "lang")
CONTENTS = ("messages", "content", "text")
MESSAGE_FIELDS = ("role", "content", "train", "tool_calls", "tool_call_id", "name")
PICTURE_FIELDS = ("path", "b64", "bytes")
ITEM_FIELDS = {"text": ("text", "train"), "image": PICTURE_FIELDS, "video": ("frames", "fps")}

SHORT = reprlib.Repr()
SHORT.maxlevel, SHORT.maxdict, SHORT.maxlist, SHORT.maxstring, SHORT.maxother = 2, 3, 3, 50, 50

Item = dict[str, Any]
"""As `Processor` takes it: `{"type": "image", "image": path or bytes}`, frames likewise."""


class DocumentError(ValueError):
    """A document that is not of the schema, or cannot be read; the message begins with its place."""


@dataclass(frozen=True)
class PictureFiles:
    """Where the pictures of a file of documents may lie."""

    base: Path
    """What relative paths are relative to."""
    limit: Path
    """The directory that no picture may lie outside of, links followed."""

    @classmethod
    def beside(cls, file: Path, limit: str | Path | None = None) -> "PictureFiles":
        """Returns the rule for paths in `file`: relative to its directory, inside of it or of `limit`."""
        base = file.absolute().parent
        return cls(base, Path(os.path.realpath(limit if limit is not None else base)))

    def find(self, path: str) -> Path:
        """Returns the real path of a picture, which need not exist.

        Raises:
            ValueError: it lies outside.
        """
        found = Path(os.path.realpath(self.base / path)) if "\0" not in path else None
        if found is None or not found.is_relative_to(self.limit):
            raise ValueError(
                f"{path!r} lies outside of {self.limit}; move the pictures, or name picture_dir in the config"
            )
        return found


@dataclass(frozen=True)
class Document:
    """One document: either `messages` or `content`."""

    where: str
    """Its place, such as `web.jsonl:17`."""
    messages: tuple[dict[str, Any], ...] | None = None
    """A conversation, as `Processor.encode` takes it."""
    content: tuple[Item, ...] | None = None
    """Text and pictures without roles, as `Processor.encode_document` takes them."""
    id: str | None = None
    source: str | None = None
    capability: str | None = None
    lang: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    """The fields that the schema does not list, as they are."""


def parse_line(line: bytes, where: str, pictures: PictureFiles | None = None) -> Document:
    """Returns the document of one line of JSON.

    Raises:
        DocumentError: it is none.
    """
    try:
        data = json.loads(str(line, "utf-8").lstrip("\ufeff"))
    except RecursionError:
        raise DocumentError(f"{where}: the JSON is nested too deeply") from None
    except UnicodeDecodeError as error:
        raise DocumentError(f"{where}: the line is not UTF-8 (byte {error.start}); save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        raise DocumentError(
            f"{where}: not JSON: {error.msg} at column {error.colno}; write one object a line"
        ) from None
    except ValueError as error:  # numbers of thousands of digits
        raise DocumentError(f"{where}: not JSON: {error}") from None
    return parse_document(data, where, pictures)


def parse_document(data: Any, where: str, pictures: PictureFiles | None = None) -> Document:
    """Returns a document after checking its fields; a field that is None counts as absent.

    Args:
        data: an object of the schema, as JSON, Parquet or TFDS give it.
        where: its place, for errors.
        pictures: where pictures given by path are; None if there can be none.

    Raises:
        DocumentError: it is not of the schema; the message names the place and the field.
    """
    try:
        return _document(_object(data, "the document"), where, pictures)
    except ValueError as error:
        raise DocumentError(f"{where}: {error}") from None


def _document(data: dict[str, Any], where: str, pictures: PictureFiles | None) -> Document:
    given = [name for name in CONTENTS if name in data]
    if len(given) != 1:
        if given:
            raise ValueError(f"it has {' and '.join(given)}; write one of them")
        near = [key for key in data if difflib.get_close_matches(key, CONTENTS, n=1)]
        hint = f"is {near[0]} one of them, misspelt?" if near else f"its fields are {_listed(data)}"
        raise ValueError(f"it has none of {', '.join(CONTENTS)}; {hint}")
    names = {}
    for name in NAMES:
        value = data.get(name)
        if isinstance(value, int) and name == "id":
            value = str(value)
        if value is not None and not isinstance(value, str):
            raise ValueError(f"{name}: expected text, got {_shown(value)}")
        names[name] = value
    messages = content = None
    if "messages" in data:
        messages = tuple(
            _message(message, f"messages[{i}]", pictures)
            for i, message in enumerate(_list(data["messages"], "messages"))
        )
        items = [item for message in messages for item in message["content"]]
        calls = any(message.get("tool_calls") for message in messages)
    else:
        if given == ["text"] and not isinstance(data["text"], str):
            raise ValueError(f"text: expected text, got {_shown(data['text'])}; a list of items is called content")
        content = parse_content(data[given[0]], given[0], pictures)
        items, calls = content, False
    if not calls and not any(item.get("text") or item["type"] != "text" for item in items):
        raise ValueError("it is empty: there is no text and no picture in it")
    extra = {key: value for key, value in data.items() if key not in NAMES + CONTENTS}
    return Document(where, messages, content, **names, extra=extra)


def _message(data: Any, name: str, pictures: PictureFiles | None) -> dict[str, Any]:
    data = _object(data, name)
    _check_fields(data, MESSAGE_FIELDS, name)
    if data.get("role") not in ROLES:
        raise ValueError(f"{name}.role: {_shown(data.get('role'))} is not one of {', '.join(ROLES)}")
    if not isinstance(data.get("train", True), bool):
        raise ValueError(f"{name}.train: expected true or false, got {_shown(data['train'])}")
    if "content" not in data and "tool_calls" not in data:
        raise ValueError(f"{name}: content is missing")
    return {**data, "content": parse_content(data.get("content", ""), f"{name}.content", pictures)}


def parse_content(data: Any, name: str, pictures: PictureFiles | None = None) -> tuple[Item, ...]:
    """Returns checked items, their pictures found; text alone is one item.

    Args:
        data: text or a list of items.
        name: of the field, for errors.
        pictures: where pictures given by path are.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(data, str):
        return ({"type": "text", "text": data},)
    return tuple(_item(item, f"{name}[{i}]", pictures) for i, item in enumerate(_list(data, name)))


def _item(data: Any, name: str, pictures: PictureFiles | None) -> Item:
    data = _object(data, name)
    kind = data.get("type")
    if not isinstance(kind, str) or kind not in ITEM_FIELDS:
        raise ValueError(f"{name}.type: {_shown(kind)} is not one of {', '.join(ITEM_FIELDS)}")
    _check_fields(data, ("type", *ITEM_FIELDS[kind]), name)
    if kind == "text":
        if not isinstance(data.get("text"), str):
            raise ValueError(f"{name}.text: expected text, got {_shown(data.get('text'))}")
        if not isinstance(data.get("train", True), bool):
            raise ValueError(f"{name}.train: expected true or false, got {_shown(data['train'])}")
        return {**data, "type": "text"}
    if kind == "image":
        return {"type": "image", "image": _picture(data, name, pictures)}
    frames, fps = _list(data.get("frames"), f"{name}.frames"), data.get("fps", 1.0)
    if not frames:
        raise ValueError(f"{name}.frames: a video needs at least one frame")
    if isinstance(fps, bool) or not isinstance(fps, int | float) or not 0 < fps < math.inf:
        raise ValueError(f"{name}.fps: expected frames a second, a number above 0, got {_shown(fps)}")
    found = []
    for i, frame in enumerate(frames):
        frame = {"path": frame} if isinstance(frame, str) else _object(frame, f"{name}.frames[{i}]")
        _check_fields(frame, PICTURE_FIELDS, f"{name}.frames[{i}]")
        found.append(_picture(frame, f"{name}.frames[{i}]", pictures))
    return {"type": "video", "frames": found, "fps": fps}


def _picture(data: dict[str, Any], name: str, pictures: PictureFiles | None) -> Path | bytes:
    given = [key for key in PICTURE_FIELDS if key in data]
    if len(given) != 1:
        raise ValueError(f"{name}: a picture needs one of path and b64, it has {' and '.join(given) or 'neither'}")
    key, value = given[0], data[given[0]]
    if key == "bytes" and isinstance(value, bytes):
        return value
    if key == "bytes" or not isinstance(value, str):
        raise ValueError(f"{name}.{key}: expected {'bytes' if key == 'bytes' else 'text'}, got {_shown(value)}")
    if key == "b64":
        try:
            return base64.b64decode(value, validate=True)
        except (binascii.Error, ValueError) as error:
            raise ValueError(f"{name}.b64: not base64 ({str(error).lower()})") from None
    if pictures is None:
        raise ValueError(f"{name}.path: this source has no files beside it; give pictures as bytes or b64")
    try:
        return pictures.find(value)
    except (ValueError, OSError) as error:
        raise ValueError(f"{name}.path: {error}") from None


# --- Checks ---------------------------------------------------------------------------------------------------------


def _object(data: Any, name: str) -> dict[str, Any]:
    """Returns an object without its absent fields: columns of Parquet and TFDS hold None for them."""
    if not isinstance(data, Mapping):
        raise ValueError(f"{name}: expected an object, got {_shown(data)}")
    return {str(key): value for key, value in data.items() if value is not None}


def _list(data: Any, name: str) -> Sequence[Any]:
    if not isinstance(data, list | tuple):
        raise ValueError(f"{name}: expected a list, got {_shown(data)}")
    return data


def _check_fields(data: Mapping[str, Any], known: Sequence[str], name: str) -> None:
    for key in data:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
            raise ValueError(f"{name}: unknown field {_shown(key)}; {hint}")


def _listed(keys: Mapping[str, Any]) -> str:
    return ", ".join(_shown(key) for key in list(keys)[:8]) or "none"


def _shown(value: Any) -> str:
    """Returns a value as an error shows it: short, however long and deep it is."""
    return "nothing" if value is None else SHORT.repr(value)
