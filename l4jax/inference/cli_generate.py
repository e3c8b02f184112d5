"""`l4jax generate`: one prompt, one answer, streamed to stdout or as one JSON object."""

import argparse
import json
import sys
import time
from typing import Any

from l4jax.inference.cli_common import (
    add_model_arguments,
    add_sampling_arguments,
    check_picture,
    first_then_rest,
    load_model,
    sampling_options,
    show,
    spinner,
)

IMAGE_PLACEHOLDER = "<|image|>"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument(
        "-p", "--prompt", required=True, metavar="TEXT", help="what to go on from; - reads it from stdin"
    )
    parser.add_argument(
        "--image",
        action="append",
        default=[],
        metavar="FILE",
        help="a picture; may be given several times; the prompt is then a message in a chat, unless "
        f"{IMAGE_PLACEHOLDER} in it says where each picture goes",
    )
    parser.add_argument("--video", metavar="FILE", help="a video or a folder of frames; the prompt is then a message")
    parser.add_argument("--chat", action="store_true", help="the prompt is a message in a chat also without pictures")
    add_sampling_arguments(parser, max_new_tokens=128, seed=0)
    parser.add_argument("--json", action="store_true", help="print one JSON object when done")


def run(args: argparse.Namespace) -> int:
    options = sampling_options(args)
    if args.prompt == "-":
        args.prompt = sys.stdin.read()
    if args.video and IMAGE_PLACEHOLDER in args.prompt:
        raise ValueError(f"a prompt with {IMAGE_PLACEHOLDER} takes pictures, not a video; leave the placeholder out")
    for path in args.image:
        check_picture(path)
    model = load_model(args)
    if args.json:
        started = time.monotonic()
        with spinner("generating"):
            answer = ask(model, args, options)
        print(json.dumps(report(answer, time.monotonic() - started)))
        return 0
    for piece in first_then_rest(ask(model, args, options | {"stream": True}), "reading the prompt"):
        show(piece)
    print()
    return 0


def ask(model, args: argparse.Namespace, options: dict[str, Any]):
    """Returns the answer, or its pieces, in the form that the arguments ask for."""
    has_pictures = bool(args.image or args.video)
    if not args.chat and (not has_pictures or IMAGE_PLACEHOLDER in args.prompt):
        return model.generate(args.prompt, images=args.image, **options)
    return model.chat([{"role": "user", "content": message_content(args)}], **options)


def message_content(args: argparse.Namespace) -> list[dict[str, str]]:
    """Returns pictures, video and text as the content of a message."""
    content = [{"type": "image", "path": path} for path in args.image]
    if args.video:
        content.append({"type": "video", "path": args.video})
    return [*content, {"type": "text", "text": args.prompt}]


def report(answer, seconds: float) -> dict[str, Any]:
    """Returns an answer as JSON; `seconds` include compilation."""
    return {
        "text": answer.text,
        "ids": answer.ids,
        "finish_reason": answer.finish_reason,
        "usage": {"prompt_tokens": answer.prompt_tokens, "completion_tokens": answer.completion_tokens},
        "seconds": round(seconds, 3),
    }
