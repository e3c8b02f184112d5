"""Fixtures for the tests of processing: the two reference implementations, and the small vision tower of the demo."""

from pathlib import Path

import pytest

from l4jax.config import VisionConfig
from l4jax.processing.tokenizer import ByteTokenizer, Tokenizer

SMALL_VISION = VisionConfig(hidden_size=32, image_size=28, patch_size=7, num_attention_heads=2)  # 4 tokens a tile


@pytest.fixture(scope="session")
def small_vision():
    return SMALL_VISION


@pytest.fixture(scope="session")
def byte_tokenizer():
    return ByteTokenizer()


@pytest.fixture(scope="session")
def tokenizer_model():
    """The path of the released `tokenizer.model`, which the package llama-models carries."""
    import llama_models.llama4

    return Path(llama_models.llama4.__path__[0]) / "tokenizer.model"


@pytest.fixture(scope="session")
def tokenizer(tokenizer_model):
    return Tokenizer.from_file(tokenizer_model)


@pytest.fixture(scope="session")
def meta_tokenizer(tokenizer_model):
    from llama_models.llama4.tokenizer import Tokenizer as MetaTokenizer

    return MetaTokenizer(tokenizer_model)


@pytest.fixture(scope="session")
def hf_images(torchvision):
    """transformers' image processor module."""
    from transformers.models.llama4 import image_processing_llama4

    return image_processing_llama4


@pytest.fixture(scope="session")
def meta_chat(torchvision):
    """Meta's chat format module."""
    from llama_models.llama4 import chat_format

    return chat_format
