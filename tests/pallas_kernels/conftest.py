import functools

import jax
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import dispatch, gpu
from pallas_kernels.attention import gpu as attention_gpu
from pallas_kernels.attention import tiles as attention_tiles
from pallas_kernels.decode_attention import gpu as decode_gpu
from pallas_kernels.decode_attention import tiles as decode_tiles
from pallas_kernels.grouped_matmul import gpu as grouped_gpu
from pallas_kernels.grouped_matmul import tiles as grouped_tiles


@pytest.fixture
def no_races():
    """Fails when kernels that the test interpreted read or write memory that another access may touch meanwhile."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call  # the verdict is not public

    yield
    try:
        races = interpret_pallas_call.races
        assert races is None or not races.races_found
    finally:
        pltpu.reset_tpu_interpret_mode_state()


@pytest.fixture
def triton(monkeypatch):
    """The name of one more implementation of every op: the GPU kernels, interpreted on a CPU, compiled on a GPU."""
    name, interpret = "triton", dispatch.target().platform != "gpu"
    for module, ops, refuse in (
        (attention_gpu, ("attention", "attention_gradients"), "refuse_arrays"),
        (decode_gpu, ("decode_attention",), "refuse_arguments"),
        (grouped_gpu, ("grouped_matmul", "grouped_swiglu"), "refuse_arguments"),
    ):
        for op in ops:
            run = functools.partial(getattr(module, op), interpret=interpret)
            added = dispatch.Implementation(run, getattr(module, refuse))
            monkeypatch.setitem(dispatch._registry[op], name, added)
    # Interpreted, most of the time is spent in XLA, for one run each. On a GPU the reference would compute in TF32.
    with jax.default_matmul_precision(None if interpret else "highest"):
        jax.config.update("jax_disable_most_optimizations", interpret)
        yield name
        jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def tiles_of_h100(monkeypatch):
    """Gives the interpreted GPU kernels the tiles that they have on an H100. What was traced before is forgotten."""
    jax.clear_caches()
    for module in (gpu, attention_tiles, decode_tiles, grouped_tiles):
        monkeypatch.setattr(module, "target", lambda: dispatch.Target("gpu", "NVIDIA H100 80GB HBM3"))
    yield
    jax.clear_caches()
