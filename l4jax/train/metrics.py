"""Numbers of a run: one JSON object a line in `metrics.jsonl`, read back for curves; TensorBoard too, if installed."""

import importlib.util
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from l4jax.host import is_remote


class MetricsFile:
    """Appends lines to `metrics.jsonl`; lines after `from_step` of an earlier, interrupted run are dropped.

    In a bucket nothing can be appended: there, `publish` writes all lines anew. Called with every checkpoint, it loses
    none that the next run would not write again.
    """

    def __init__(self, path: Path, from_step: int = 0):
        self.path = path
        kept = [line for line in read_metrics(path) if line["step"] <= from_step] if from_step else []
        self._remote = is_remote(path)
        if not self._remote:
            path.parent.mkdir(parents=True, exist_ok=True)
        self._file = io.StringIO() if self._remote else path.open("w")
        for line in kept:
            self._write(line)

    def write(self, step: int, **values: Any) -> None:
        """Appends one line; a file that is not in a bucket is complete up to it when this returns."""
        self._write({"step": step, **values})

    def publish(self) -> None:
        """Makes a file in a bucket complete."""
        if self._remote:
            self.path.write_text(self._file.getvalue())

    def _write(self, line: dict) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def __enter__(self) -> "MetricsFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.publish()
        self._file.close()


def read_metrics(path: Path) -> list[dict]:
    """Returns the lines of a metrics file; none if there is no file. A last line cut short by a crash is left out."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


class TensorBoard:
    """Writes the same numbers for TensorBoard where `tensorboardX` is installed, and nothing elsewhere."""

    def __init__(self, directory: Path):
        self._writer = None
        if importlib.util.find_spec("tensorboardX"):
            from tensorboardX import SummaryWriter

            self._writer = SummaryWriter(str(directory))

    def write(self, step: int, values: Mapping[str, Any], prefix: str = "") -> None:
        """Adds every number; those in nested dicts under `outer/inner`."""
        if self._writer is None:
            return
        for name, value in values.items():
            if isinstance(value, Mapping):
                self.write(step, value, f"{prefix}{name}/")
            elif isinstance(value, int | float):
                self._writer.add_scalar(prefix + name, value, step)

    def __enter__(self) -> "TensorBoard":
        return self

    def __exit__(self, *_: object) -> None:
        if self._writer is not None:
            self._writer.close()


def load_imbalance(counts: list[list[int]]) -> float:
    """Returns the greatest load of an expert over the mean load of its layer, at the worst layer; 1 is balance."""
    return max((max(layer) * len(layer) / sum(layer) for layer in counts if sum(layer)), default=math.nan)


def router_entropy(counts: list[list[int]]) -> float:
    """Returns the entropy of the experts' load over that of an even load, at the worst layer; 1 is balance."""

    def entropy(layer: list[int]) -> float:
        shares = np.array(layer) / sum(layer)
        return float(-(shares * np.log(np.maximum(shares, 1e-30))).sum() / math.log(len(layer)))

    return min((entropy(layer) for layer in counts if sum(layer) and len(layer) > 1), default=math.nan)


def means(buckets: dict[str, np.ndarray], source_names: Sequence[str]) -> dict[str, Any]:
    """Returns the means of sums by bucket (`objective.py`): over all tokens, and of the loss by source and modality.

    A name that stands for no token is left out.
    """
    tokens = buckets["tokens"].reshape(-1, 2)
    found = {name: float(sums.sum() / max(tokens.sum(), 1)) for name, sums in buckets.items() if name != "tokens"}
    losses = buckets["loss"].reshape(-1, 2)

    def named(names, sums, counts) -> dict[str, float]:
        return {name: float(s / n) for name, s, n in zip(names, sums, counts, strict=True) if n}

    by_source = named(source_names, losses.sum(1), tokens.sum(1))
    return found | {
        "loss_by_source": by_source,
        "loss_by_modality": named(("text", "pictures"), losses.sum(0), tokens.sum(0)),
    }
