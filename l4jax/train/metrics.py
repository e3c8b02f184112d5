"""Numbers of a run: one JSON object a line in `metrics.jsonl`, read back for curves."""

import io
import json
import math
from pathlib import Path
from typing import Any

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


def load_imbalance(counts: list[list[int]]) -> float:
    """Returns the greatest load of an expert over the mean load of its layer, at the worst layer; 1 is balance."""
    return max((max(layer) * len(layer) / sum(layer) for layer in counts if sum(layer)), default=math.nan)
