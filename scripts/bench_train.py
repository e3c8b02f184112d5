"""What a training run spends besides its compiled step, and whether the data keep up.

    python scripts/bench_train.py configs/demo.yaml
    python scripts/bench_train.py configs/demo.yaml --steps 200 data.num_workers=1

The loop runs as always, with checkpoints, metrics and progress; its step is wrapped in a clock. Beside transformers and
torch's AdamW on the same weights and batch, the step is timed by `scripts/bench_cpu.py pair --ops
'[{"op": "train", "batch": 1, "tokens": 512}]'`.
"""

import argparse
import contextlib
import dataclasses
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from l4jax.host import keep_freed_memory
from l4jax.train import loop
from l4jax.train.config import load_run_config
from l4jax.train.data import RunData

WARM_UP = 10  # steps before the clock starts: the first compiles


class Clock:
    """Wraps the compiled step: the time between its beginning and its result, and all of the time since the warm-up."""

    def __init__(self):
        self.in_step = self.total = 0.0
        self.steps, self._began = 0, 0.0

    def wrap(self, step):
        def timed(*inputs: Any):
            began = time.perf_counter()
            result = jax.block_until_ready(step(*inputs))
            ended = time.perf_counter()
            self.steps += 1
            if self.steps == WARM_UP:
                self._began = ended
            elif self.steps > WARM_UP:
                self.in_step += ended - began
                self.total = ended - self._began
            return result

        return timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="config of a run")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--steps", type=int, default=300, help="default: %(default)s")
    args = parser.parse_intermixed_args()
    keep_freed_memory()
    config = load_run_config(args.config, args.settings)
    config = dataclasses.replace(config, steps=args.steps + WARM_UP, evaluate={})
    clock, make = Clock(), loop.make_train_step
    loop.make_train_step = lambda *inputs, **options: clock.wrap(make(*inputs, **options))
    with tempfile.TemporaryDirectory() as directory:
        data = RunData(config, Path(directory) / "data")
        made = data_speed(data)
        loop.train(config, data, Path(directory) / "run", console=Console(quiet=True))
    loop.make_train_step = make
    steps = clock.steps - WARM_UP
    seconds = clock.total / steps
    outside = (clock.total - clock.in_step) / clock.total
    rows = config.data.rows
    print(f"{seconds * 1e3:.1f} ms a step, of which {outside:.1%} outside of the compiled step, data included")
    print(
        f"data alone: {1e3 / made:.1f} ms for {rows} rows, {made * clock.in_step / steps:.1f} times what the step eats"
    )


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
