"""What `l4jax.load` returns: a model with its weights, its words and its pictures, ready to answer."""

import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Float32, Int

from l4jax.checkpoint import load as checkpoint
from l4jax.checkpoint import store
from l4jax.checkpoint.opening import open_checkpoint
from l4jax.checkpoint.source import Source
from l4jax.config import PRESETS, Llama4Config, preset
from l4jax.inference.engine import Engine
from l4jax.inference.generate import Event, Generation, Prompt, collect, stream
from l4jax.inference.options import CHAT_TOKENS, DEFAULT_MAX_LEN, DTYPES, SamplingOptions
from l4jax.model.llama4 import Llama4
from l4jax.model.params import abstract_model, flat_params, placed_params, with_params
from l4jax.model.quant import quantize_model
from l4jax.processing.chat import Message, Processor
from l4jax.processing.image import ImageSource
from l4jax.processing.tokenizer import BaseTokenizer, ByteTokenizer, load_tokenizer
from l4jax.sharding import SERVING, make_mesh, use_rules

NUM_RELEASED_IDS = 202_048

Ids = Sequence[int] | Int[np.ndarray, " T"]


class LoadedModel:
    """A model that generates, chats and scores. Made by `load`.

    Attributes:
        config: the architecture.
        model: the Flax module, for those who want to look inside.
        mesh: the devices that it lives on.
        max_len: tokens of prompt and answer together.
        tokenizer: None if the checkpoint has none.
    """

    def __init__(
        self, model: Llama4, *, mesh: Mesh, max_len: int, tokenizer: BaseTokenizer | None, directory: Path | None = None
    ):
        """Takes a module whose arrays lie on `mesh`; `directory` is where it came from, None for random weights."""
        self.config: Llama4Config = model.config
        self.model, self.mesh, self.max_len, self.tokenizer = model, mesh, max_len, tokenizer
        self._directory = directory

    @cached_property
    def engine(self) -> Engine:
        """The compiled steps, for those who schedule answers on their own."""
        return Engine(self.model, max_len=self.max_len, mesh=self.mesh)

    @cached_property
    def processor(self) -> Processor:
        """Words and pictures to ids and tiles, and back.

        Raises:
            FileNotFoundError: the checkpoint has no tokenizer.
        """
        if self.tokenizer is None:
            raise FileNotFoundError(
                f"no tokenizer in {self._directory or 'a preset of this size'}; put tokenizer.model (Meta) or "
                "tokenizer.json (Hugging Face) beside the weights, or give token ids"
            )
        return Processor.for_model(self.tokenizer, self.config)

    def generate(
        self,
        prompt: str | Ids | Sequence[str | Ids],
        *,
        images: Sequence[ImageSource] = (),
        tiles: Float32[np.ndarray, "n 3 X X"] | None = None,
        stream: bool = False,
        **sampling: Any,
    ) -> Generation | list[Generation] | Iterator[str]:
        """Returns how the model goes on after a plain prompt, or after each of several.

        Args:
            prompt: text, in which `<|image|>` stands for a picture, or token ids; or a list of either.
            images: the pictures of a prompt of text.
            tiles: the tiles of a prompt of ids.
            stream: yield pieces of text as they come.
            sampling: the fields of `SamplingOptions`, `max_new_tokens` and `temperature` among them.

        Raises:
            ValueError: prompt, pictures and model do not fit one another; an option is unknown or impossible.
            FileNotFoundError: the model has no tokenizer, or a picture is missing.
        """
        options = SamplingOptions.create(**sampling)
        several = not isinstance(prompt, str) and len(prompt) > 0 and not isinstance(prompt[0], int | np.integer)
        if several and (stream or len(images) or tiles is not None):
            raise ValueError("pictures and streaming are for one prompt; call generate for each")
        prompts = [self._prompt(one, images, tiles) for one in (prompt if several else [prompt])]
        events = self.stream(prompts, [options] * len(prompts))
        if stream:
            return (event.text for event in events if event.text)
        answers = collect(events, prompts)
        return answers if several else answers[0]

    def chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        stream: bool = False,
        **sampling: Any,
    ) -> Generation | Iterator[str]:
        """Returns the assistant's next message in a conversation; with `stream`, its text piece by piece.

        Args:
            messages: as `Processor.encode` takes them.
            tools: functions that the model may call.
            stream: yield pieces of text as they come.
            sampling: the fields of `SamplingOptions`; `max_new_tokens` is 1,024 here unless given.

        Raises:
            ValueError: messages, pictures and model do not fit one another; an option is unknown or impossible.
            FileNotFoundError: the model has no tokenizer, or a picture is missing.
        """
        options = SamplingOptions.create(**{"max_new_tokens": CHAT_TOKENS, **sampling})
        encoded = self.processor.encode(messages, tools=tools)
        prompts = [Prompt(encoded.ids, encoded.tiles)]
        events = self.stream(prompts, [options])
        if stream:
            return (event.text for event in events if event.text)
        return collect(events, prompts)[0]

    def stream(self, prompts: Sequence[Prompt], options: Sequence[SamplingOptions]) -> Iterator[Event]:
        """Yields the tokens of a batch, one event each: what `generate` and `chat` are made of."""
        return stream(self.engine, prompts, options, tokenizer=self.tokenizer, eos_token_id=self.eos_token_id)

    @property
    def eos_token_id(self) -> tuple[int, ...]:
        """The ids that end an answer: those of the config, and the tokenizer's ends of turn."""
        ours = self.tokenizer.stop_ids if self.tokenizer else ()
        return tuple(sorted({*self.config.text_config.eos_token_id, *ours}))

    def logits(
        self, ids: Int[np.ndarray, "..."] | Sequence, tiles: Float32[np.ndarray, "n 3 X X"] | None = None
    ) -> Float32[np.ndarray, "..."]:
        """Returns float32 logits [T, V] of every token of `ids` [T], or [B, T, V] of [B, T].

        Args:
            ids: token ids; rows of a batch have one length.
            tiles: of all pictures, in the order of their patch tokens, row after row.

        Raises:
            ValueError: ids and tiles do not fit one another or the model.
        """
        array = np.asarray(ids, np.int32)
        if array.ndim not in (1, 2):
            raise ValueError(f"ids have shape {list(array.shape)}, expected [T] or [B, T]")
        logits = self.engine.logits(np.atleast_2d(array), tiles)
        return logits if array.ndim == 2 else logits[0]

    def save(self, directory: str | Path) -> Path:
        """Writes an l4jax checkpoint: Orbax params, config.json, tokenizer and manifest.json.

        Raises:
            FileExistsError: `directory` holds something that is no l4jax checkpoint.
        """
        saved = store.save(directory, flat_params(self.model), self.config, companions=self._directory)
        if self.tokenizer is not None:
            self.tokenizer.save(saved)
        return saved

    def _prompt(self, prompt: str | Ids, images: Sequence[ImageSource], tiles: np.ndarray | None) -> Prompt:
        if isinstance(prompt, str):
            if tiles is not None:
                raise ValueError("tiles are for a prompt of token ids; give a prompt of text its images")
            encoded = self.processor.encode_text(prompt, images)
            return Prompt(encoded.ids, encoded.tiles)
        if len(images):
            raise ValueError("images are for a prompt of text; give a prompt of token ids its tiles")
        return Prompt(np.asarray(prompt, np.int32).reshape(-1), tiles)


