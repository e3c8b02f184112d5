"""The training loop, the same for every stage: read from top to bottom.

A run lives in one directory: `config.yaml` as resolved, `metrics.jsonl`, `checkpoints/<step>/` with parameters,
optimizer, balancing bias and the position in the data. It can be stopped at any step by Ctrl-C or SIGTERM and goes on
bit for bit.

On several hosts every process runs this same loop on its own part of the rows; process 0 alone writes and shows.
"""

import contextlib
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import grain
import jax
import numpy as np
import yaml
from etils import epath
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from rich.console import Console

from l4jax.checkpoint.train_store import Interruption, TrainStore
from l4jax.host import DISTRIBUTED
from l4jax.sharding import batch_part, check_mesh, make_mesh, parse_sizes, place
from l4jax.train.config import RunConfig, run_config_to_dict
from l4jax.train.metrics import MetricsFile, load_imbalance
from l4jax.train.optimizer import learning_rate_schedule, make_optimizer
from l4jax.train.progress import TrainingProgress
from l4jax.train.state import TrainState, init_state, state_shardings
from l4jax.train.step import BATCH_AXES, make_train_step

Resume = Literal["auto", "never", "must"]

# Settings that may differ when a run goes on: they change what is written, where it runs and how fast, or what is read
# from there on. A whole source may come or go, and its weight change; its path may not.
FREE_TO_CHANGE = re.compile(
    r"log_every|save_every|parallel\.(mesh|remat|microbatches|offload_optimizer)"
    r"|data\.(num_workers|skip_malformed|long_documents)|data\.sources\.[^.]+(\.weight)?"
)


@dataclass(frozen=True)
class Trained:
    """What a run leaves in memory."""

    graphdef: nnx.GraphDef
    state: TrainState
    steps: int
    """Steps taken; fewer than asked for if the run was interrupted."""
    interrupted_by: int | None
    """The signal that stopped it."""

    def model(self) -> nnx.Module:
        """Returns the trained model, without optimizer and balancing bias."""
        return nnx.merge(self.graphdef, self.state.params)


def run_mesh(config: RunConfig) -> Mesh:
    """Returns the mesh of a run.

    Raises:
        ValueError: the model or its batches cannot be spread over it, or the processes were not joined.
    """
    if jax.process_count() > 1 and not jax.distributed.is_initialized():
        raise ValueError(f"{jax.process_count()} hosts share these devices; set {DISTRIBUTED}=auto on each of them")
    sizes = parse_sizes(config.parallel.mesh)
    check_mesh(config.model, sizes, rows=config.data.rows, length=config.data.row_tokens)
    return make_mesh(**sizes)


def data_shard(config: RunConfig) -> tuple[int, int]:
    """Returns which part of the rows of every batch this process makes, and of how many: `RunData.training_batches`."""
    return batch_part(run_mesh(config), config.data.rows)


