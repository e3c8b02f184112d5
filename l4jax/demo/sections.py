"""What the demo's report shows: answers beside the truth, how a picture is cut, curves, expert load, settings."""

import os
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import yaml
from PIL import Image

from l4jax import report
from l4jax.data.digits import NUM_TRAIN, classical_accuracy
from l4jax.data.scenes import QUESTIONS, answer, conversation
from l4jax.inference.loaded import LoadedModel
from l4jax.model.params import flat_params
from l4jax.processing.image import tile_boxes
from l4jax.train.answers import ReadingScore
from l4jax.train.config import RunConfig, run_config_to_dict
from l4jax.train.data import digits_settings
from l4jax.train.metrics import read_metrics

SHOWN_SCENES, SHOWN_MISTAKES = 24, 8
KIND_COLOURS = {
    "text": "#c9d2df",
    "control": "#8b97a8",
    "patch": "#f0a13c",
    "tile separator": "#b5562b",
    "answer": "#2b6cb0",
}

Scene = tuple[Image.Image, str]


def write_demo_report(
    path: Path,
    *,
    config: RunConfig,
    model: LoadedModel,
    scenes: Sequence[Scene],
    answers: dict[str, list[str]],
    score: ReadingScore,
    blind: ReadingScore,
    seconds: float,
) -> None:
    """Writes `report.html` beside the metrics of the run."""
    lines = read_metrics(path.parent / "metrics.jsonl")
    total, active = count_parameters(model)
    numbers = [
        (f"{score.digits:.1%}", f"of the digits in {len(scenes):,} scenes are read right"),
        (f"{score.scenes:.1%}", "of whole scenes: every digit right, in order, none added"),
        (
            f"{classical_accuracy():.1%}",
            "of single digits, upright and in place, by a support vector machine on pixels",
        ),
        (f"{blind.digits:.1%}", "of the digits when the pictures are black: what is known without looking"),
        (f"{active / 1e6:.1f} of {total / 1e6:.1f} M", "parameters are at work on a token"),
        (f"{seconds / 60:.1f} min", f"for everything, {config.steps:,} training steps among it"),
    ]
    held_out = "black pictures" if digits_settings(config).blank_images else "pictures"
    subtitle = (
        f"Trained on scenes composed of {NUM_TRAIN:,} real handwritten digits, saved, reloaded, and asked about "
        f"{held_out} made of digits that it never saw. Seed {config.seed}."
    )
    sections = [
        answers_section(scenes, answers),
        sight_section(model, scenes),
        curves_section(lines),
        load_section(lines, model),
        settings_section(yaml.safe_dump(run_config_to_dict(config), sort_keys=False)),
    ]
    report.write_report(
        path, title="A small Llama 4 reads handwriting", subtitle=subtitle, numbers=numbers, sections=sections
    )


def answers_section(scenes: Sequence[Scene], answers: dict[str, list[str]]) -> str:
    def card(index: int) -> str:
        image, digits = scenes[index]
        return report.scene_card(
            image,
            [report.Answer(question, said[index], answer(digits, question)) for question, said in answers.items()],
        )

    shares = [
        (question, f"{sum(a == answer(d, question) for a, (_, d) in zip(said, scenes, strict=True)) / len(scenes):.1%}")
        for question, said in answers.items()
    ]
    wrong = [i for i, (_, digits) in enumerate(scenes) if answers[QUESTIONS[0]][i] != digits]
    shown = range(min(SHOWN_SCENES, len(scenes)))
    return report.section(
        "What it says",
        f"The first {len(shown)} held-out scenes as they come, then some of the {len(wrong)} of {len(scenes):,} that "
        "were misread. The sum is written out step by step.",
        report.table(("question", "answers that are right to the last character"), shares),
        report.scene_cards([card(i) for i in shown]),
        "<p class='soft' style='margin-top:18px'>Misread:</p>" if wrong else "",
        report.scene_cards([card(i) for i in wrong[:SHOWN_MISTAKES]]),
    )


