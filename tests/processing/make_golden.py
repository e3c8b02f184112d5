"""Writes the stored results of the reference implementations, which the tests read where those are not installed.

Command, with the extra `oracle` installed: python tests/processing/make_golden.py
"""

import json
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).parent


@pytest.mark.oracle
def test_write_image(hf_images):
    import torch
    from test_image import SIZES, picture

    resolutions = torch.tensor(hf_images.find_supported_resolutions(16, hf_images.SizeDict(height=336, width=336)))
    rng = np.random.default_rng(1)
    sizes = [*SIZES, *np.exp(rng.uniform(0, np.log(5000), (200, 2))).astype(int).tolist()]
    rows = []
    for height, width in sizes:
        canvas = hf_images.get_best_fit((height, width), resolutions)
        limits = min(max(height, 336), canvas[0]), min(max(width, 336), canvas[1])
        size = hf_images.get_max_res_without_distortion((height, width), limits)
        rows.append([height, width, (canvas // 336).tolist(), [max(1, int(side)) for side in size]])
    tiles = []
    for size in [(1, 1), (200, 500), (600, 900), (1000, 1000)]:
        values = hf_images.Llama4ImageProcessor()(picture(*size), return_tensors="pt")["pixel_values"].float().numpy()
        means = values.reshape(len(values), 3, 4, 84, 4, 84).mean(axis=(3, 5))
        tiles.append({"size": size, "means": np.round(means, 4).tolist()})
    write("image.json", {"sizes": rows, "tiles": tiles})


@pytest.mark.oracle
def test_write_chat(meta_chat, byte_tokenizer, small_vision):
    from test_chat import MetaLike, meta_format, to_meta, with_pictures, with_tools

    chat = meta_format(meta_chat, MetaLike(byte_tokenizer), small_vision)
    conversations = {"pictures": with_pictures(50, 80), "tools": with_tools()}
    write("chat.json", {k: chat.encode_dialog_prompt(to_meta(v)).tokens for k, v in conversations.items()})


def write(name, content):
    (HERE / "golden" / name).write_text(json.dumps(content, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__, "-q", "-p", "no:cacheprovider"]))
