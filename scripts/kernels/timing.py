"""Times every implementation of every op that this machine can run, beside what jax and torch offer."""

import importlib.util
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels
from pallas_kernels.dispatch import implementations, target
from pallas_kernels.shapes import TEXT_SHAPES, TextShape

PLATFORM = target().platform
DTYPE = jnp.dtype("float32" if PLATFORM == "cpu" else "bfloat16")
CLOCK = time.process_time if PLATFORM == "cpu" else time.perf_counter
MIN_SECONDS = 0.05
"""An implementation is called as often in a round as takes this long."""
NOT_TIMED = ("interpret",)
"""Not meant to be fast."""


class Work(NamedTuple):
    """What is timed.

    Attributes:
        arguments: of all contestants.
        flops: that the result needs.
        contestants: functions of the arguments, by name; the first is the baseline.
    """

    arguments: tuple[Any, ...]
    flops: float
    contestants: dict[str, Callable]


def _normal(seed: int, *shape: int) -> jax.Array:
    # On the device and in the dtype: Scout's experts are 1.3 GB, and float32 numbers of the host four times as much.
    return jax.jit(lambda key: jax.random.normal(key, shape, DTYPE))(jax.random.key(seed))


def _num_tokens(shape: TextShape) -> int:
    return 4 * shape.chunk_size if shape.chunk_size < 8192 else 8192


def _ours(op: str, **options: Any) -> dict[str, Callable]:
    function = getattr(pallas_kernels, op)
    return {
        f"ours, {name}": lambda *arguments, name=name: function(*arguments, **options, implementation=name)
        for name in implementations(op)
        if name not in NOT_TIMED
    }


def _with_gradients(function: Callable, num_weights: int) -> Callable:
    """Returns the function with the gradients to its first arguments, weighted with its own result."""

    def run(*arguments):
        weights, rest = arguments[:num_weights], arguments[num_weights:]
        out, backward = jax.vjp(lambda *weights: function(*weights, *rest), *weights)
        return out, backward(out)

    return run


def _routed(shape: TextShape) -> tuple[jax.Array, jax.Array, jax.Array]:
    num_rows, D, F, E = _num_tokens(shape), shape.hidden_size, shape.intermediate_size, shape.num_experts
    choices = np.random.default_rng(0).integers(0, E, num_rows)
    sizes_E = jnp.asarray(np.bincount(choices, minlength=E), jnp.int32)
    return _normal(0, num_rows, D), _normal(1, E, D, F) * D**-0.5, sizes_E


def _ragged_dot(rows, weights, sizes):
    return jax.lax.ragged_dot(rows, weights, sizes, preferred_element_type=jnp.float32).astype(rows.dtype)


def grouped_matmul(shape: TextShape) -> Work:
    rows, weights, sizes = _routed(shape)
    contestants = {"jax.lax.ragged_dot": _ragged_dot} | _ours("grouped_matmul")
    return Work((rows, weights, sizes), 2.0 * len(rows) * weights[0].size, contestants | _torch("grouped_mm"))


def grouped_matmul_gradients(shape: TextShape) -> Work:
    work = grouped_matmul(shape)
    return _gradients(work, 2, 3 * work.flops)


def grouped_swiglu(shape: TextShape) -> Work:
    rows, gate, sizes = _routed(shape)
    up = _normal(2, *gate.shape) * gate.shape[1] ** -0.5

    def two_ragged_dots(rows, gate, up, sizes):
        return jax.nn.silu(_ragged_dot(rows, gate, sizes)) * _ragged_dot(rows, up, sizes)

    contestants = {"two jax.lax.ragged_dot": two_ragged_dots} | _ours("grouped_swiglu")
    return Work((rows, gate, up, sizes), 4.0 * len(rows) * gate[0].size, contestants)


def attention(shape: TextShape) -> Work:
    T, N, K, H = _num_tokens(shape), shape.num_heads, shape.num_kv_heads, shape.head_dim
    q, k, v = (_normal(seed, 1, T, heads, H) for seed, heads in enumerate((N, K, K)))
    contestants = {"jax.nn.dot_product_attention": _dot_product_attention("xla")}
    if PLATFORM == "gpu":
        contestants["jax.nn.dot_product_attention, cudnn"] = _dot_product_attention("cudnn")
    contestants |= _ours("attention") | _torch("attention")
    return Work((q, k, v), 4.0 * N * H * T * (T + 1) / 2, contestants)


def attention_gradients(shape: TextShape) -> Work:
    work = attention(shape)
    return _gradients(work, 3, 3.5 * work.flops)


def _dot_product_attention(implementation: str) -> Callable:
    return lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=implementation)


def chunked_attention(shape: TextShape) -> Work:
    """Four chunks; dot_product_attention takes them as a mask."""
    T, C, N, K, H = 4 * shape.chunk_size, shape.chunk_size, shape.num_heads, shape.num_kv_heads, shape.head_dim
    q, k, v = (_normal(seed, 1, T, heads, H) for seed, heads in enumerate((N, K, K)))

    def masked(q, k, v):
        chunk = jnp.arange(T) // C
        return jax.nn.dot_product_attention(q, k, v, mask=(chunk[:, None] == chunk)[None, None], is_causal=True)

    contestants = {"jax.nn.dot_product_attention": masked} | _ours("attention", chunk_size=C)
    return Work((q, k, v), 4.0 * N * H * T * (C + 1) / 2, contestants)


