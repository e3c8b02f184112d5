"""The training loop, the same for every stage: read from top to bottom.

A run lives in one directory: `config.yaml` as resolved, `metrics.jsonl`, `evaluations.jsonl`, and `checkpoints/<step>/`
with parameters, optimizer, balancing bias and the position in the data. It can be stopped at any step by Ctrl-C or
SIGTERM and goes on bit for bit.

On several hosts every process runs this same loop on its own part of the rows; process 0 alone writes and shows.
"""

import contextlib
import dataclasses
import fcntl
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import yaml
from etils import epath
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from rich.console import Console

from l4jax.checkpoint.train_store import Interruption, TrainStore
from l4jax.chips import peak_flops
from l4jax.host import DISTRIBUTED, is_remote
from l4jax.model.flops import training_flops
from l4jax.model.llama4 import Llama4
from l4jax.sharding import batch_part, check_mesh, make_mesh, parse_sizes, place
from l4jax.train.config import RunConfig, run_config_to_dict
from l4jax.train.data import RunData
from l4jax.train.held_out import Evaluation
from l4jax.train.metrics import MetricsFile, TensorBoard
from l4jax.train.optimizer import learning_rate_schedule, make_optimizer
from l4jax.train.progress import TrainingProgress
from l4jax.train.stage import Stage, make_stage, start_from
from l4jax.train.state import TrainState, init_state, state_shardings
from l4jax.train.step import BATCH_AXES, make_train_step
from l4jax.train.window import NotFinite, Window

Resume = Literal["auto", "never", "must"]

# Settings that may differ when a run goes on: they change what is written or measured, where it runs and how fast, or
# what is read from there on. A whole source may come or go, and its weight change; its path may not.
FREE_TO_CHANGE = re.compile(
    r"log_every|save_every|on_nan|evaluate\b.*|parallel\.(mesh|remat|microbatches|offload_optimizer)"
    r"|data\.(num_workers|skip_malformed|long_documents)|data\.sources\.[^.]+(\.weight)?"
)


@dataclass(frozen=True)
class Trained:
    """What a run leaves in memory."""

    stage: Stage
    graphdef: nnx.GraphDef
    state: TrainState
    steps: int
    """Steps taken; fewer than asked for if the run was interrupted."""
    interrupted_by: int | None
    """The signal that stopped it."""

    def model(self) -> Llama4:
        """Returns the trained model, without optimizer and balancing bias; the running mean of it if there is one."""
        return self.stage.llama(nnx.merge(self.graphdef, self.state.averaged))


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