def load(
    model: str | os.PathLike, *, dtype: str = "auto", mesh: Mesh | str = "auto", max_len: int | None = None
) -> LoadedModel:
    """Returns a model of an l4jax, Hugging Face or Meta directory; of a preset, with random weights.

    Args:
        model: directory or name of a preset.
        dtype: "bfloat16", "float32" or "float16"; "auto" is float32 on a CPU, where it is fastest, bfloat16 elsewhere.
        mesh: made by `l4jax.sharding.make_mesh`; "auto" shares the heads of attention among the accelerators.
        max_len: tokens of prompt and answer together, for which memory is set aside. Default: 8,192, or fewer if the
            model takes no more.

    Raises:
        FileNotFoundError: there is no such directory, or files are missing in it.
        ValueError: the checkpoint is damaged, an argument is impossible, or the weights do not fit into memory.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is not one of {', '.join(DTYPES)}")
    if dtype == "auto":
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    source = open_model(model)
    config = source if isinstance(source, Llama4Config) else source.config
    limit = config.text_config.max_position_embeddings
    if max_len is None:
        max_len = min(limit, DEFAULT_MAX_LEN)
    if not 1 < max_len <= limit:
        raise ValueError(f"max_len={max_len} must be in 2..{limit:,}, the model's max_position_embeddings")
    if mesh == "auto":
        mesh = auto_mesh(config)
    elif not isinstance(mesh, Mesh):
        raise ValueError(f'mesh={mesh!r} must be "auto" or made by l4jax.sharding.make_mesh')
    abstract = abstract_model(config, dtype=jnp.dtype(dtype))
    if isinstance(source, Source) and source.quantize is not None:
        abstract = quantize_model(abstract, source.quantize)
    with use_rules(SERVING):
        wanted = placed_params(abstract, mesh)
    check_memory(str(model), wanted, mesh)
    if isinstance(source, Llama4Config):
        warnings.warn(f"{model} is a preset: its weights are random, and so are its words", stacklevel=2)
        params, tokenizer, directory = random_params(config, wanted), byte_tokenizer(config), None
    else:
        params, directory = checkpoint.load(source, wanted), source.directory
        tokenizer = find_tokenizer(directory)
    module = with_params(abstract, params)
    return LoadedModel(module, mesh=mesh, max_len=max_len, tokenizer=tokenizer, directory=directory)


def open_model(model: str | os.PathLike) -> Source | Llama4Config:
    """Returns an opened checkpoint, or the config of a preset.

    Raises:
        FileNotFoundError: there is neither.
    """
    if Path(model).is_dir():
        return open_checkpoint(model)
    if str(model) in PRESETS:
        return preset(str(model))
    raise FileNotFoundError(f"no model {model}: neither a directory nor a preset; presets are {', '.join(PRESETS)}")


def auto_mesh(config: Llama4Config) -> Mesh:
    """Returns a mesh of all accelerators by which the heads can be divided; of one device on a CPU."""
    if jax.default_backend() == "cpu":
        return make_mesh()
    heads = [config.text_config.num_key_value_heads]
    if config.vision_config is not None:
        heads.append(config.vision_config.num_attention_heads)
    return make_mesh(tensor=math.gcd(len(jax.devices()), *heads))


def random_params(config: Llama4Config, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Returns newly drawn weights, born where they belong."""
    dtype = wanted["norm.scale"].dtype

    def create():
        return flat_params(Llama4(config, rngs=nnx.Rngs(0), dtype=dtype))

    return jax.jit(create, out_shardings={path: leaf.sharding for path, leaf in wanted.items()})()