def decode_attention(shape: TextShape) -> Work:
    """Bounded by memory: the fraction of a matmul says little."""
    B, S, N, K, H = 8, 4 * shape.chunk_size, shape.num_heads, shape.num_kv_heads, shape.head_dim
    q = _normal(0, B, 1, N, H)
    k, v = (_normal(seed, B, S, K, H) for seed in (1, 2))
    lengths = jnp.asarray(np.random.default_rng(0).integers(S // 2, S, B), jnp.int32)

    def whole_cache(q, k, v, lengths):
        return jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=lengths)

    contestants = {"jax.nn.dot_product_attention": whole_cache} | _ours("decode_attention")
    return Work((q, k, v, lengths), 4.0 * N * H * int(lengths.sum()), contestants)


OPS: dict[str, Callable[[TextShape], Work]] = {
    "grouped_matmul": grouped_matmul,
    "grouped_matmul_gradients": grouped_matmul_gradients,
    "grouped_swiglu": grouped_swiglu,
    "attention": attention,
    "attention_gradients": attention_gradients,
    "chunked_attention": chunked_attention,
    "decode_attention": decode_attention,
}


def _gradients(work: Work, num_weights: int, flops: float) -> Work:
    contestants = {
        who: _with_gradients(function, num_weights)
        for who, function in work.contestants.items()
        if not isinstance(function, _Torch)
    }
    return Work(work.arguments, flops, contestants)


class _Torch:
    """A function of torch, on its GPU: arguments are copied once, calls do not wait."""

    def __init__(self, run: Callable):
        self.run = run

    def prepare(self, arguments: tuple[Any, ...]) -> Callable[[int], None]:
        import torch

        copies = [torch.from_numpy(np.array(x, np.int32 if x.dtype == jnp.int32 else np.float32)) for x in arguments]
        copies = [x.cuda() if x.dtype == torch.int32 else x.cuda().bfloat16() for x in copies]

        def calls(count: int) -> None:
            for _ in range(count):
                self.run(*copies)
            torch.cuda.synchronize()

        return calls


def _torch(op: str) -> dict[str, _Torch]:
    """Returns torch's own, where torch sees a GPU."""
    if importlib.util.find_spec("torch") is None:
        return {}
    import torch

    if not torch.cuda.is_available():
        return {}

    def sdpa(q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    def grouped_mm(rows, weights, sizes):
        return torch.nn.functional.grouped_mm(rows, weights, offs=torch.cumsum(sizes, 0, dtype=torch.int32))

    return {"attention": {"torch SDPA": _Torch(sdpa)}, "grouped_mm": {"torch grouped_mm": _Torch(grouped_mm)}}[op]


def _prepare(function: Callable | _Torch, arguments: tuple[Any, ...]) -> Callable[[int], None]:
    """Returns what calls it so often and waits for the results."""
    if isinstance(function, _Torch):
        return function.prepare(arguments)
    compiled = jax.jit(function).lower(*arguments).compile()

    def calls(count: int) -> None:
        for _ in range(count):
            out = compiled(*arguments)
        jax.block_until_ready(out)

    return calls


def _seconds(calls: Callable[[int], None], count: int) -> float:
    start = CLOCK()
    calls(count)
    return (CLOCK() - start) / count


def _calls_per_round(calls: Callable[[int], None]) -> int:
    calls(1)
    return max(1, round(MIN_SECONDS / max(_seconds(calls, 1), 1e-6)))


def _plain_matmul(shape: TextShape) -> Work:
    D, F = shape.hidden_size, shape.intermediate_size
    rows = max(_num_tokens(shape), 512)

    def matmul(a, b):
        return jnp.matmul(a, b, preferred_element_type=jnp.float32).astype(a.dtype)

    return Work((_normal(0, rows, D), _normal(1, D, F)), 2.0 * rows * D * F, {"matmul": matmul})


def measure(work: Work, rounds: int) -> dict[str, list[float] | str]:
    """Returns seconds of each round, or why there are none, by contestant: in turn, the order turned each round."""
    prepared, results = {}, {}
    for who, function in work.contestants.items():
        try:
            calls = _prepare(function, work.arguments)
            prepared[who] = calls, _calls_per_round(calls)
            results[who] = []
        except Exception as error:  # refused, or out of memory: the table says so
            results[who] = " ".join(str(error).split())[:160]
    for index in range(rounds):
        for who in list(prepared)[:: 1 if index % 2 == 0 else -1]:
            results[who].append(_seconds(*prepared[who]))
    return results


def run(ops: Iterable[str], shape_name: str | None, rounds: int, progress: Callable[[str], None]) -> Iterator[dict]:
    """Yields a row for each contestant, op by op."""
    shape_name = shape_name or ("mini-scout" if PLATFORM == "cpu" else "scout")
    shape = TEXT_SHAPES[shape_name]
    for op in ops:
        progress(f"{op}, {shape_name}")
        matmul = _plain_matmul(shape)
        matmul_speed = matmul.flops / statistics.median(measure(matmul, rounds)["matmul"])
        work = OPS[op](shape)
        results = measure(work, rounds)
        baseline = results[next(iter(work.contestants))]
        for who, seconds in results.items():
            row = {"op": op, "implementation": who, "shape": shape_name, "platform": PLATFORM, "dtype": str(DTYPE)}
            if isinstance(seconds, str):
                yield row | {"error": seconds}
                continue
            median = statistics.median(seconds)
            row |= {"seconds": median, "spread": (max(seconds) - min(seconds)) / median, "flops": work.flops}
            row["of_matmul"] = work.flops / median / matmul_speed
            if not isinstance(baseline, str):
                row["speed_up"] = statistics.median(b / s for b, s in zip(baseline, seconds, strict=True))
            yield row


def describe() -> str:
    clock = "CPU seconds of all threads" if PLATFORM == "cpu" else "seconds"
    return f"{jax.devices()[0].device_kind}, {DTYPE}, jax {jax.__version__}; {clock}, medians of interleaved rounds"
