"""What a run needs by arithmetic alone: no compiler, no device, the same sharding rules.

Weights, optimizer and cache are exact: they follow from shapes and rules. Temporaries are an estimate, and so is what
travels; `program.py` asks the compiler instead.
"""

import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType

from l4jax.chips import Chip
from l4jax.config import Llama4Config, TextConfig
from l4jax.model.flops import attention_flops, matmul_parameters, training_flops
from l4jax.model.llama4 import Llama4
from l4jax.model.params import abstract_model, flat_params, param_shardings
from l4jax.model.quant import quantize_model
from l4jax.sharding import MESH_AXES, SERVING, TRAINING, check_mesh, spec, use_rules

MODES = ("train", "prefill", "decode")


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is to be run."""

    config: Llama4Config
    mode: str
    """One of MODES."""
    batch: int
    """Rows: sequences of a training batch, prompts, or answers in the making."""
    length: int
    """Tokens of a row in training, of the context otherwise."""
    dtype: str = "bfloat16"
    """Of weights in serving (bfloat16, or a name in `quant.SCHEMES`), of computation in training."""
    piece: int = 2048
    """Tokens that a prefill reads at once."""
    remat: str = "full"
    microbatches: int = 1
    first_moment_dtype: str = "float32"
    offload_optimizer: bool = False
    row_tiles: int = 0
    """Tiles beside each row of a training batch."""

    @property
    def rules(self):
        return TRAINING if self.mode == "train" else SERVING

    @property
    def tokens(self) -> int:
        """Tokens of one step."""
        return self.batch * {"train": self.length, "prefill": self.piece, "decode": 1}[self.mode]


@dataclass(frozen=True)
class Needs:
    """Bytes of one device."""

    weights: int
    optimizer: int = 0
    cache: int = 0
    temporaries: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.optimizer + self.cache + self.temporaries


def abstract_mesh(sizes: Mapping[str, int]) -> AbstractMesh:
    """Returns a mesh without devices."""
    shape = tuple(sizes.get(axis, 1) for axis in MESH_AXES)
    return AbstractMesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * len(shape))


@functools.cache  # a sweep asks for every mesh
def job_model(config: Llama4Config, mode: str, dtype: str) -> Llama4:
    """Returns the model of a job as shapes: it trains in float32, serves in bfloat16 or as few bits as asked for."""
    model = abstract_model(config, dtype=jnp.float32 if mode == "train" else jnp.bfloat16, scan_layers=True)
    return model if mode == "train" or dtype == "bfloat16" else quantize_model(model, dtype)


def bytes_per_device(tree: Any, shardings: Any) -> int:
    """Returns the bytes of one device's part of a tree of abstract arrays."""

    def size(leaf, place) -> float:
        bits = 4 if leaf.dtype == jnp.int4 else leaf.dtype.itemsize * 8
        return math.prod(place.shard_shape(leaf.shape)) * bits / 8

    return round(sum(jax.tree.leaves(jax.tree.map(size, tree, shardings))))


