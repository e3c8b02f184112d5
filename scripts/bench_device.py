"""Serves and trains on one accelerator with random weights: tokens a second, memory, and how much of the chip that is.

    XLA_PYTHON_CLIENT_MEM_FRACTION=0.93 python scripts/bench_device.py serve --dtype int4 --rows 1 8   # Scout, 80 GB
    python scripts/bench_device.py serve --preset mini-scout --context 128 --rows 1 8
    python scripts/bench_device.py train      # four of Scout's layers, of four experts each

`serve` reads a prompt of `--context` tokens, and goes on from there with so many rows at a time, greedily; the engine
is that of `l4jax generate`, and every token is fetched. Beside decoding stands what it has to read at least: the
weights of the experts that so many tokens meet, all other weights of the text layers, the head, the cache.

`train` is the compiled step of `l4jax train`, without its loop (for that: `bench_train.py`): forward, backward,
AdamW in float32, products in bfloat16, layers rematerialised in full.
"""

import argparse
import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from l4jax.chips import peak_flops
from l4jax.config import Llama4Config, preset
from l4jax.config.presets import layer_pattern
from l4jax.inference.engine import Engine
from l4jax.inference.options import SamplingOptions
from l4jax.model.flops import training_flops
from l4jax.model.params import abstract_model, placed_params, with_params
from l4jax.model.quant import SCHEMES, quantize_model
from l4jax.sharding import SERVING, make_mesh, use_rules
from l4jax.train.config import OptimizerConfig, ParallelConfig
from l4jax.train.objective import NextToken
from l4jax.train.optimizer import make_optimizer
from l4jax.train.state import new_state, state_shardings
from l4jax.train.step import make_train_step

GIB = 1 << 30


