"""From the settings under `data` to endless streams of documents, one a source, and to the batches of a run."""

import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import grain
import numpy as np
from PIL import Image

from l4jax.config import Llama4Config
from l4jax.data.balance import Entries, balanced_indices
from l4jax.data.config import DataConfig, DigitsConfig, SourceConfig
from l4jax.data.digits import HELD_OUT, TRAINING, WARM_UP
from l4jax.data.encode import Encoder, Skipped
from l4jax.data.made import Captions, Draw, Made, PythonDocs, Recall
from l4jax.data.pipeline import PackedBatches, Stream
from l4jax.data.scenes import SceneSource, Split, build_scenes, conversation
from l4jax.data.schema import Document, DocumentError
from l4jax.data.sources import Source, open_source
from l4jax.processing.chat import Processor
from l4jax.processing.tokenizer import ByteTokenizer, load_tokenizer

# How often each question is asked in training. The sum is the hardest, and its steps name every digit too.
QUESTION_SHARES = {"what is written?": 0.35, "what is top left?": 0.15, "what is the sum?": 0.5}
WARM_UP_DIGITS = (1, 1, 1, 2, 1, 1, 1, 3, 1, 1, 1, 4)  # mostly one; a few of each kind soften the change to all kinds
MANY_PASSES = 1_000_000  # grain appends nothing to an endless data set, so streams are only very long


def make_processor(config: DataConfig, model: Llama4Config) -> Processor:
    """Returns what encodes the documents of a run.

    Raises:
        FileNotFoundError: `data.tokenizer` is no directory with a tokenizer.
        ValueError: the tokenizer is of another model.
    """
    if config.tokenizer == "bytes":
        tokenizer = ByteTokenizer(model.text_config.vocab_size)
    else:
        tokenizer = load_tokenizer(config.tokenizer)
    return Processor.for_model(tokenizer, model, max_tiles=config.max_tiles, max_frames=config.max_frames)


def make_batches(
    config: DataConfig, processor: Processor, seed: int, directory: Path, *, shard: tuple[int, int] = (0, 1)
) -> PackedBatches:
    """Returns the endless batches of a run.

    Args:
        config: the mixture and the shape of a batch.
        processor: the model's.
        seed: of the order of the documents, and of the scenes.
        directory: where scenes and line indices are kept.
        shard: number of this process, from 0, and of all that train together; each makes its part of the rows.
    """
    index, count = shard
    if config.rows % count:
        raise ValueError(f"data.rows={config.rows} is not divisible by the {count} processes that train together")
    encoder = make_encoder(config, processor)
    tile_size = processor.vision_config.image_size if processor.vision_config else 0
    streams = {
        name: open_stream(name, source, config, seed=seed, tile_size=tile_size, directory=directory)
        for name, source in config.sources.items()
    }
    return PackedBatches(
        streams, encoder, rows=config.rows // count, num_workers=config.num_workers, shard=(index, count)
    )


def make_eval_batches(config: DataConfig, processor: Processor, seed: int, directory: Path) -> list[PackedBatches]:
    """Returns, for each source, the batches of one pass over it, in order; the same documents every time.

    The arguments are those of `make_batches`.
    """
    tile_size = processor.vision_config.image_size if processor.vision_config else 0
    streams = {}
    for name, source in config.sources.items():
        if source.digits is not None:
            raise ValueError(f"evaluate: {name} has digits; scenes are for `l4jax demo`, captions for evaluations")
        stream = open_stream(name, source, config, seed=seed, tile_size=tile_size, directory=directory)
        streams[name] = replace(stream, documents=stream.documents[: stream.length])

    def one_source(chosen: str) -> PackedBatches:
        alone = {name: replace(stream, weight=float(name == chosen)) for name, stream in streams.items()}
        return PackedBatches(alone, make_encoder(config, processor), rows=config.rows)

    return [one_source(name) for name in streams]


def make_documents(source: SourceConfig, tile_size: int, seed: int) -> Made | None:
    """Returns the documents of a source that is made on this machine; None for a path."""
    if source.captions is not None:
        if not tile_size:
            raise ValueError("model.vision_config is missing; captions have pictures")
        return Captions(source.captions, tile_size, seed)
    if source.python_docs is not None:
        return PythonDocs(source.python_docs)
    return None if source.recall is None else Recall(source.recall)


def make_encoder(config: DataConfig, processor: Processor) -> Encoder:
    """Returns what makes examples of a run's documents."""
    return Encoder(
        processor,
        row_tokens=config.row_tokens,
        row_tiles=config.row_tiles if processor.vision_config else 0,
        long_documents=config.long_documents,
        skip_malformed=config.skip_malformed,
    )


