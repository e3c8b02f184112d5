"""The step itself, compiled for devices that are not here: the same functions that train and serve run.

Memory, collectives and FLOPs are facts of the compiled program. Times are not: they are these, divided by published
peaks.
"""

import math
import re
import resource
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from l4jax.chips import DCN_BANDWIDTH, Chip
from l4jax.inference.engine import Engine
from l4jax.model.params import placed_params, with_params
from l4jax.ops.experts import EXCHANGE, ROOM
from l4jax.plan.arithmetic import Bound, Job, job_model
from l4jax.plan.hlo import Cost, Program
from l4jax.sharding import make_mesh, named_sharding, use_rules
from l4jax.topology import topology_devices
from l4jax.train.config import OptimizerConfig, ParallelConfig
from l4jax.train.objective import NextToken
from l4jax.train.optimizer import make_optimizer
from l4jax.train.state import new_state, state_shardings
from l4jax.train.step import BATCH_AXES, make_train_step


@dataclass(frozen=True)
class Compiled:
    """What the compiler said about a step, per device."""

    fits: bool
    refusal: str | None
    """Why it does not fit, in the compiler's words."""
    seconds: float
    """Of tracing and compiling."""
    host_bytes: int
    """Peak memory of this process."""
    by_kind: dict[str, int] = field(default_factory=dict)
    """Bytes of arguments: weights, optimizer, cache, inputs."""
    peak_bytes: int = 0
    cost: Cost | None = None
    program: Program | None = None

    def bound(self, chip: Chip) -> Bound:
        """Returns the least time of a step, by the FLOPs, bytes and collectives of the program."""
        network = 0.0
        for (_, _, rings, crosses_slices), size in self.cost.collectives.items():
            # In both directions along each dimension of the torus that the compiler takes; one, where it does not say.
            network += size / (DCN_BANDWIDTH if crosses_slices else 2 * chip.link_bandwidth * rings)
        compute, memory = self.cost.flops / chip.bf16_flops, self.cost.bytes / chip.hbm_bandwidth
        return Bound(compute, memory, network, self.cost.seconds)


def lower_job(job: Job, mesh: Mesh) -> tuple[Any, dict[str, int]]:
    """Returns the step of a job, traced for a mesh, and the bytes of one device's arguments by kind."""
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), use_rules(job.rules):
        build = _training if job.mode == "train" else _serving
        step, arguments, kinds = build(job, mesh)
        return step(*arguments), {kind: _bytes_of(tree) for kind, tree in kinds.items()}


def compile_job(job: Job, mesh: Mesh, chip: Chip) -> Compiled:
    """Compiles the step of a job for the devices of a mesh, which are of one kind."""
    started = time.monotonic()
    lowered, by_kind = lower_job(job, mesh)
    fits, refusal, compiled = True, None, None
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        fits, refusal = False, " ".join(str(error).split())[:400]
    seconds, host = time.monotonic() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if compiled is None:
        needed = re.search(r"\(?([\d.]+)([GM])\)? exceeds", refusal)
        peak = round(float(needed[1]) * (1 << (30 if needed[2] == "G" else 20))) if needed else 0
        return Compiled(fits, refusal, seconds, host, by_kind, peak)
    slices = {device.id: getattr(device, "slice_index", 0) for device in mesh.devices.flat}
    order = [device.id for device in mesh.devices.flat]  # the program numbers devices by their place in the mesh
    program = Program(compiled.as_text(), {place: slices[number] for place, number in enumerate(order)})

    def kernel_share(name: str) -> float:
        """An exchange has room for more rows than come on average; kernels skip what is empty."""
        return 1 / ROOM if EXCHANGE in name else 1.0

    cost = program.cost(chip.bf16_flops, chip.hbm_bandwidth, kernel_share)
    peak = compiled.memory_analysis().peak_memory_in_bytes
    return Compiled(fits, refusal, seconds, host, by_kind, peak, cost, program)


def _bytes_of(tree: Any) -> int:
    """Returns the bytes of one device's part of a tree of abstract arrays, in the memory of the device."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        if getattr(leaf.sharding, "memory_kind", None) == "pinned_host":
            continue
        bits = 4 if leaf.dtype == jnp.int4 else leaf.dtype.itemsize * 8
        total += math.prod(leaf.sharding.shard_shape(leaf.shape)) * bits // 8
    return total


def _placed(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)


def _training(job: Job, mesh: Mesh):
    parallel = ParallelConfig(
        remat=job.remat,
        microbatches=job.microbatches,
        compute_dtype=job.dtype,
        first_moment_dtype=job.first_moment_dtype,
        offload_optimizer=job.offload_optimizer,
    )
    settings = OptimizerConfig(learning_rate=1e-4, warmup_steps=100)
    optimizer = make_optimizer(settings, 1000, parallel.first_moment_dtype)
    model = job_model(job.config, job.mode, job.dtype)
    shardings = state_shardings(model, optimizer, mesh, offload=parallel.offload_optimizer)
    params = nnx.to_pure_dict(nnx.state(model))
    state = _placed(jax.eval_shape(lambda p: new_state(job.config, optimizer, p), params), shardings)
    objective = NextToken(nnx.graphdef(model), parallel)
    step = make_train_step(objective, optimizer, parallel, shardings, router_bias_rate=1e-3)
    batch: dict[str, Any] = {}
    for name, axes in BATCH_AXES.items():
        shape, dtype = (job.batch, job.length), "bool" if name == "loss_mask" else "int32"
        batch[name] = jax.ShapeDtypeStruct(shape, dtype, sharding=named_sharding(mesh, axes[:2], shape))
    batch["tiles"] = None
    if job.row_tiles:
        side = job.config.vision_config.image_size
        shape, axes = (job.batch, job.row_tiles, 3, side, side), BATCH_AXES["tiles"]
        batch["tiles"] = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=named_sharding(mesh, axes, shape))
    kinds = {"weights": state.params, "optimizer": state.opt_state, "inputs": batch}
    return step.lower, (state, batch, None), kinds


def _serving(job: Job, mesh: Mesh):
    model = job_model(job.config, job.mode, job.dtype)
    model = with_params(model, placed_params(model, mesh))
    engine = Engine(model, max_len=job.length, mesh=mesh)
    rows = job.batch if job.mode == "decode" else 1
    cache = model.abstract_cache(rows, job.length, mesh)
    kinds = {"weights": engine.params, "cache": cache.layers}
    if job.mode == "prefill":
        return (lambda: engine.lower_prefill(job.piece)), (), kinds
    return (lambda: engine.lower_decode(rows)), (), kinds


def mesh_for(topology: str, num_slices: int, sizes: Mapping[str, int]) -> Mesh:
    """Returns the mesh of a topology's devices.

    Raises:
        ValueError: there is no such topology, or it has too few devices.
    """
    return make_mesh(topology_devices(topology, num_slices), **sizes)
