import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from l4jax.config import Llama4Config
from l4jax.model.llama4 import Llama4
from l4jax.processing.chat import Processor
from l4jax.processing.tokenizer import ByteTokenizer
from l4jax.train.answers import BatchAnswerer
from l4jax.train.config import load_run_config

TINY = ["model.text_config.hidden_size=64", "model.vision_config.num_hidden_layers=1"]


@pytest.fixture(scope="module")
def model() -> Llama4:
    config: Llama4Config = load_run_config("configs/demo.yaml", TINY).model
    # With this seed no answer holds a `<|patch|>`, which would ask a whole forward pass for one more picture row.
    return Llama4(config, rngs=nnx.Rngs(4))


def question(size: tuple[int, int], text: str) -> list[dict]:
    pixels = np.random.default_rng(size[0]).integers(0, 255, size[::-1], dtype=np.uint8)
    content = [{"type": "image", "image": Image.fromarray(pixels)}, {"type": "text", "text": text}]
    return [{"role": "user", "content": content}]


def likeliest(model: Llama4, processor: Processor, prompt: list[dict], count: int) -> str:
    """The same answer by whole forward passes over one growing row, without a cache."""
    encoded = processor.encode(prompt)
    ids = encoded.ids.tolist()
    graphdef, state = nnx.split(model)
    tiles = jax.numpy.asarray(encoded.tiles)[None]

    @jax.jit
    def next_logits(ids, segment_ids, at):
        logits, _ = nnx.merge(graphdef, state)(ids, tiles=tiles, segment_ids=segment_ids, logits_at=at)
        return logits[0, 0]

    for _ in range(count):
        row = np.array([ids + [0] * (96 - len(ids))])
        ids.append(
            int(next_logits(row, (np.arange(96) < len(ids))[None].astype(int), np.array([len(ids) - 1])).argmax())
        )
        if ids[-1] in processor.tokenizer.stop_ids:
            return processor.decode(ids[len(encoded.ids) : -1])
    return processor.decode(ids[len(encoded.ids) :])


def test_batched_answers_equal_single_ones(model):
    processor = Processor(ByteTokenizer(), model.config.vision_config)
    prompts = [question((28, 28), "a?"), question((56, 28), "what is it?"), question((56, 56), "and this?")]
    graphdef, params = nnx.split(model)
    answerer = BatchAnswerer(
        graphdef, nnx.to_pure_dict(params), processor, batch_size=2, prompt_tokens=80, prompt_tiles=5, new_tokens=4
    )
    assert answerer.answer(prompts) == [likeliest(model, processor, prompt, 4) for prompt in prompts]


def test_prompts_that_do_not_fit_are_refused(model):
    processor = Processor(ByteTokenizer(), model.config.vision_config)
    graphdef, params = nnx.split(model)
    limits = {"batch_size": 1, "prompt_tokens": 50, "new_tokens": 4}
    with pytest.raises(ValueError, match="the limit is 50"):
        BatchAnswerer(graphdef, params, processor, prompt_tiles=5, **limits).answer([question((56, 56), "a?")])
    with pytest.raises(ValueError, match="a prompt has 3 tiles, there is room for 2"):
        BatchAnswerer(graphdef, params, processor, prompt_tiles=2, **limits).answer([question((56, 28), "a?")])
