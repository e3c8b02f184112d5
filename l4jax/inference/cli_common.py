"""What `generate` and `chat` share: arguments, loading with a sign of life, and the names of options."""

import argparse
import contextlib
import sys
import threading
import unicodedata
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from l4jax.host import keep_freed_memory
from l4jax.inference.options import DEFAULT_MAX_LEN, DTYPES, SamplingOptions

if TYPE_CHECKING:
    from l4jax.inference.loaded import LoadedModel

PATIENCE = 2.0
"""Seconds of silence before a spinner appears."""


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-m", "--model", required=True, metavar="PATH", help="checkpoint directory, or a preset's name")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="of the weights; auto: float32 on a CPU")
    parser.add_argument(
        "--max-len",
        type=int,
        metavar="N",
        help=f"tokens of prompt and answer together, for which memory is set aside (default: {DEFAULT_MAX_LEN})",
    )


def add_sampling_arguments(parser: argparse.ArgumentParser, *, max_new_tokens: int, seed: int | None) -> None:
    """Adds the fields of `SamplingOptions`, under the same names."""
    default = SamplingOptions()
    parser.add_argument(
        "-n", "--max-new-tokens", type=int, default=max_new_tokens, metavar="N", help="at most (default: %(default)s)"
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=default.temperature,
        metavar="X",
        help="0 takes the likeliest token every time (default: %(default)s)",
    )
    parser.add_argument(
        "--top-p",
        type=float,
        default=default.top_p,
        metavar="X",
        help="the likeliest tokens of this probability together (default: %(default)s)",
    )
    parser.add_argument("--top-k", type=int, default=default.top_k, metavar="N", help="this many of the likeliest")
    parser.add_argument(
        "--min-p", type=float, default=default.min_p, metavar="X", help="at least this fraction of the likeliest"
    )
    parser.add_argument(
        "--repetition-penalty",
        type=float,
        default=default.repetition_penalty,
        metavar="X",
        help="above 1: fewer repetitions",
    )
    said = "drawn anew" if seed is None else seed
    parser.add_argument("--seed", type=int, default=seed, metavar="N", help=f"of the random draws (default: {said})")
    parser.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        dest="stop_strings",
        help="end before this text; may be given several times",
    )


def sampling_options(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the sampling options on the command line, checked before a model is loaded.

    Raises:
        ValueError: one is impossible.
    """
    names = ("max_new_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "stop_strings")
    options = {name: getattr(args, name) for name in names}
    SamplingOptions.create(**options)
    return options


def check_picture(path: str) -> str:
    """Returns the size of a picture; to be called before a model is loaded, which may take minutes.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no picture.
    """
    from l4jax.processing.image import load_image

    image = load_image(path)
    return f"{image.width} x {image.height} pixels"


def load_model(args: argparse.Namespace) -> "LoadedModel":
    """Returns the model that the command line names."""
    keep_freed_memory()
    with spinner(f"loading {args.model}"):
        from l4jax.inference.loaded import load

        return load(args.model, dtype=args.dtype, max_len=args.max_len)


def show(text: str) -> None:
    """Prints a piece of an answer at once; on a terminal without control characters, which could command it."""
    if sys.stdout.isatty():
        text = "".join(letter for letter in text if letter in "\n\t" or unicodedata.category(letter) != "Cc")
    print(text, end="", flush=True)


@contextlib.contextmanager
def spinner(text: str) -> Iterator[None]:
    """Shows on a terminal, when something takes more than two seconds, that it goes on."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    status = Console(stderr=True).status(text)
    timer = threading.Timer(PATIENCE, status.start)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
        status.stop()


def first_then_rest(pieces: Iterator[str], text: str) -> Iterator[str]:
    """Yields `pieces`, under a spinner until the first one comes."""
    with spinner(text):
        first = next(pieces, None)
    if first is not None:
        yield first
        yield from pieces
