"""Numbers of a run: one JSON object a line in `metrics.jsonl`, read back for curves."""

import json
import math
from pathlib import Path
from typing import Any


class MetricsFile:
    """Appends lines to `metrics.jsonl`; lines after `from_step` of an earlier, interrupted run are dropped."""

    def __init__(self, path: Path, from_step: int = 0):
        self.path = path
        kept = [line for line in read_metrics(path) if line["step"] <= from_step] if from_step else []
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("w")
        for line in kept:
            self._write(line)

    def write(self, step: int, **values: Any) -> None:
        """Appends one line; the file is complete up to it when this returns."""
        self._write({"step": step, **values})

    def _write(self, line: dict) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def __enter__(self) -> "MetricsFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[dict]:
    """Returns the lines of a metrics file; none if there is no file. A last line cut short by a crash is left out."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def load_imbalance(counts: list[list[int]]) -> float:
    """Returns the greatest load of an expert over the mean load of its layer, at the worst layer; 1 is balance."""
    return max((max(layer) * len(layer) / sum(layer) for layer in counts if sum(layer)), default=math.nan)
