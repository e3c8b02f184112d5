"""`l4jax demo`: a small Llama 4 learns to read handwriting, is saved, reloaded and asked about pictures it never saw.

The model has everything that the released ones have: a vision tower over tiles, chunked and NoPE layers, routed and
shared experts. One directory holds what comes out: the run (settings, metrics, checkpoints), the model, the report.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from l4jax.host import keep_freed_memory
from l4jax.train.cli import add_run_arguments, interrupted

if TYPE_CHECKING:
    from PIL import Image

    from l4jax.inference.loaded import LoadedModel
    from l4jax.train.answers import BatchAnswerer, ReadingScore

CONFIG = Path(__file__).parents[2] / "configs" / "demo.yaml"
DIGITS = "data.sources.scenes.digits"
FAST = (
    *("steps=30", "log_every=3"),
    *(f"{DIGITS}.train_scenes=600", f"{DIGITS}.warm_up_scenes=200", f"{DIGITS}.eval_scenes=64"),
)
READING = "what is written?"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--fast", action="store_true", help="a smoke run of under a minute; the model stays illiterate")
    parser.add_argument("--seed", type=int, default=0, help="of weights, scenes and their order (default: 0)")
    add_run_arguments(parser)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), metavar="DIR", help="default: %(default)s")


def run(args: argparse.Namespace) -> int:
    started = time.perf_counter()
    keep_freed_memory()
    from PIL import Image
    from rich.console import Console

    import l4jax
    from l4jax.data.scenes import QUESTIONS
    from l4jax.demo.sections import write_demo_report
    from l4jax.train.config import load_run_config
    from l4jax.train.data import RunData, digits_settings
    from l4jax.train.export import export
    from l4jax.train.loop import train

    console = Console(highlight=False)
    settings = [f"seed={args.seed}", *(FAST if args.fast else ()), *args.settings]
    config = load_run_config(CONFIG, settings)
    console.print(f"building {digits_settings(config).train_scenes:,} scenes of real handwritten digits")
    data = RunData(config, args.out / "data")

    trained = train(config, data, args.out, resume=args.resume, console=console)
    if trained.interrupted_by is not None:
        return interrupted(trained.interrupted_by, trained.steps)

    model = l4jax.load(export(trained.model(), data.processor.tokenizer, args.out / "model"))
    scenes = data.eval_scenes()
    console.print(f"saved and reloaded {args.out / 'model'}; reading {len(scenes):,} scenes it never saw")
    answerer = make_answerer(model)
    answers = {q: answerer.answer([prompt(image, q) for image, _ in scenes]) for q in QUESTIONS}
    black = answerer.answer([prompt(Image.new(image.mode, image.size), READING) for image, _ in scenes])
    score, blind = reading_score(answers[READING], scenes), reading_score(black, scenes)
    show_chat(console, model, scenes[0][0])
    console.print(
        f"digits {score.digits:.3f}, whole scenes {score.scenes:.3f}; digits when pictures are black {blind.digits:.3f}"
    )

    path = args.out / "report.html"
    seconds = time.perf_counter() - started
    write_demo_report(
        path,
        config=config,
        model=model,
        scenes=scenes,
        answers=answers,
        score=score,
        blind=blind,
        seconds=seconds,
    )
    console.print(f"report: {path} ({seconds / 60:.1f} minutes)")
    return 0


# --- Questions ------------------------------------------------------------------------------------------------------


def prompt(image: "Image.Image", question: str) -> list[dict]:
    """Returns the messages that ask a question about a picture."""
    return [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}]


def make_answerer(model: "LoadedModel") -> "BatchAnswerer":
    """Returns what answers many questions about scenes at once."""
    from flax import nnx

    from l4jax.data.scenes import MAX_ANSWER, MAX_TILES
    from l4jax.train.answers import BatchAnswerer

    graphdef, params = nnx.split(model.model)
    return BatchAnswerer(
        graphdef,
        nnx.to_pure_dict(params),
        model.processor,
        batch_size=128,
        prompt_tokens=model.config.text_config.max_position_embeddings - MAX_ANSWER,
        prompt_tiles=MAX_TILES,
        new_tokens=MAX_ANSWER,
    )


def reading_score(answers: Sequence[str], scenes: Sequence) -> "ReadingScore":
    from l4jax.train.answers import ReadingScore

    return ReadingScore.of(answers, [digits for _, digits in scenes])


def show_chat(console: Any, model: "LoadedModel", image: "Image.Image") -> None:
    """Prints one conversation about a picture, as anyone would have it with the saved model."""
    from l4jax.data.scenes import QUESTIONS

    for question in QUESTIONS:
        answer = model.chat(prompt(image, question), temperature=0, max_new_tokens=32)
        console.print(f"  {question} {answer}")
