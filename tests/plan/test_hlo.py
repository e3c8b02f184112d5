"""The reader of compiled programs against programs whose work is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from l4jax.plan.hlo import Program, replica_groups
from l4jax.sharding import make_mesh


def compile_text(function, *arguments, **options) -> str:
    return jax.jit(function, **options).lower(*arguments).compile().as_text()


def test_loops_count_as_often_as_they_turn():
    def layers(x, weights):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]

    text = compile_text(layers, jnp.zeros((32, 64)), jnp.zeros((7, 64, 64)))
    cost = Program(text).cost()
    assert cost.flops == 7 * 2 * 32 * 64 * 64
    assert cost.unknown_loops == 0
    # At least every weight once; slicing must not count the whole stack in every turn.
    assert 7 * 64 * 64 * 4 <= cost.bytes <= 6 * 7 * 64 * 64 * 4


def test_a_loop_that_depends_on_data_is_said_to():
    def until(x):
        return jax.lax.while_loop(lambda x: x.sum() < 1e6, lambda x: x @ jnp.eye(8) + 1, x)

    assert Program(compile_text(until, jnp.zeros((8, 8)))).cost().unknown_loops == 1


@pytest.mark.parametrize("equation", ["MD,DF->MF", "BTD,DNH->BTNH", "BTNH,NHD->BTD", "MD,MF->DF"])
def test_products_of_every_form(equation):
    sizes = {"B": 2, "T": 16, "M": 32, "D": 24, "N": 4, "H": 8, "F": 40}
    left, right = equation.split("->")[0].split(",")
    arguments = [jnp.zeros([sizes[x] for x in side]) for side in (left, right)]
    text = compile_text(lambda a, b: jnp.einsum(equation, a, b), *arguments)
    assert Program(text).cost().flops == pytest.approx(2 * np.prod([sizes[x] for x in set(left + right)]), rel=1e-6)


def test_collectives_count_what_a_device_receives():
    mesh = make_mesh(expert=8)

    def run(x):
        gathered = jax.lax.all_gather(x, "expert", tiled=True)
        return jax.lax.psum_scatter(gathered, "expert", tiled=True), jax.lax.psum(x, "expert")

    call = jax.shard_map(run, mesh=mesh, in_specs=P("expert"), out_specs=(P("expert"), P()), check_vma=False)
    text = compile_text(call, jax.device_put(jnp.zeros((8 * 128,)), jax.NamedSharding(mesh, P("expert"))))
    found = Program(text).cost().collectives
    assert found["all-gather", 8, 1, False] == 8 * 128 * 4 * 7 / 8
    assert sum(size for (kind, _, _, _), size in found.items() if kind in ("all-reduce", "reduce-scatter")) > 0


def test_groups_are_read_in_every_spelling():
    assert replica_groups("replica_groups={{0,1},{2,3}}, x") == [[0, 1], [2, 3]]
    assert replica_groups("replica_groups=[2,4]<=[8]") == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert replica_groups("replica_groups=[4,2]<=[2,4]T(1,0)") == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert replica_groups("replica_groups=mesh['axis_0'=2,'axis_1'=3] {'axis_0'}") == [[0, 3], [1, 4], [2, 5]]
    assert replica_groups("source_target_pairs={{0,1},{1,1}}") == [[0, 1]]


def test_a_collective_across_slices_is_told_apart():
    text = """
ENTRY %main (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %all-reduce.1 = f32[8]{0} all-reduce(%p), replica_groups={{0,2},{1,3}}, to_apply=%add
}
"""
    near, far = Program(text, {0: 0, 1: 0, 2: 0, 3: 0}).cost(), Program(text, {0: 0, 1: 0, 2: 1, 3: 1}).cost()
    assert near.collectives == {("all-reduce", 2, 1, False): 32.0}
    assert far.collectives == {("all-reduce", 2, 1, True): 32.0}


def test_a_kernel_counts_with_its_own_estimate():
    text = """
ENTRY %main (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %k = f32[8]{0} custom-call(%p), custom_call_target="tpu_custom_call", metadata={op_name="a/grouped/b"}, \
backend_config={"custom_call_config":{"cost_estimate":{"flops":"100","transcendentals":"0","bytes_accessed":"64"}}}
}
"""
    assert (Program(text).cost().flops, Program(text).cost().bytes) == (100, 64)
    half = Program(text).cost(10, 32, lambda name: 0.5 if "grouped" in name else 1.0)
    assert (half.flops, half.bytes, half.seconds) == (50, 64, 5)  # 50 / 10, which is more than 64 / 32