def needs(job: Job, sizes: Mapping[str, int]) -> Needs:
    """Returns what one device needs.

    Raises:
        ValueError: the model or the batch cannot be spread so.
    """
    rows = job.batch if job.mode == "train" else None
    check_mesh(job.config, sizes, rows=rows, length=job.length if job.mode == "train" else None)
    mesh, whole = abstract_mesh(sizes), {axis: sizes.get(axis, 1) for axis in MESH_AXES}
    model = job_model(job.config, job.mode, job.dtype)
    with use_rules(job.rules):
        weights = bytes_per_device(flat_params(model), param_shardings(model, mesh))
        if job.mode == "train":
            moment = 2 if job.first_moment_dtype == "bfloat16" else 4
            optimizer = 0 if job.offload_optimizer else weights // 4 * (moment + 4)
            return Needs(weights, optimizer, 0, _training_temporaries(job, whole, weights // 4))
        cache = sum(_cache_of_layer(job, whole, layer) for layer in range(job.config.text_config.num_hidden_layers))
        return Needs(weights, 0, cache, _serving_temporaries(job, whole))


def _parts(axes, shape, sizes) -> int:
    """Returns into how many parts the rules split an array."""
    found = 1
    for entry in spec(axes, shape, sizes):
        for axis in (entry,) if isinstance(entry, str) else entry or ():
            found *= sizes[axis]
    return found


def _cache_of_layer(job: Job, sizes, layer: int) -> int:
    text = job.config.text_config
    chunk = text.attention_chunk_size if text.uses_rope(layer) else None
    slots = job.length if chunk is None else min(chunk, job.length)
    shape = (job.batch, slots, text.num_key_value_heads, text.head_dim)
    axes = ("batch", "slots" if chunk is None else None, "kv_heads", None)
    return 2 * 2 * math.prod(shape) // _parts(axes, shape, sizes)


def _training_temporaries(job: Job, sizes, num_weights: int) -> int:
    """Gradients, what layers keep, one layer at work with its gathered weights, and the head. An estimate."""
    text = job.config.text_config
    tokens = job.tokens // job.microbatches // _parts(("batch", "length"), (job.batch, job.length), sizes)
    tensor = sizes["tensor"]
    kept = text.num_hidden_layers * tokens * text.hidden_size * 2
    layer = _layer_numbers(text, sizes["expert"] * tensor, tensor)
    busy = tokens * (6 * text.hidden_size + 4 * text.intermediate_size // tensor) * 2 * 2
    head = text.vocab_size // tensor * text.hidden_size * (2 + 4) + (1 << 30)
    return 4 * num_weights + kept + max(2 * 2 * layer + busy, head)


def _layer_numbers(text: TextConfig, expert_parts: int, parts: int) -> int:
    width, heads = text.hidden_size, text.num_attention_heads + text.num_key_value_heads
    attention = 2 * width * heads * text.head_dim
    experts = 3 * width * text.intermediate_size * text.num_local_experts if text.moe_layers else 0
    dense = 3 * width * (text.intermediate_size if text.moe_layers else text.intermediate_size_mlp)
    return (attention + dense) // parts + experts // expert_parts


def _serving_temporaries(job: Job, sizes) -> int:
    text = job.config.text_config
    tokens = job.tokens // _parts(("dense_batch",), (job.batch,), sizes)
    busy = tokens * (8 * text.hidden_size + 4 * text.intermediate_size // sizes["tensor"]) * 2
    logits = job.batch * text.vocab_size * 4 * 3 // (sizes["tensor"] * sizes["expert"])
    return busy + logits + (256 << 20)


# --- Work ---------------------------------------------------------------------------------------------------------


def model_flops(job: Job) -> float:
    """Returns the FLOPs that the model asks for in a step, of all devices; nothing made twice, nothing padded."""
    if job.mode == "train":
        return training_flops(job.config, job.batch, job.length)
    per_token = 2 * matmul_parameters(job.config)
    start = job.length - (job.piece if job.mode == "prefill" else 1)
    head = 2 * job.config.text_config.hidden_size * job.config.text_config.vocab_size
    if job.mode == "prefill":  # logits of the last token only
        return job.batch * ((per_token - head) * job.piece + head + attention_flops(job.config, start, job.length))
    return job.batch * (per_token + attention_flops(job.config, start, job.length))


@dataclass(frozen=True)
class Bound:
    """How long a step takes at least, in seconds, by what binds."""

    compute: float
    memory: float
    network: float
    device: float
    """Compute and memory together: what is known about which instruction needs which."""

    @property
    def overlapped(self) -> float:
        """If everything that travels does so meanwhile."""
        return max(self.device, self.network)

    @property
    def serial(self) -> float:
        """If nothing does."""
        return self.device + self.network

    @property
    def binding(self) -> str:
        times = {"compute": self.compute, "memory": self.memory, "network": self.network}
        return max(times, key=times.__getitem__)


def estimated_bound(job: Job, sizes: Mapping[str, int], chip: Chip) -> Bound:
    """Returns the bound by arithmetic: the model's FLOPs, weights and cache read once, what travels."""
    whole = {axis: sizes.get(axis, 1) for axis in MESH_AXES}
    devices, text = math.prod(whole.values()), job.config.text_config
    flops, need = model_flops(job) / devices, needs(job, sizes)
    tokens = job.tokens / devices * whole["tensor"]
    if job.mode == "train":
        flops *= 4 / 3 if job.remat == "full" else 1
        memory = 6 * (need.weights + need.optimizer)
        layers = text.num_hidden_layers * _layer_numbers(text, whole["expert"] * whole["tensor"], whole["tensor"])
        shared = whole["fsdp"] * whole["context"] * whole["expert"]
        network = 3 * 2 * layers * (1 - 1 / shared) * job.microbatches
        travels = 6 if whole["expert"] > 1 else 0
    else:
        active = matmul_parameters(job.config) / matmul_parameters_held(job.config)
        few = min(1.0, active * max(job.tokens, 1))
        memory = need.weights * (few if job.mode == "decode" else 1.0) + need.cache
        network, travels = 0.0, 2 if whole["expert"] > 1 else 0
    network += len(text.moe_layers) * tokens * travels * text.hidden_size * 2
    if whole["tensor"] > 1:
        network += text.num_hidden_layers * 4 * tokens * text.hidden_size * 2 * (2 if job.mode == "train" else 1)
    compute, memory = flops / chip.bf16_flops, memory / chip.hbm_bandwidth
    return Bound(compute, memory, network / (2 * chip.link_bandwidth), max(compute, memory))


def matmul_parameters_held(config: Llama4Config) -> int:
    """Returns the parameters of all matrices, those of all experts among them."""
    text = config.text_config
    idle = text.num_local_experts - text.num_experts_per_tok
    return (
        matmul_parameters(config) + len(text.moe_layers) * max(idle, 0) * 3 * text.hidden_size * text.intermediate_size
    )


def meshes(job: Job, num_devices: int) -> Iterator[dict[str, int]]:
    """Yields the mesh sizes that can carry a job on so many devices."""
    axes = ("fsdp", "expert", "tensor", "context")

    def factor(rest: int, names: tuple[str, ...]) -> Iterator[dict[str, int]]:
        if not names:
            yield {"data": rest}
            return
        for size in (n for n in range(1, rest + 1) if rest % n == 0):
            for others in factor(rest // size, names[1:]):
                yield {names[0]: size, **others}

    for sizes in factor(num_devices, axes):
        if job.mode != "train" and sizes["fsdp"] > 1:
            continue
        try:
            rows = job.batch if job.mode == "train" else None
            check_mesh(job.config, sizes, rows=rows, length=job.length if job.mode == "train" else None)
        except ValueError:
            continue
        if job.length < 65536 and sizes["context"] > 1:  # short rows are cut by rows, not along
            continue
        yield {axis: size for axis, size in sizes.items() if size > 1}