def train(
    config: RunConfig,
    data: grain.IterDataset,
    run_dir: Path,
    *,
    resume: Resume = "auto",
    console: Console | None = None,
) -> Trained:
    """Trains until `config.steps` or an interruption, saving on the way, and returns the result.

    Args:
        config: the run.
        data: batches (`l4jax/data/pipeline.py`), endless or long enough: the part of this process, `data_shard`.
        run_dir: made if missing; several processes must all see it.
        resume: `auto` goes on from the newest checkpoint if there is one, `must` insists on one, `never` deletes what
            is there and starts anew.
        console: where progress is shown; standard output by default.

    Raises:
        FileNotFoundError: `must`, and there is no checkpoint.
        ValueError: the directory holds a run with other settings, or the loss is no longer a number.
    """
    parallel, mesh = config.parallel, run_mesh(config)
    _, parts = batch_part(mesh, config.data.rows)
    writes = jax.process_index() == 0
    if resume == "never" and writes:
        epath.Path(run_dir / "checkpoints").rmtree(missing_ok=True)
    _wait_for_all("l4jax: old checkpoints are gone")
    if not writes:
        console = Console(quiet=True)
    with (
        TrainStore(run_dir / "checkpoints") as store,
        Interruption() as stop,
        jax.set_mesh(mesh),
        contextlib.closing(iter(data)) as batches,
    ):
        if store.latest_step() is not None:
            _check_settings(run_dir / "config.yaml", config)
        optimizer = make_optimizer(config.optimizer, config.steps, parallel.first_moment_dtype)
        learning_rate = learning_rate_schedule(config.optimizer, config.steps)
        shardings = state_shardings(config.model, optimizer, mesh, offload=parallel.offload_optimizer)
        graphdef, state = init_state(config.model, optimizer, config.seed, shardings)
        train_step = make_train_step(graphdef, optimizer, parallel, config.router_bias_rate, shardings)
        step = 0
        if resume == "must" or store.latest_step() is not None:
            state, step, _ = store.restore(jax.tree.map(_abstract, state), batches)
        if writes:
            _write_settings(run_dir / "config.yaml", config)
        _wait_for_all("l4jax: settings are written")
        if not (run_dir / "config.yaml").exists():
            raise ValueError(
                f"{run_dir} is not shared by all hosts; choose a bucket (gs://...) or a shared disk for --out"
            )

        metrics_file = MetricsFile(run_dir / "metrics.jsonl", step) if writes else contextlib.nullcontext()
        with TrainingProgress(config.steps, step, console) as progress, metrics_file:
            window = _Window()
            while step < config.steps and not stop.requested(store, step):
                batch = next(batches)
                state, numbers = train_step(state, place(batch, mesh, BATCH_AXES, parts))
                step += 1
                # The step runs on while the host reads the numbers of the one before and makes the next batch.
                window.add(numbers)
                progress.advance(step, window.last_loss, window.tokens_per_second)
                if step % config.log_every == 0 or step == config.steps:
                    values = window.close()
                    _check_finite(values["loss"], step)
                    if writes:
                        metrics_file.write(step, learning_rate=float(learning_rate(step - 1)), **values)
                if step % config.save_every == 0 or step == config.steps:
                    store.save(step, state, batches)
                    if writes:
                        metrics_file.publish()
            if stop.signal is not None and store.latest_step() != step:
                store.save(step, state, batches)
    return Trained(graphdef, state, step, stop.signal)


class _Window:
    """Collects the numbers of the steps since the last line of metrics, always one step behind the device."""

    def __init__(self):
        self.last_loss, self.tokens_per_second = float("nan"), 0.0
        self._running: dict[str, jax.Array] | None = None
        self._start_new()

    def _start_new(self) -> None:
        self._read: list[dict[str, np.ndarray]] = []
        self._tokens, self._started = 0, time.perf_counter()

    def add(self, numbers: dict[str, jax.Array]) -> None:
        self._read_running()
        self._running = numbers

    def _read_running(self) -> None:
        if self._running is not None:
            numbers = jax.device_get(self._running)
            self._running = None
            self._read.append(numbers)
            self._tokens += int(numbers["tokens"])
            self.last_loss = float(numbers["loss"])
            self.tokens_per_second = self._tokens / (time.perf_counter() - self._started)

    def close(self) -> dict[str, Any]:
        """Waits for the step that runs and returns the numbers of the window as plain values."""
        self._read_running()
        steps, tokens = self._read, self.tokens_per_second
        self._start_new()
        load = np.sum([numbers["router_load"] for numbers in steps], axis=0).tolist()
        weights = [float(numbers["answer_tokens"]) for numbers in steps]
        return {
            "loss": float(np.average([numbers["loss"] for numbers in steps], weights=weights)),
            "accuracy": float(np.average([numbers["accuracy"] for numbers in steps], weights=weights)),
            "grad_norm": float(np.mean([numbers["grad_norm"] for numbers in steps])),
            "tokens_per_second": round(tokens, 1),
            "router_load": load,
            "load_imbalance": round(load_imbalance(load), 3),
        }


def _abstract(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)


def _check_settings(path: Path, config: RunConfig) -> None:
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


def _wait_for_all(what: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def _write_settings(path: Path, config: RunConfig) -> None:
    path.write_text(yaml.safe_dump(run_config_to_dict(config), sort_keys=False))


def _check_finite(loss: float, step: int) -> None:
    if not np.isfinite(loss):
        raise ValueError(
            f"the loss is {loss} near step {step}; lower optimizer.learning_rate or raise optimizer.warmup_steps "
            "(checkpoints of earlier steps are kept)"
        )