def check_memory(name: str, wanted: Mapping[str, checkpoint.Leaf], mesh: Mesh) -> None:
    """Checks that the weights fit, before the machine comes to a halt over them.

    Raises:
        ValueError: they do not.
    """
    leaves = jax.tree.leaves(wanted)
    needed = sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)
    free = free_memory(mesh.devices.flat[0])
    if free is not None and needed > free:
        dtype, each = wanted["norm.scale"].dtype.name, " a device" if mesh.size > 1 else ""
        raise ValueError(
            f"the weights of {name} in {dtype} take {needed / 2**30:,.1f} GiB{each}, {free / 2**30:,.1f} GiB are free; "
            "choose a smaller dtype (--dtype bfloat16), a smaller model or more devices"
        )


def free_memory(device: jax.Device) -> int | None:
    """Returns the bytes that are free on a device, for a CPU those of the machine; None where nobody tells."""
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    meminfo = Path("/proc/meminfo")
    if device.platform == "cpu" and meminfo.exists():
        line = next((line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable")), None)
        return int(line.split()[1]) * 1024 if line else None
    return None


def byte_tokenizer(config: Llama4Config) -> BaseTokenizer | None:
    """Returns a tokenizer for a preset of small vocabulary; None for the released sizes, whose words are in a file."""
    vocab_size = config.text_config.vocab_size
    return ByteTokenizer(vocab_size) if vocab_size < NUM_RELEASED_IDS else None


def find_tokenizer(directory: Path) -> BaseTokenizer | None:
    """Returns the tokenizer beside the weights, None if there is none."""
    try:
        return load_tokenizer(directory)
    except FileNotFoundError:
        return None
