"""The GPU kernels at the shapes of Scout and Maverick: Triton takes them, as far as can be told without its compiler.

`scripts/check_gpu_compile.sh` compiles them, with the CUDA plugin.
"""

import functools

import jax
import pytest

from pallas_kernels import QuantizedArray, attention, decode_attention, grouped_matmul
from pallas_kernels.dispatch import Target, target
from tests.pallas_kernels.gpu_calls import CALLS, array


def on(device_kind, platform="cuda"):
    """Returns a context in which calls are compiled for one such GPU."""
    device = jax.sharding.AbstractDevice(device_kind, None, platform)
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device))


@pytest.fixture
def h100():
    with on("NVIDIA H100 80GB HBM3"):
        yield


def lower(function, *arguments) -> str:
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("name", CALLS)
def test_lowers_for_a_gpu(h100, name):
    call = CALLS[name]()
    text, works = lower(call.function, *call.arguments), call.works()
    assert text.count("custom_call @__gpu$xla.gpu.triton") == len(works)
    for work in works:
        assert f'name = "{work.kernel}"' in text
        assert work.flops >= work.least_flops > 0
        assert work.loads >= work.least_bytes > 0


def test_auto_takes_the_kernels_on_a_gpu(h100):
    assert target() == Target("gpu", "NVIDIA H100 80GB HBM3")
    q, kv = array(1, 256, 4, 128), array(1, 256, 2, 128)
    rows, weights, sizes = array(64, 128), array(4, 128, 256), array(4, dtype="int32")
    assert "attention_forward" in lower(attention, q, kv, kv)
    assert "decode_attention" in lower(decode_attention, array(1, 1, 4, 128), kv, kv, array(1, dtype="int32"))
    assert "grouped_rows_times_weights" in lower(grouped_matmul, rows, weights, sizes)


def test_lengths_may_be_weakly_typed(h100):
    """As `jnp.full(3, 7)` is: Triton's lowering took the remainder by a Python number for one of a bool."""
    lengths, cache = jax.ShapeDtypeStruct((3,), "int32", weak_type=True), array(3, 64, 4, 128)
    function = functools.partial(decode_attention, chunk_size=64, implementation="pallas")
    assert "decode_attention" in lower(function, array(3, 1, 8, 128), cache, cache, lengths)


def refused(match, function, *arrays, **more_arrays):
    with pytest.raises(ValueError, match=match):
        jax.eval_shape(functools.partial(function, implementation="pallas"), *arrays, **more_arrays)


def test_calls_that_do_not_fit_are_refused(h100):
    wide, half = array(1, 8, 2, 256), array(1, 8, 2, 64, dtype="float16")
    refused("head_dim=256 is larger than 128", attention, wide, wide, wide)
    refused("float32 and bfloat16, not float16", attention, half, half, half)

    cache, lengths = array(2, 96, 4, 128), array(2, dtype="int32")
    refused("100 tokens with 2 queries", decode_attention, array(2, 100, 8, 128), cache, cache, lengths)
    refused("head_dim=256", decode_attention, array(2, 1, 8, 256), *[array(2, 96, 4, 256)] * 2, lengths)
    pages, table = array(9, 8, 4, 128), array(2, 4, dtype="int32")
    refused("8 slots in a page", decode_attention, array(2, 1, 8, 128), pages, pages, lengths, page_table=table)
    refused("an array is empty", decode_attention, array(2, 0, 8, 128), cache, cache, lengths)

    def int8(num_scales, num_experts=2):
        return QuantizedArray(
            array(num_experts, 64, 96, dtype="int8"), array(num_experts, num_scales, 96, dtype="float32")
        )

    sizes = array(2, dtype="int32")
    refused("scales for groups of 8 numbers", grouped_matmul, array(4, 64), int8(8), sizes)
    refused("nothing to multiply", grouped_matmul, array(0, 64), array(2, 64, 96), sizes)
    many = 1 << 19
    refused("offsets would overflow", grouped_matmul, array(4, 64), int8(1, many), array(many, dtype="int32"))


def test_gpus_that_do_not_fit_are_refused():
    q, rows, sizes = array(1, 8, 2, 64), array(4, 64), array(2, dtype="int32")
    fp8 = QuantizedArray(array(2, 64, 96, dtype="float8_e4m3fn"), array(2, 1, 96, dtype="float32"))
    with on("AMD Instinct MI300X", "rocm"):
        refused("made for GPUs of NVIDIA, this is AMD", attention, q, q, q)
    with on("NVIDIA A100-SXM4-80GB"):
        refused("A100-SXM4-80GB is not known to convert float8_e4m3fn", grouped_matmul, rows, fp8, sizes)