def open_stream(
    name: str, source: SourceConfig, config: DataConfig, *, seed: int, tile_size: int, directory: Path
) -> Stream:
    """Returns one source as an endless stream, in an order of its own.

    Raises:
        FileNotFoundError: its path is not there.
        ValueError: it holds no documents, or none that can be read.
    """
    if source.digits is not None:
        documents, length = _scenes(source.digits, seed, tile_size, directory)
        return Stream(documents, source.weight, length)
    # The order depends on the name, not on what else is in the mixture.
    own_seed = int(np.random.SeedSequence([seed, zlib.crc32(name.encode())]).generate_state(1)[0])
    made = make_documents(source, tile_size, own_seed)
    if made is not None:
        indices = grain.MapDataset.range(len(made)).seed(own_seed)
        indices = indices.shuffle() if config.shuffle else indices
        return Stream(indices.repeat(MANY_PASSES).random_map(Draw(made)), source.weight, len(made))
    opened = open_source(source.path, split=source.split, picture_dir=source.picture_dir, cache_dir=directory / "lines")
    if not len(opened):
        raise ValueError(f"data.sources.{name}: {source.path} holds no documents")
    length, guarded = len(opened), _Guarded(opened, config.skip_malformed)
    if source.balance is not None:
        indices = balanced_indices(opened, Entries.read(source.balance.entries), source.balance.most, own_seed)
        if not len(indices):
            raise ValueError(f"data.sources.{name}: no document has an entry of {source.balance.entries}")
        guarded, length = _Chosen(guarded, indices), len(indices)
    documents = grain.MapDataset.source(guarded).seed(own_seed)
    if config.shuffle:
        documents = documents.shuffle()
    return Stream(documents.repeat(MANY_PASSES), source.weight, length)


@dataclass(frozen=True)
class _Guarded:
    """A source that gives `Skipped` for what cannot be read, if that is wanted."""

    source: Source
    skip_malformed: bool

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Document | Skipped:
        try:
            return self.source[index]
        except DocumentError as error:
            if self.skip_malformed:
                return Skipped(str(error))
            raise DocumentError(f"{error} (data.skip_malformed=true leaves such documents out)") from None


@dataclass(frozen=True)
class _Chosen:
    """Some documents of a source."""

    source: _Guarded
    indices: np.ndarray

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Document | Skipped:
        return self.source[int(self.indices[index])]


# --- Scenes of digits -----------------------------------------------------------------------------------------------


def open_scenes(config: DigitsConfig, seed: int, tile_size: int, directory: Path, split: str) -> SceneSource:
    """Returns the scenes of a split (`train`, `eval` or `warm_up`), built under `directory` on first use."""
    if not tile_size:
        raise ValueError("model.vision_config is missing; the scenes are pictures")
    splits = {
        "train": Split(config.train_part, config.train_scenes, TRAINING),
        "eval": Split(config.eval_part, config.eval_scenes, HELD_OUT),
    }
    if config.warm_up_scenes:
        splits["warm_up"] = Split(config.train_part, config.warm_up_scenes, WARM_UP, WARM_UP_DIGITS)
    return SceneSource(build_scenes(directory, splits=splits, tile_size=tile_size, seed=seed), split)


def _scenes(config: DigitsConfig, seed: int, tile_size: int, directory: Path) -> tuple[grain.MapDataset, int]:
    """Returns documents, first of the easy scenes, then of all kinds, shuffled anew in every pass; and their number."""

    def shuffled(split: str, seed: int) -> grain.MapDataset:
        return grain.MapDataset.source(open_scenes(*of, split)).seed(seed).shuffle()

    of = config, seed, tile_size, directory
    order = [shuffled("train", 2 * seed).repeat(MANY_PASSES)]
    if config.warm_up_scenes:
        order.insert(0, shuffled("warm_up", 2 * seed + 1))
    scenes = grain.MapDataset.concatenate(order)
    return scenes.random_map(_Ask(config.blank_images)), config.warm_up_scenes + config.train_scenes


@dataclass(frozen=True)
class _Ask:
    """Asks one question about a scene, and answers it."""

    blank_images: bool

    def __call__(self, scene: tuple[Image.Image, str], rng: np.random.Generator) -> Document:
        image, digits = scene
        question = rng.choice(list(QUESTION_SHARES), p=list(QUESTION_SHARES.values()))
        image = Image.new(image.mode, image.size) if self.blank_images else image
        return Document(f"scene {digits}", messages=tuple(conversation(image, digits, str(question))))