def sight_section(model: LoadedModel, scenes: Sequence[Scene]) -> str:
    image, digits = max(scenes[:SHOWN_SCENES], key=lambda scene: (scene[0].width * scene[0].height, scene[1]))
    vision, text = model.config.vision_config, model.config.text_config
    encoded = model.processor.encode(conversation(image, digits, "what is the sum?"), add_generation_prompt=False)
    whole = Image.fromarray(((encoded.tiles[-1, 0] + 1) * 127.5).round().astype("uint8"))
    boxes = tile_boxes(image.height, image.width, image_size=vision.image_size)
    special = {index: name for name, index in model.tokenizer.special.items()}
    kinds = [
        "answer" if is_answer else token_kind(special.get(int(index)))
        for index, is_answer in zip(encoded.ids, encoded.answer_mask, strict=True)
    ]
    return report.section(
        "How it sees",
        f"A picture is cut into tiles of {vision.image_size} x {vision.image_size} pixels, and one squashed view of "
        f"the whole is added. Each tile becomes {vision.tokens_per_tile} tokens among the bytes of the question. "
        f"Three of four layers attend inside chunks of {text.attention_chunk_size} tokens only; the fourth has no "
        "positions and sees everything, so it alone carries what was seen to an answer beyond the edge.",
        '<div class="sight">',
        report.tile_overlay(image, boxes, 196, f"{len(boxes)} tiles, in reading order"),
        report.framed(whole, 98, "the whole, squashed"),
        "</div>",
        report.token_strip(kinds, text.attention_chunk_size, KIND_COLOURS),
    )


def token_kind(control: str | None) -> str:
    """Returns the kind of a token of the question: by the name of its control token, None for text."""
    if control is None:
        return "text"
    if control == "<|patch|>":
        return "patch"
    return "tile separator" if "separator" in control else "control"


def curves_section(lines: Sequence[dict]) -> str:
    steps = [line["step"] for line in lines]

    def curve(name: str, caption: str) -> str:
        return report.curve(steps, [line[name] for line in lines], caption, low=0.0)

    return report.section(
        "How it learned",
        "By training step. The loss counts on the answers alone.",
        report.charts(
            curve("loss", "loss, nats a token of an answer"),
            curve("accuracy", "share of answer tokens that were likeliest"),
            curve("learning_rate", "learning rate"),
            curve("tokens_per_second", "tokens a second"),
        ),
    )


def load_section(lines: Sequence[dict], model: LoadedModel) -> str:
    text = model.config.text_config
    maps = report.load_map(
        [line["step"] for line in lines],
        [line["router_load"] for line in lines],
        [layer + 1 for layer in text.moe_layers],
    )
    return report.section(
        "Where tokens went",
        f"Each token is sent to one of {text.num_local_experts} experts in every layer, besides the one that all "
        "share. White is the even share, blue less, orange more. A bias on the choice, which is no part of the model "
        "that comes out, evens the load.",
        report.charts(*maps),
    )


def settings_section(settings: str) -> str:
    packages = ", ".join(f"{name} {version(name)}" for name in ("l4jax", "jax", "flax", "optax", "grain"))
    machine = f"{os.cpu_count()} CPU cores, {platform.machine()}, Python {platform.python_version()}"
    return report.section("Made with", f"{packages}; {machine}.", report.details("all settings", settings))


def count_parameters(model: LoadedModel) -> tuple[int, int]:
    """Returns the number of parameters, and of those that are used for one token."""
    text = model.config.text_config
    sizes = {path: array.size for path, array in flat_params(model.model).items()}
    experts = sum(size for path, size in sizes.items() if ".feed_forward.experts." in path)
    total = sum(sizes.values())
    return total, total - experts + experts * text.num_experts_per_tok // max(text.num_local_experts, 1)
