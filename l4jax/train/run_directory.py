"""What a run keeps beside its checkpoints: settings, numbers, a lock, a recording, the batch that broke it."""

import contextlib
import fcntl
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import yaml

from l4jax.host import is_remote
from l4jax.train.config import RunConfig, run_config_to_dict
from l4jax.train.metrics import MetricsFile, TensorBoard
from l4jax.train.window import NotFinite

# Settings that may differ when a run goes on: they change what is written or measured, where it runs and how fast, or
# what is read from there on. A whole source may come or go, and its weight change; its path may not.
FREE_TO_CHANGE = re.compile(
    r"log_every|save_every|on_nan|evaluate\b.*|parallel\.(mesh|remat|microbatches|offload_optimizer)"
    r"|data\.(num_workers|skip_malformed|long_documents)|data\.sources\.[^.]+(\.weight)?"
)


# --- Settings -------------------------------------------------------------------------------------------------------


def check_settings(path: Path, config: RunConfig) -> None:
    """Checks that a run may go on with other settings than those it began with.

    Raises:
        ValueError: one of them would make it another run.
    """
    changed = _differences(yaml.safe_load(path.read_text()), run_config_to_dict(config))
    if changed:
        raise ValueError(
            f"{path.parent} holds a run with other settings ({', '.join(changed)}); choose another directory, or "
            "--resume never to delete it and start anew"
        )


def _differences(saved: dict, wanted: dict, prefix: str = "") -> list[str]:
    names = []
    for key in sorted(saved.keys() | wanted.keys()):
        before, now = saved.get(key), wanted.get(key)
        if isinstance(before, dict) and isinstance(now, dict):
            names += _differences(before, now, f"{prefix}{key}.")
        elif before != now and not FREE_TO_CHANGE.fullmatch(prefix + key):
            names.append(f"{prefix}{key}: {before} there, {now} here")
    return names


def write_settings(path: Path, config: RunConfig) -> None:
    path.write_text(yaml.safe_dump(run_config_to_dict(config), sort_keys=False))


@contextlib.contextmanager
def alone_in(run_dir: Path) -> Iterator[None]:
    """Keeps a second run out of a directory; in a bucket nothing can be locked."""
    if is_remote(run_dir):
        yield
        return
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another process trains in {run_dir}; wait for it, stop it, or choose another directory with --out"
            ) from None
        yield


# --- Numbers --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outputs:
    """Where the numbers of a run go; nowhere in processes that do not write."""

    files: dict[str, MetricsFile]
    board: TensorBoard | None = None

    def write(self, name: str, step: int, **values: Any) -> None:
        """Writes a line to `NAME.jsonl`."""
        if self.files:
            self.files[name].write(step, **values)
            self.board.write(step, values)

    def publish(self) -> None:
        """Makes files in a bucket complete."""
        for file in self.files.values():
            file.publish()


@contextlib.contextmanager
def outputs(run_dir: Path, step: int, writes: bool) -> Iterator[Outputs]:
    """Opens the files of a run that goes on from `step`."""
    if not writes:
        yield Outputs({})
        return
    with (
        MetricsFile(run_dir / "metrics.jsonl", step) as metrics,
        MetricsFile(run_dir / "evaluations.jsonl", step) as evaluations,
        TensorBoard(run_dir / "tensorboard") as board,
    ):
        yield Outputs({"metrics": metrics, "evaluations": evaluations}, board)


@contextlib.contextmanager
def recording(run_dir: Path, steps: range) -> Iterator[Callable[[int, Any], None]]:
    """Yields `at(step, state)`, to be called before every step: it records the wanted ones for XProf, in `profile`."""
    running = False

    def at(step: int, state: Any) -> None:
        nonlocal running
        if running and step not in steps:
            jax.block_until_ready(state)
            jax.profiler.stop_trace()
            running = False
        elif not running and step in steps:
            jax.profiler.start_trace(str(run_dir / "profile"))
            running = True

    try:
        yield at
    finally:
        if running:
            jax.profiler.stop_trace()


@contextlib.contextmanager
def saving_what_broke(run_dir: Path) -> Iterator[None]:
    """Turns a step that was not finite into one line, and keeps its batch."""
    try:
        yield
    except NotFinite as error:
        path = run_dir / f"bad-batch-{error.step}-{jax.process_index()}.npz"
        with path.open("wb") as file:
            np.savez(file, **{name: array for name, array in error.batch.items() if array is not None})
        raise ValueError(
            f"step {error.step} gave a loss of {error.loss} or a gradient that is not finite, and was not taken; its "
            f"batch is in {path}. Lower optimizer.learning_rate, raise optimizer.warmup_steps, or go on without such "
            "batches with on_nan=skip (checkpoints of earlier steps are kept)"
        ) from None
