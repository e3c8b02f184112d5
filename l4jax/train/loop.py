"""The training loop, the same for every stage: read from top to bottom.

A run lives in one directory: `config.yaml` as resolved, `metrics.jsonl`, `evaluations.jsonl`, and `checkpoints/<step>/`
with parameters, optimizer, balancing bias and the position in the data. It can be stopped at any step by Ctrl-C or
SIGTERM and goes on bit for bit.

On several hosts every process runs this same loop on its own part of the rows; process 0 alone writes and shows.
"""

import contextlib
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
from etils import epath
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from rich.console import Console

from l4jax.checkpoint.train_store import Interruption, TrainStore
from l4jax.chips import peak_flops
from l4jax.host import DISTRIBUTED
from l4jax.model.flops import training_flops
from l4jax.model.llama4 import Llama4
from l4jax.sharding import batch_part, check_mesh, make_mesh, parse_sizes, place
from l4jax.train.config import RunConfig
from l4jax.train.data import RunData
from l4jax.train.evaluation import Evaluation
from l4jax.train.optimizer import learning_rate_schedule, make_optimizer
from l4jax.train.progress import TrainingProgress
from l4jax.train.run_directory import alone_in, check_settings, outputs, recording, saving_what_broke, write_settings
from l4jax.train.stage import Stage, make_stage, start_from
from l4jax.train.state import TrainState, abstract_module, init_state, state_shardings
from l4jax.train.step import BATCH_AXES, make_train_step
from l4jax.train.window import Window

Resume = Literal["auto", "never", "must"]


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
    with alone_in(run_dir) if writes else contextlib.nullcontext(), Interruption() as stop, jax.set_mesh(mesh):
        if resume == "never" and writes:
            epath.Path(run_dir / "checkpoints").rmtree(missing_ok=True)
        _wait_for_all("l4jax: old checkpoints are gone")
        with (
            TrainStore(run_dir / "checkpoints") as store,
            contextlib.closing(iter(data.training_batches(shard))) as batches,
        ):
            if store.latest_step() is not None:
                check_settings(run_dir / "config.yaml", config)
            stage = make_stage(config, mesh)
            optimizer = make_optimizer(config.optimizer, config.steps, parallel.first_moment_dtype, stage.scale_by)
            learning_rate = jax.jit(learning_rate_schedule(config.optimizer, config.steps))
            ema = config.optimizer.ema_decay
            shardings = state_shardings(
                abstract_module(stage.make),
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
                params = stage.with_llama(state.params, start_from(stage.llama_params(state.params), config.init))
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
            evaluations = {name: _evaluation(config, name, data, mesh) for name in config.evaluate}
            if writes:
                write_settings(run_dir / "config.yaml", config)
            _wait_for_all("l4jax: settings are written")
            if not (run_dir / "config.yaml").exists():
                raise ValueError(
                    f"{run_dir} is not shared by all hosts; choose a bucket (gs://...) or a shared disk for --out"
                )

            with (
                outputs(run_dir, step, writes) as run_outputs,
                recording(run_dir, profile) as record,
                TrainingProgress(config.steps, step, console) as progress,
            ):
                window = Window(
                    data.source_names,
                    skip_not_finite=config.on_nan == "skip",
                    flops_per_step=training_flops(config.model, config.data.rows, config.data.row_tokens),
                    peak_flops=_peak_flops(mesh),
                )
                while step < config.steps and not stop.requested(store, step):
                    record(step, state)
                    batch = next(batches)
                    rows = stage.complete(batch, place(batch, mesh, BATCH_AXES, shard[1]))
                    state, numbers = train_step(state, rows, stage.fixed)
                    step += 1
                    # The step runs on while the host reads the numbers of the one before and makes the next batch.
                    with saving_what_broke(run_dir):
                        window.add(step, numbers, batch)
                        progress.advance(step, window.last_loss, window.tokens_per_second)
                        if step % config.log_every == 0 or step == config.steps:
                            rate = float(learning_rate(step - 1))
                            run_outputs.write("metrics", step, learning_rate=rate, **window.close())
                    due = [name for name, found in evaluations.items() if found.is_due(step, config.steps)]
                    if due:
                        params = stage.llama_params(state.averaged)
                        run_outputs.write("evaluations", step, **{name: evaluations[name].run(params) for name in due})
                        window.restart_clock()
                    if step % config.save_every == 0 or step == config.steps:
                        store.save(step, state, batches)
                        run_outputs.publish()
                if stop.signal is not None and store.latest_step() != step:
                    store.save(step, state, batches)
    return Trained(stage, graphdef, state, step, stop.signal)


def _evaluation(config: RunConfig, name: str, data: RunData, mesh: Mesh) -> Evaluation:
    settings = config.evaluation_data(name)
    check_mesh(config.model, mesh.shape, rows=settings.rows, length=settings.row_tokens)
    return Evaluation(
        config.model, config.evaluate[name], data.evaluation_batches(name), config.parallel, mesh, settings.rows
    )


def _peak_flops(mesh: Mesh) -> float | None:
    peak = peak_flops(mesh.devices.flat[0].device_kind)
    return None if peak is None else peak * mesh.size


def _abstract(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)


def _wait_for_all(what: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)
