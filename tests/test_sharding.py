"""Meshes, rules, and where every parameter of the released models lies: a change of it shows in `golden/`."""

from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from l4jax.config import preset
from l4jax.model.params import abstract_model, param_shardings
from l4jax.plan.arithmetic import abstract_mesh
from l4jax.sharding import (
    SERVING,
    TRAINING,
    Rules,
    check_mesh,
    constrain,
    describe,
    make_mesh,
    parse_sizes,
    place,
    spec,
    use_rules,
)

GOLDEN = Path(__file__).parent / "golden"
SIZES = {"data": 1, "fsdp": 2, "expert": 2, "tensor": 2, "context": 1}


def table(name: str) -> str:
    """Returns path, shape and places of every parameter on 64 devices: in training, and in serving."""
    model = abstract_model(preset(name), scan_layers=True)
    columns = []
    for rules, sizes in ((TRAINING, {"fsdp": 4, "expert": 16}), (SERVING, {"tensor": 8, "expert": 8})):
        with use_rules(rules):
            columns.append((sizes, param_shardings(model, abstract_mesh(sizes))))
    lines = [f"# {name}; training on {describe(columns[0][0])} | serving on {describe(columns[1][0])}"]
    shapes = {".".join(map(str, path)): leaf.shape for path, leaf in flat(model)}
    for path, shape in shapes.items():
        places = " | ".join(str(tuple(places[path].spec)) for _, places in columns)
        lines.append(f"{path}  {shape}  {places}")
    return "\n".join(lines) + "\n"


def flat(model):
    from flax import nnx

    return nnx.to_flat_state(nnx.state(model))


@pytest.mark.parametrize("name", ["scout", "maverick"])
def test_every_parameter_lies_where_the_golden_file_says(name):
    """When a change is meant, write the new files with `python -m tests.test_sharding` and look at their diff."""
    assert table(name) == (GOLDEN / f"sharding_{name}.txt").read_text()


@pytest.mark.parametrize(
    ("axes", "shape", "expected"),
    [
        (("embed", "mlp"), (64, 64), P(("fsdp", "expert"), "tensor")),
        (("expert", "expert_embed", "expert_mlp"), (4, 64, 64), P("expert", "fsdp", "tensor")),
        (("batch", "length"), (4, 8), P(("fsdp", "expert"), None)),
        (("batch", "length"), (2, 8), P("fsdp", None)),  # the first axes that divide
        (("batch", "length"), (3, 8), P(None, None)),
        ((None, "heads", None), (3, 4, 5), P(None, "tensor", None)),
    ],
)
def test_dimensions_take_the_axes_that_divide_them(axes, shape, expected):
    assert spec(axes, shape, SIZES) == expected


def test_two_dimensions_on_one_mesh_axis_are_refused_with_both_names():
    with pytest.raises(ValueError, match="logical axes 'mlp' and 'heads' both map to the mesh axis 'tensor'"):
        spec(("mlp", "heads"), (4, 4), SIZES)


def test_rules_name_only_axes_of_the_mesh():
    with pytest.raises(ValueError, match="rule 'mlp' names the mesh axis 'model'"):
        Rules({"mlp": ("model",)})


def test_without_a_mesh_nothing_is_constrained():
    x = jax.numpy.ones((2, 2))
    assert constrain(x, "batch", None) is x


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"model": 2}, "unknown mesh axis 'model'; axes are data, fsdp, expert, tensor, context"),
        ({"fsdp": 0}, "the mesh axis fsdp has size 0"),
        ({"fsdp": 4, "expert": 4}, r"mesh fsdp=4,expert=4 needs 16 devices, this machine has 8 \(cpu\); .*=16"),
    ],
)
def test_meshes_that_cannot_be_made(sizes, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(**sizes)


@pytest.mark.parametrize("text", ["fsdp", "fsdp=x", "model=4", "fsdp=2,fsdp=4", "fsdp=-2"])
def test_sizes_that_are_not_written_so(text):
    with pytest.raises(ValueError, match="is not axis=size; axes are data, fsdp"):
        parse_sizes(text)
    assert parse_sizes("fsdp=4, expert=16,") == {"fsdp": 4, "expert": 16}


@pytest.mark.parametrize(
    ("sizes", "batch", "message"),
    [
        (
            {"expert": 3},
            {},
            "num_local_experts=16 is not divisible by the expert axis of size 3; choose one of 1, 2, 4",
        ),
        ({"tensor": 16}, {}, "num_key_value_heads=8 is not divisible by the tensor axis of size 16"),
        ({"fsdp": 4, "data": 2}, {"rows": 12}, "rows=12 is not divisible by the axes data x fsdp x expert of size 8"),
        ({"context": 8}, {"rows": 1, "length": 8200}, "row_tokens=8200 is not divisible by twice the context axis"),
    ],
)
def test_what_does_not_divide_is_refused_with_what_would(sizes, batch, message):
    with pytest.raises(ValueError, match=message):
        check_mesh(preset("scout"), sizes, **batch)


def test_batches_are_placed_by_their_axes():
    mesh = make_mesh(fsdp=2, context=2)
    ids = np.arange(16).reshape(2, 8)
    placed = place({"ids": ids, "tiles": None}, mesh, {"ids": ("batch", "length"), "tiles": ("batch", None)})
    assert placed["tiles"] is None
    np.testing.assert_array_equal(placed["ids"], ids)
    assert {shard.data.shape for shard in placed["ids"].addressable_shards} == {(1, 4)}


if __name__ == "__main__":
    for name in ("scout", "maverick"):
        (GOLDEN / f"sharding_{name}.txt").write_text(table(name))
