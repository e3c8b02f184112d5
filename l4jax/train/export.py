"""A trained model as a checkpoint that every other verb takes: `RUN/model`."""

from pathlib import Path

from l4jax.checkpoint import store
from l4jax.model.llama4 import Llama4
from l4jax.model.params import flat_params
from l4jax.processing.tokenizer import BaseTokenizer


def export(model: Llama4, tokenizer: BaseTokenizer, directory: Path) -> Path:
    """Writes parameters, config and tokenizer; returns `directory`."""
    saved = store.save(directory, flat_params(model), model.config)
    tokenizer.save(saved)
    return saved
