"""What a run reads: from its settings to batches, and to scenes for evaluation."""

from pathlib import Path

from PIL import Image

from l4jax.data.config import DigitsConfig
from l4jax.data.pipeline import PackedBatches
from l4jax.data.streams import make_batches, make_eval_batches, make_processor, open_scenes
from l4jax.train.config import RunConfig


class RunData:
    """The data of a run; what is made of them on first use (scenes, line indices) is kept under `directory`."""

    def __init__(self, config: RunConfig, directory: Path):
        self._config, self._directory = config, directory
        self.processor = make_processor(config.data, config.model)
        self.source_names = list(config.data.sources)
        """In the order of `source_ids`, which count from 1."""

    def training_batches(self, shard: tuple[int, int] = (0, 1)) -> PackedBatches:
        """Returns endless batches; `shard` is the number of this process and of all that train together."""
        return make_batches(self._config.data, self.processor, self._config.seed, self._directory, shard=shard)

    def evaluation_batches(self, name: str) -> list[PackedBatches]:
        """Returns the batches of one of `config.evaluate`, source by source; they end."""
        data = self._config.evaluation_data(name)
        return make_eval_batches(data, self.processor, self._config.seed, self._directory)

    def eval_scenes(self) -> list[tuple[Image.Image, str]]:
        """Returns scenes of digits that training never saw: pictures as this run shows them, and their digits."""
        digits, vision = digits_settings(self._config), self._config.model.vision_config
        source = open_scenes(digits, self._config.seed, vision.image_size, self._directory, "eval")
        scenes = [source[index] for index in range(len(source))]
        if digits.blank_images:
            return [(Image.new(image.mode, image.size), text) for image, text in scenes]
        return scenes


def digits_settings(config: RunConfig) -> DigitsConfig:
    """Returns the settings of the first source that consists of scenes of digits.

    Raises:
        ValueError: there is none.
    """
    for source in config.data.sources.values():
        if source.digits is not None:
            return source.digits
    raise ValueError("no source under data.sources has digits; there are no scenes to evaluate on")
