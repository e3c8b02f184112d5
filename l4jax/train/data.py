"""What a run reads: from the settings under `data` to batches and to scenes for evaluation."""

from pathlib import Path

import grain
import numpy as np
from PIL import Image

from l4jax.config import Llama4Config
from l4jax.data.digits import HELD_OUT, TRAINING, WARM_UP
from l4jax.data.pipeline import batches, conversations
from l4jax.data.scenes import SceneSource, Split, build_scenes, conversation
from l4jax.processing.chat import Message, Processor
from l4jax.processing.tokenizer import ByteTokenizer
from l4jax.train.config import DataConfig, RunConfig

# How often each question is asked in training. The sum is the hardest, and its steps name every digit too.
QUESTION_SHARES = {"what is written?": 0.35, "what is top left?": 0.15, "what is the sum?": 0.5}
WARM_UP_DIGITS = (1, 1, 1, 2, 1, 1, 1, 3, 1, 1, 1, 4)  # mostly one; a few of each kind soften the change to all kinds
MANY_PASSES = 1_000_000  # grain appends nothing to an endless data set, so this one is only very long


def make_processor(config: Llama4Config) -> Processor:
    """Returns the processor of a model with bytes for tokens."""
    return Processor.for_model(ByteTokenizer(config.text_config.vocab_size), config)


class RunData:
    """The scenes of a run: built on first use under `directory`, then read from there."""

    def __init__(self, config: RunConfig, directory: Path):
        self.config: DataConfig = config.data
        self.seed, self.model = config.seed, config.model
        if config.model.vision_config is None:
            raise ValueError("model.vision_config is missing; the scenes are pictures")
        splits = {
            "train": Split(self.config.train_part, self.config.train_scenes, TRAINING),
            "eval": Split(self.config.eval_part, self.config.eval_scenes, HELD_OUT),
        }
        if self.config.warm_up_scenes:
            splits["warm_up"] = Split(self.config.train_part, self.config.warm_up_scenes, WARM_UP, WARM_UP_DIGITS)
        tile_size = config.model.vision_config.image_size
        self._builder = build_scenes(directory, splits=splits, tile_size=tile_size, seed=self.seed)
        self._eval = SceneSource(self._builder, "eval")

    def training_batches(self, shard: tuple[int, int] = (0, 1)) -> grain.IterDataset:
        """Returns endless batches: first the easy scenes, then all kinds, shuffled anew in every pass.

        `shard` is the number of this part of the rows, and how many parts are fed by processes that train together.
        """
        index, count = shard
        if self.config.rows % count:
            raise ValueError(f"data.rows={self.config.rows} is not divisible by {count} processes that train together")
        order = [self._shuffled("train", seed=2 * self.seed).repeat(MANY_PASSES)]
        if self.config.warm_up_scenes:
            order.insert(0, self._shuffled("warm_up", seed=2 * self.seed + 1))
        examples = conversations(grain.MapDataset.concatenate(order), self._ask, make_processor(self.model))
        config, examples = self.config, examples[index::count]
        return batches(examples, rows=config.rows // count, row_tokens=config.row_tokens, row_tiles=config.row_tiles)

    def eval_scene(self, index: int) -> tuple[Image.Image, str]:
        """Returns a scene of digits that training never saw: the picture as this run shows it, and its digits."""
        image, digits = self._eval[index]
        return self._show(image), digits

    def _show(self, image: Image.Image) -> Image.Image:
        return Image.new(image.mode, image.size) if self.config.blank_images else image

    def _shuffled(self, split: str, seed: int) -> grain.MapDataset:
        return grain.MapDataset.source(SceneSource(self._builder, split)).seed(seed).shuffle()

    def _ask(self, scene: tuple[Image.Image, str], rng: np.random.Generator) -> list[Message]:
        image, digits = scene
        question = rng.choice(list(QUESTION_SHARES), p=list(QUESTION_SHARES.values()))
        return conversation(self._show(image), digits, str(question))
