"""`l4jax chat`: a conversation in the terminal, or one message a line from a pipe."""

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from l4jax.inference.cli_common import (
    add_model_arguments,
    add_sampling_arguments,
    check_picture,
    first_then_rest,
    load_model,
    sampling_options,
    show,
)
from l4jax.inference.options import CHAT_TOKENS

HELP = """\
/image FILE  show a picture with the next message
/reset       begin anew
/save FILE   write the conversation as JSON
/help        this list
/quit        leave; so does Ctrl-D
Ctrl-C stops an answer."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--system", metavar="TEXT", help="what the model is told before the conversation")
    parser.add_argument("--image", action="append", default=[], metavar="FILE", help="a picture for the first message")
    add_sampling_arguments(parser, max_new_tokens=CHAT_TOKENS, seed=None)


def run(args: argparse.Namespace) -> int:
    options = sampling_options(args)
    for path in args.image:
        check_picture(path)
    model = load_model(args)
    chat = Chat(model, options, system=args.system)
    chat.pictures += args.image
    _ = model.processor  # a model without a tokenizer should say so before the first message
    if sys.stdin.isatty():
        print(f"{args.model} · /help lists the commands")
    for line in lines():
        if not chat.take(line):
            break
    return 0


def lines() -> Iterator[str]:
    """Yields what is typed, or what comes through a pipe, line by line."""
    if not sys.stdin.isatty():
        yield from (line.rstrip("\n") for line in sys.stdin)
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (history and editing; not on every platform)
    while True:
        try:
            yield input("> ")
        except KeyboardInterrupt:
            print("\n/quit or Ctrl-D leaves")
        except EOFError:
            print()
            return


class Chat:
    """A conversation and the commands that act on it."""

    def __init__(self, model, options: dict[str, Any], system: str | None = None):
        self.model, self.options = model, options
        self._opening = [{"role": "system", "content": system}] if system else []
        self.messages: list[dict[str, Any]] = list(self._opening)
        self.pictures: list[str] = []
        """Paths that go with the next message."""

    def take(self, line: str) -> bool:
        """Obeys a command or answers a message; returns whether to go on. What goes wrong is said, and forgotten."""
        command, _, argument = line.strip().partition(" ")
        try:
            if command == "/quit":
                return False
            if command == "/help":
                print(HELP)
            elif command == "/reset":
                self.messages, self.pictures = list(self._opening), []
                print("a new conversation")
            elif command == "/image":
                if not argument.strip():
                    raise ValueError("which picture? write /image FILE")
                size = check_picture(argument.strip())
                self.pictures.append(argument.strip())
                print(f"{argument.strip()}, {size}, goes with the next message")
            elif command == "/save":
                self.save(argument.strip())
            elif command.startswith("/"):
                print(f"no command {command}; /help lists them")
            elif line.strip() or self.pictures:
                self.answer(line)
        except (ValueError, OSError, ModuleNotFoundError) as error:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return True

    def save(self, path: str) -> None:
        """Writes the messages, as `Processor.encode` takes them."""
        if not path:
            raise ValueError("to which file? write /save FILE")
        Path(path).write_text(json.dumps(self.messages, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"{len(self.messages)} messages in {path}")

    def answer(self, text: str) -> None:
        """Says a message to the model and prints its answer as it comes; Ctrl-C keeps what was said so far."""
        content = [{"type": "image", "path": path} for path in self.pictures]
        message = {"role": "user", "content": [*content, {"type": "text", "text": text}]}
        said, stopped = "", False
        try:
            pieces = self.model.chat([*self.messages, message], stream=True, **self.options)
            for piece in first_then_rest(pieces, "reading"):
                show(piece)
                said += piece
        except KeyboardInterrupt:
            stopped = True
        print(" [stopped]" if stopped else "")
        self.messages += [message, {"role": "assistant", "content": said}]
        self.pictures = []
