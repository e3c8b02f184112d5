"""Architectures: what a model is (`architecture.py`), the formats of published files, presets.

No jax here, so that `l4jax --help` and `inspect` answer at once.
"""

import json
from pathlib import Path

from l4jax.config.architecture import Llama4Config, RopeScaling, TextConfig, VisionConfig
from l4jax.config.presets import PRESETS, layer_pattern, preset

__all__ = [
    "PRESETS",
    "Llama4Config",
    "RopeScaling",
    "TextConfig",
    "VisionConfig",
    "layer_pattern",
    "load_config",
    "preset",
]


def load_config(directory: str | Path) -> Llama4Config:
    """Reads `config.json` (l4jax and HF) or `params.json` (Meta) from a checkpoint directory."""
    directory = Path(directory)
    for name, read in (("config.json", Llama4Config.from_hf), ("params.json", Llama4Config.from_meta)):
        path = directory / name
        if path.is_file():
            try:
                content = json.loads(path.read_text())
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                raise ValueError(f"{path} is not JSON ({error}); fetch it again") from error
            if not isinstance(content, dict):
                raise ValueError(f"{path} holds a {type(content).__name__}, expected an object")
            try:
                return read(content)
            except KeyError as error:
                raise ValueError(f"{path} has no key {error}; fetch it again") from error
    raise FileNotFoundError(
        f"no model in {directory}: expected config.json (HF, l4jax) or params.json (Meta); "
        f"presets are {', '.join(PRESETS)}"
    )