def train(
    config: RunConfig,
    data: RunData,
    run_dir: Path,
    *,
    resume: Resume = "auto",
    profile: range = range(0),
    console: Console | None = None,
) -> Trained:
    """Trains until `config.steps` or an interruption, saving on the way, and returns the result.

    Args:
        config: the run.
        data: what it reads.
        run_dir: made if missing; several processes must all see it.
        resume: `auto` goes on from the newest checkpoint if there is one, `must` insists on one, `never` deletes what
            is there and starts anew.
        profile: steps that are recorded for XProf, in `run_dir/profile`.
        console: where progress is shown; standard output by default.

    Raises:
        FileNotFoundError: `must`, and there is no checkpoint.
        ValueError: the directory holds a run with other settings, or another process trains there; or the loss is no
            longer a number.
    """
    parallel, mesh = config.parallel, run_mesh(config)
    shard = batch_part(mesh, config.data.rows)
    writes = jax.process_index() == 0
    if not writes:
        console = Console(quiet=True)
    with _alone_in(run_dir) if writes else contextlib.nullcontext(), Interruption() as stop, jax.set_mesh(mesh):
        if resume == "never" and writes:
            epath.Path(run_dir / "checkpoints").rmtree(missing_ok=True)
        _wait_for_all("l4jax: old checkpoints are gone")
        with (
            TrainStore(run_dir / "checkpoints") as store,
            contextlib.closing(iter(data.training_batches(shard))) as batches,
        ):
            if store.latest_step() is not None:
                _check_settings(run_dir / "config.yaml", config)
            stage = make_stage(config, mesh)
            optimizer = make_optimizer(config.optimizer, config.steps, parallel.first_moment_dtype, stage.scale_by)
            learning_rate = learning_rate_schedule(config.optimizer, config.steps)
            ema = config.optimizer.ema_decay
            shardings = state_shardings(
                nnx.eval_shape(lambda: stage.make(nnx.Rngs(0))),
                optimizer,
                mesh,
                offload=parallel.offload_optimizer,
                trainable=config.trainable,
                ema=ema > 0,
            )
            graphdef, state = init_state(
                stage.make, config.model, optimizer, config.seed, shardings, trainable=config.trainable
            )
            step = 0
            if resume == "must" or store.latest_step() is not None:
                state, step, _ = store.restore(jax.tree.map(_abstract, state), batches)
            elif config.init:
                params = start_from(state.params, config.init, stage.prefix)
                state = dataclasses.replace(state, params=params, ema=jax.tree.map(jnp.copy, params) if ema else None)
                state = jax.device_put(state, shardings)
            train_step = make_train_step(
                stage.objective,
                optimizer,
                parallel,
                shardings,
                router_bias_rate=config.router.bias_rate,
                trainable=config.trainable,
                ema_decay=ema,
            )
            evaluations = {name: _evaluation(config, name, data, shard) for name in config.evaluate}
            if writes:
                _write_settings(run_dir / "config.yaml", config)
            _wait_for_all("l4jax: settings are written")
            if not (run_dir / "config.yaml").exists():
                raise ValueError(
                    f"{run_dir} is not shared by all hosts; choose a bucket (gs://...) or a shared disk for --out"
                )

            with _outputs(run_dir, step, writes) as outputs, TrainingProgress(config.steps, step, console) as progress:
                window = Window(
                    data.source_names,
                    skip_not_finite=config.on_nan == "skip",
                    flops_per_step=training_flops(config.model, config.data.rows, config.data.row_tokens),
                    peak_flops=_peak_flops(mesh),
                )
                while step < config.steps and not stop.requested(store, step):
                    if step == profile.start and len(profile):
                        jax.profiler.start_trace(str(run_dir / "profile"))
                    batch = next(batches)
                    state, numbers = train_step(state, place(batch, mesh, BATCH_AXES, shard[1]), stage.fixed)
                    step += 1
                    # The step runs on while the host reads the numbers of the one before and makes the next batch.
                    with _saving_what_broke(run_dir):
                        window.add(step, numbers, batch)
                        progress.advance(step, window.last_loss, window.tokens_per_second)
                        if step % config.log_every == 0 or step == config.steps:
                            outputs.metrics(step, learning_rate=float(learning_rate(step - 1)), **window.close())
                    due = [name for name, found in evaluations.items() if found.is_due(step, config.steps)]
                    if due:
                        found = {name: evaluations[name].run(stage.llama_params(state.averaged), mesh) for name in due}
                        outputs.evaluations(step, **found)
                        window.restart_clock()
                    if step % config.save_every == 0 or step == config.steps:
                        store.save(step, state, batches)
                        outputs.publish()
                    if step == profile.stop and len(profile):
                        jax.block_until_ready(state)
                        jax.profiler.stop_trace()
                if stop.signal is not None and store.latest_step() != step:
                    store.save(step, state, batches)
    return Trained(stage, graphdef, state, step, stop.signal)


def _evaluation(config: RunConfig, name: str, data: RunData, shard: tuple[int, int]) -> Evaluation:
    wanted = config.evaluate[name]
    batches = data.evaluation_batches(name, shard)
    return Evaluation(config.model, wanted, batches, config.parallel, list(wanted.sources), parts=shard[1])


def _peak_flops(mesh: Mesh) -> float | None:
    peak = peak_flops(mesh.devices.flat[0].device_kind)
    return None if peak is None else peak * mesh.size


@dataclass(frozen=True)
class _Outputs:
    """Where the numbers of a run go; nowhere in processes that do not write."""

    files: dict[str, MetricsFile]
    board: TensorBoard | None

    def metrics(self, step: int, **values: Any) -> None:
        self._write("metrics", step, values)

    def evaluations(self, step: int, **values: Any) -> None:
        self._write("evaluations", step, values)

    def _write(self, name: str, step: int, values: dict[str, Any]) -> None:
        if self.files:
            self.files[name].write(step, **values)
            self.board.write(step, values)

    def publish(self) -> None:
        for file in self.files.values():
            file.publish()


@contextlib.contextmanager
def _outputs(run_dir: Path, step: int, writes: bool) -> Iterator[_Outputs]:
    if not writes:
        yield _Outputs({}, None)
        return
    with (
        MetricsFile(run_dir / "metrics.jsonl", step) as metrics,
        MetricsFile(run_dir / "evaluations.jsonl", step) as evaluations,
        TensorBoard(run_dir / "tensorboard") as board,
    ):
        yield _Outputs({"metrics": metrics, "evaluations": evaluations}, board)


@contextlib.contextmanager
def _alone_in(run_dir: Path) -> Iterator[None]:
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


@contextlib.contextmanager
def _saving_what_broke(run_dir: Path) -> Iterator[None]:
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
