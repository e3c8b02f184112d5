"""Fixtures for the tests of data: a processor with bytes for tokens and small tiles, and files of documents."""

import json

import numpy as np
import pytest
from PIL import Image

from l4jax.config import VisionConfig
from l4jax.processing.chat import Processor
from l4jax.processing.tokenizer import ByteTokenizer

SMALL_VISION = VisionConfig(hidden_size=32, image_size=28, patch_size=7, num_attention_heads=2)  # 4 tokens a tile


@pytest.fixture(scope="session")
def processor():
    return Processor(ByteTokenizer(), SMALL_VISION)


@pytest.fixture(scope="session")
def reader():
    """A processor of a model that reads only text."""
    return Processor(ByteTokenizer())


@pytest.fixture
def write_jsonl(tmp_path):
    """Writes documents, or lines as they are, to a file; returns its path."""

    def write(lines, name="data.jsonl"):
        text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


@pytest.fixture
def write_picture(tmp_path):
    """Writes a picture of noise of a size (width, height); returns its name."""

    def write(name, size=(28, 28), seed=0):
        pixels = np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / name)
        return name

    return write


@pytest.fixture
def many_documents(write_jsonl, write_picture):
    """A file of 60 documents of all kinds: text, one and several pictures, a video, conversations."""
    small, wide = write_picture("pictures/small.png"), write_picture("pictures/wide.png", (56, 28), seed=1)
    rng = np.random.default_rng(0)
    documents = []
    for i in range(60):
        text = f"document {i}: " + "x" * int(rng.integers(0, 40))
        kind = i % 4
        if kind == 0:
            documents.append({"text": text, "lang": "en", "source": "made"})
        elif kind == 1:
            picture, words = {"type": "image", "path": small}, {"type": "text", "text": text[:20]}
            documents.append({"content": [words, picture, {"type": "image", "path": wide}, words], "lang": "de"})
        elif kind == 2:
            question = [{"type": "image", "path": wide}, {"type": "text", "text": "?"}]
            answer = {"role": "assistant", "content": [{"type": "text", "text": text[:24]}]}
            documents.append({"messages": [{"role": "user", "content": question}, answer], "capability": "vqa"})
        else:
            video = {"type": "video", "frames": [small, small], "fps": 2}
            documents.append({"content": [video, {"type": "text", "text": "!"}]})
    return write_jsonl(documents)
