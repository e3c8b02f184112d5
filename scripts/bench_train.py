"""What a training run spends besides its compiled step, and whether the data keep up.

    python scripts/bench_train.py configs/demo.yaml
    python scripts/bench_train.py configs/demo.yaml --steps 200 data.num_workers=1

The loop runs as always, with data, checkpoints, metrics and progress; then the same compiled step runs alone. Beside
transformers and torch's AdamW on the same weights and batch, the step is timed by `scripts/bench_cpu.py pair --ops
'[{"op": "train", "batch": 1, "tokens": 512}]'`.
"""

import argparse
import contextlib
import dataclasses
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from l4jax.host import keep_freed_memory
from l4jax.train import loop
from l4jax.train.config import load_run_config
from l4jax.train.data import RunData

WARM_UP = 10  # steps before the clock starts: the first compiles


class Watched:
    """Wraps the compiled step: notes when it is called, and keeps what the last call was about."""

    def __init__(self, step: Callable):
        self._step = step
        self._calls: list[float] = []
        self.state = self.rows = self.fixed = None

    def __call__(self, state, rows, fixed):
        self._calls.append(time.perf_counter())
        self.state, numbers = self._step(state, rows, fixed)
        self.rows, self.fixed = rows, fixed
        return self.state, numbers

    def in_loop(self) -> float:
        """Returns the seconds of a step in the loop, all that happens between two of them included."""
        return (self._calls[-1] - self._calls[WARM_UP]) / (len(self._calls) - 1 - WARM_UP)

    def alone(self, times: int) -> float:
        """Returns the seconds of a step when the same rows are trained on over and over, and nothing else happens."""
        state, _ = jax.block_until_ready(self._step(self.state, self.rows, self.fixed))
        began = time.perf_counter()
        for _ in range(times):
            state, _ = self._step(state, self.rows, self.fixed)
        jax.block_until_ready(state)
        return (time.perf_counter() - began) / times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="config of a run")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--steps", type=int, default=300, help="default: %(default)s")
    args = parser.parse_intermixed_args()
    keep_freed_memory()
    config = load_run_config(args.config, args.settings)
    config = dataclasses.replace(config, steps=args.steps + WARM_UP, evaluate={})
    watched, make = [], loop.make_train_step

    def make_watched(*inputs: Any, **options: Any) -> Watched:
        watched.append(Watched(make(*inputs, **options)))
        return watched[0]

    loop.make_train_step = make_watched
    with tempfile.TemporaryDirectory() as directory:
        data = RunData(config, Path(directory) / "data")
        made = data_speed(data)
        loop.train(config, data, Path(directory) / "run", console=Console(quiet=True))
    (step,) = watched
    with jax.set_mesh(loop.run_mesh(config)):
        in_loop, alone = step.in_loop(), step.alone(args.steps // 3)
    print(f"{in_loop * 1e3:.1f} ms a step in the loop, {alone * 1e3:.1f} ms alone: {in_loop / alone - 1:.1%} more")
    print(f"data alone: {1e3 / made:.1f} ms for {config.data.rows} rows, {made * alone:.1f} times what the step eats")


def data_speed(data: RunData, seconds: float = 5.0) -> float:
    """Returns batches a second of the pipeline alone."""
    with contextlib.closing(iter(data.training_batches())) as batches:
        for _ in range(3):
            next(batches)
        began, count = time.perf_counter(), 0
        while time.perf_counter() - began < seconds:
            next(batches)
            count += 1
        return count / (time.perf_counter() - began)


if __name__ == "__main__":
    main()