def random_leaf(path: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    """Returns numbers from a hash of the index, which takes no memory besides: those of jax take twice the array's."""
    mixed = sum(
        lax.broadcasted_iota(jnp.uint32, leaf.shape, axis) * np.uint32(2654435761 + 2 * 40503 * axis)
        for axis in range(len(leaf.shape))
    )
    mixed = (mixed ^ (mixed >> 15)) * np.uint32(2246822519)
    mixed = (mixed ^ (mixed >> 13)) * np.uint32(3266489917)
    bits = (mixed ^ (mixed >> 16)).astype(jnp.int32)
    if jnp.issubdtype(leaf.dtype, jnp.integer):
        return (bits >> (32 - jnp.iinfo(leaf.dtype).bits)).astype(leaf.dtype)
    return (bits.astype(jnp.float32) * (0.03 / 2**31)).astype(leaf.dtype)


def random_params(wanted: dict[str, Any], dtype: str) -> dict[str, Any]:
    """Returns weights of about Hugging Face's spread; norms are 1, scales are such that the products are alike."""
    scale = {"int4": 0.03 / 8, "int8": 0.03 / 128}.get(dtype, 0.02)

    def make(path, leaf):
        name = jax.tree_util.keystr(path)
        if "norm" in name or "scale" in name:
            constant = scale if name.endswith(".scales") else 1.0
            return jax.jit(lambda: jnp.full(leaf.shape, constant, leaf.dtype), out_shardings=leaf.sharding)()
        return jax.jit(lambda: random_leaf(name, leaf), out_shardings=leaf.sharding)()

    return jax.tree.map_with_path(make, wanted)


def seconds(run: Callable[[], Any], times: int) -> float:
    """Returns the median time of a call that waits for its result; the first, which compiles, is not counted."""
    run()
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        run()
        taken.append(time.perf_counter() - began)
    return float(np.median(taken))


def peak_memory() -> str:
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return "" if peak is None else f", {peak / GIB:.1f} GiB at most so far"


# --- serve ------------------------------------------------------------------------------------------------------------


def size(leaf: Any) -> float:
    """Returns the bytes of an array, or of all arrays in a tree."""
    return sum(math.prod(x.shape) * (0.5 if x.dtype == jnp.int4 else x.dtype.itemsize) for x in jax.tree.leaves(leaf))


def least_bytes(config: Llama4Config, params: dict[str, Any], rows: int, context: int) -> float:
    """Returns the bytes that a step of decoding has to read, if tokens choose their experts by lot."""
    text = config.text_config
    met = 1 - (1 - 1 / max(text.num_local_experts, 1)) ** rows  # of the experts
    weights = sum(
        size(array) * (met if ".experts." in path else 1)
        for path, array in params.items()
        if not path.startswith(("vision_model", "multi_modal_projector", "embed_tokens"))
    )
    chunk = text.attention_chunk_size or context
    slots = sum(min(context, chunk) if text.uses_rope(layer) else context for layer in range(text.num_hidden_layers))
    return weights + 4 * rows * slots * text.num_key_value_heads * text.head_dim


def serve(options: argparse.Namespace) -> None:
    config, mesh = preset(options.preset), make_mesh()
    model = abstract_model(config, dtype=jnp.float32 if options.dtype == "float32" else jnp.bfloat16)
    if options.dtype in SCHEMES:
        model = quantize_model(model, options.dtype)
    with use_rules(SERVING):
        wanted = placed_params(model, mesh)
    params = jax.block_until_ready(random_params(wanted, options.dtype))
    print(f"{options.preset} in {options.dtype}: {size(params) / GIB:.1f} GiB of weights{peak_memory()}", flush=True)
    engine = Engine(with_params(model, params), max_len=options.context + options.steps + 1, mesh=mesh)
    ids = np.random.default_rng(0).integers(0, config.text_config.vocab_size, options.context).astype(np.int32)
    ids[ids == config.image_token_index] = 0
    took = seconds(lambda: np.asarray(engine.prefill(ids).logits), 3)
    print(f"prefill of {options.context}: {options.context / took:,.0f} tokens/s{peak_memory()}", flush=True)
    for rows in options.rows:
        took = decoding(engine, ids, rows, options.steps)
        read = least_bytes(config, params, rows, options.context)
        print(
            f"decode {rows} rows: {rows / took:,.1f} tokens/s, {took * 1e3:.2f} ms a step; "
            f"{read / 1e9:.1f} GB to read, {read / took / 1e12:.2f} TB/s{peak_memory()}",
            flush=True,
        )


def decoding(engine: Engine, ids: np.ndarray, rows: int, steps: int) -> float:
    """Returns the seconds of a step."""
    greedy = SamplingOptions(temperature=0.0, seed=0)
    state, _ = engine.start(engine.prefill(ids), greedy, batch_size=rows)
    for row in range(1, rows):
        state, _ = engine.insert(state, engine.prefill(np.roll(ids, row)), greedy, row)
    active = np.ones(rows, bool)
    state, drawn = engine.decode(state, active)
    np.asarray(drawn.tokens)
    began = time.perf_counter()
    for _ in range(steps - 1):
        state, drawn = engine.decode(state, active)
        tokens = np.asarray(drawn.tokens)
    took = (time.perf_counter() - began) / (steps - 1)
    if not (tokens >= 0).all() or not np.isfinite(np.asarray(drawn.logprobs)).all():
        raise RuntimeError(f"not finite: {drawn}")
    return took


# --- train ------------------------------------------------------------------------------------------------------------


def train(options: argparse.Namespace) -> None:
    whole, layers = preset(options.preset), options.layers
    text = dataclasses.replace(
        whole.text_config,
        num_local_experts=options.experts,
        num_hidden_layers=layers,
        vocab_size=options.vocab,
        **layer_pattern(layers),
    )
    config = dataclasses.replace(whole, text_config=text, vision_config=None)
    mesh, parallel = make_mesh(), ParallelConfig(compute_dtype="bfloat16", remat=options.remat)
    model = abstract_model(config, dtype=jnp.float32)
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-5, warmup_steps=1), 1000)
    shardings = state_shardings(model, optimizer, mesh)
    graphdef, _ = nnx.split(model)
    params = random_params(placed_params(model, mesh), "float32")
    number = sum(x.size for x in params.values())
    with jax.set_mesh(mesh):
        params = nnx.to_pure_dict(nnx.split(with_params(model, params))[1])
        start = jax.jit(lambda x: new_state(config, optimizer, x), donate_argnums=0, out_shardings=shardings)
        state = start(params)
        step = make_train_step(NextToken(graphdef, parallel), optimizer, parallel, shardings)
        rng, shape = np.random.default_rng(0), (options.rows, options.tokens)
        ones = np.ones(shape, np.int32)
        batch = {
            "ids": rng.integers(0, options.vocab, shape).astype(np.int32),
            "positions": np.broadcast_to(np.arange(options.tokens, dtype=np.int32), shape),
            "segment_ids": ones,
            "loss_mask": ones == 1,
            "source_ids": ones,
            "pictures": np.zeros_like(ones),
            "tiles": None,
        }
        losses = []

        def one():
            nonlocal state
            state, numbers = step(state, batch, None)
            losses.append(float(numbers["loss_now"]))

        took = seconds(one, options.steps)
    flops, peak = training_flops(config, *shape), peak_flops(jax.devices()[0].device_kind)
    of_peak = "" if peak is None else f", {flops / took / peak:.1%} of the published peak"
    print(
        f"{layers} layers of {options.preset}, {options.experts} experts, {number / 1e9:.2f}e9 parameters, "
        f"{shape[0]} x {shape[1]} tokens: {took * 1e3:.1f} ms, {shape[0] * shape[1] / took:,.0f} tokens/s, "
        f"{flops / took / 1e12:.1f} TFLOP/s{of_peak}{peak_memory()}; loss {losses[0]:.3f} to {losses[-1]:.3f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(required=True)
    one = verbs.add_parser("serve")
    one.add_argument("--dtype", choices=("float32", "bfloat16", *SCHEMES), default="bfloat16")
    one.add_argument("--context", type=int, default=8192)
    one.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32])
    one.set_defaults(run=serve)
    other = verbs.add_parser("train")
    other.add_argument("--layers", type=int, default=4)
    other.add_argument("--experts", type=int, default=4)
    other.add_argument("--vocab", type=int, default=32768)
    other.add_argument("--rows", type=int, default=2)
    other.add_argument("--tokens", type=int, default=8192)
    other.add_argument("--remat", default="full")
    other.set_defaults(run=train)
    for verb, steps in ((one, 33), (other, 10)):
        verb.add_argument("--preset", default="scout")
        verb.add_argument("--steps", type=int, default=steps)
    options = parser.parse_args()
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}", flush=True)
    options.run(options)


if __name__ == "__main__":
    main()
