"""The command line: `l4jax VERB ...`. A verb's module is imported when the verb is typed, so that help comes at once.

A verb's module has `add_arguments(parser)` and `run(args) -> int`, the exit code, and imports jax only in `run`.
What a user can cause ends here as one line, `error: what; how to mend it`.
"""

import argparse
import difflib
import importlib
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn


@dataclass(frozen=True)
class Verb:
    """One command."""

    module: str
    summary: str
    example: str


VERBS = {
    "demo": Verb(
        "l4jax.demo",
        "train a tiny multimodal model on real pictures, let it read pictures it never saw, write a report",
        "l4jax demo",
    ),
    "train": Verb(
        "l4jax.train.cli", "run what a config file describes, or go on with it", "l4jax train configs/demo.yaml"
    ),
    "sweep": Verb(
        "l4jax.sweep",
        "train one run in several variants and with several seeds, and compare: an experiment",
        "l4jax sweep configs/experiments/captioning.yaml --jobs 2",
    ),
    "data": Verb(
        "l4jax.data.cli",
        "what is in a file of documents or a mixture, what cannot be read, and what the model will see of it",
        "l4jax data web.jsonl --html web.html",
    ),
    "convert": Verb(
        "l4jax.checkpoint.convert",
        "Hugging Face or Meta weights to an l4jax checkpoint, and back; resumable, verified",
        "l4jax convert Llama-4-Scout-17B-16E-Instruct scout",
    ),
    "inspect": Verb(
        "l4jax.checkpoint.inspect",
        "what a checkpoint holds, from headers alone; every byte with --verify",
        "l4jax inspect scout --verify",
    ),
    "generate": Verb(
        "l4jax.inference.cli_generate",
        "how a model goes on after a prompt, or what it says to a picture",
        'l4jax generate -m scout -p "The capital of France is" -n 16 --temperature 0',
    ),
    "chat": Verb("l4jax.inference.cli_chat", "talk with a model, about pictures too", "l4jax chat -m scout"),
    "plan": Verb(
        "l4jax.plan",
        "does it fit on these devices, what does it cost, what binds; compiled without having them",
        "l4jax plan -m scout --topology v5p:4x4x4 --mesh fsdp=4,expert=16 --mode train --batch 64 --length 4096",
    ),
    "doctor": Verb(
        "l4jax.doctor", "versions, devices, memory, what is missing and the line that installs it", "l4jax doctor"
    ),
}

# What files, arguments and machines do wrong. Anything else is a mistake of ours, and says so.
USER_ERRORS = (ValueError, OSError, KeyError, ModuleNotFoundError, MemoryError)


class UsageError(Exception):
    """The command line itself is wrong."""


class Parser(argparse.ArgumentParser):
    """Raises UsageError instead of leaving, and names the nearest flag to one it does not know."""

    def parse_args(self, arguments: Sequence[str]) -> argparse.Namespace:
        self._given = [argument.split("=")[0] for argument in arguments]
        # Flags may stand between `KEY=VALUE` words, and before them.
        return super().parse_intermixed_args(arguments)

    def error(self, message: str) -> NoReturn:
        # argparse would first complain of the required flag that the misspelt one should have been.
        for flag in self._given:
            if flag.startswith("--") and len(flag) > 2 and flag not in self._option_string_actions:
                message = f"unknown flag {flag}; {nearest(flag, self._option_string_actions)}"
                break
        else:
            message = f"{message}; see {self.prog} --help"
        raise UsageError(message)


def nearest(word: str, known: Sequence[str]) -> str:
    """Returns a hint: the known word that is most like `word`, or all of them."""
    near = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0, 1 for failed, 2 for misused, 130 for interrupted."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    try:
        return run(arguments)
    except SystemExit as end:  # argparse, after it has printed help
        return end.code or 0
    except UsageError as error:
        return fail(str(error), 2)
    except KeyboardInterrupt:
        return fail("interrupted", 130, label="")
    except BrokenPipeError:  # whoever read our output has left; nothing to say, and nowhere to say it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:  # the border of the program: nothing passes it but one line and an exit code
        if debug:
            traceback.print_exc()
        return fail(describe(error), 1)


def run(arguments: list[str]) -> int:
    """Finds the verb, parses its arguments and runs it."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(overview())
        return 0 if arguments else 2
    verb, *rest = arguments
    if verb == "--version":
        from importlib.metadata import version

        print(f"l4jax {version('l4jax')}")
        return 0
    if verb not in VERBS:
        raise UsageError(f"unknown verb {verb!r}; {nearest(verb, list(VERBS))}")
    warnings.showwarning = show_warning
    module = importlib.import_module(VERBS[verb].module)
    parser = Parser(
        prog=f"l4jax {verb}",
        description=VERBS[verb].summary.capitalize() + ".",
        epilog=f"example:\n  {VERBS[verb].example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    module.add_arguments(parser)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return module.run(parser.parse_args(rest))


def overview() -> str:
    """Returns the help of the whole program."""
    width = max(map(len, VERBS))
    lines = [f"  {name:{width}}  {verb.summary}" for name, verb in VERBS.items()]
    return "\n".join(
        [
            "usage: l4jax VERB ...",
            "",
            "Llama 4 in JAX: load, look, chat, train.",
            "",
            *lines,
            "",
            "l4jax VERB --help tells more. A model is an l4jax, Hugging Face or Meta directory, or a preset.",
        ]
    )


def describe(error: BaseException) -> str:
    """Returns an error as one line."""
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    elif isinstance(error, KeyError) and error.args:
        text = str(error.args[0])
    elif isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        text = "not enough memory; choose a smaller --max-len, a smaller dtype or a smaller model"
    else:
        text = str(error)
    text = " ".join(text.split()) or type(error).__name__
    if isinstance(error, USER_ERRORS) or "RESOURCE_EXHAUSTED" in str(error):
        return text
    return f"{type(error).__name__}: {text}; this is a mistake in l4jax, --debug shows where"


def fail(message: str, code: int, *, label: str = "error: ") -> int:
    print(f"{label}{message}", file=sys.stderr)
    return code


def show_warning(message, category, filename, lineno, file=None, line=None) -> None:
    """Shows a warning as a user reads it, without the place in the code."""
    print(f"warning: {' '.join(str(message).split())}", file=sys.stderr)
