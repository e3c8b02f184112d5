"""Which format a directory holds."""

from pathlib import Path

from l4jax.checkpoint.hf import INDEX, open_hf
from l4jax.checkpoint.manifest import MANIFEST
from l4jax.checkpoint.meta import open_meta
from l4jax.checkpoint.source import Source
from l4jax.checkpoint.store import open_store


def open_checkpoint(directory: str | Path) -> Source:
    """Opens a checkpoint of any format for reading; only headers are read.

    Raises:
        FileNotFoundError: there is no checkpoint in `directory`.
        ValueError: the checkpoint is damaged.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory} is not a directory; give a checkpoint directory or a preset")
    if (directory / MANIFEST).is_file() and (directory / "params").is_dir():
        return open_store(directory)
    if any(directory.glob("*.safetensors")) or (directory / INDEX).is_file():
        return open_hf(directory)
    if any(directory.glob("consolidated.*.pth")):
        return open_meta(directory)
    kinds = sorted({path.suffix or path.name for path in directory.iterdir()})[:8]
    raise FileNotFoundError(
        f"no checkpoint in {directory} (found {', '.join(kinds) or 'nothing'}); expected config.json and *.safetensors "
        "(Hugging Face), params.json and consolidated.*.pth (Meta), or manifest.json and params/ (l4jax)"
    )
