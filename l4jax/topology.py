"""TPUs that are not here: libtpu compiles for a named topology on any machine, and says what fits and what it costs.

What that proves: Mosaic and XLA:TPU accept the program, tiles and memory fit, which collectives appear. What it does
not prove: numbers, and seconds. Needs the `tpu` extra (libtpu), no TPU.
"""

import functools
import math
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

CHIPS = ("v5e", "v5p", "v6e", "tpu7x")
"""Chips that we compile for."""

# Without these libtpu looks for a TPU and for the metadata server of a cloud, and a second process cannot load it.
_OFFLINE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_LOG_DIR": "disabled",
}


@functools.cache
def topology_devices(name: str, num_slices: int = 1) -> tuple[jax.Device, ...]:
    """Returns the devices of a topology such as "v5p:4x4x4", "v5e:4x4" or "v6e:1x1": to compile for, not to run on.

    A chip of tpu7x is two devices, of the others one.

    Raises:
        ValueError: there is no such topology; the message has libtpu's reason.
        ModuleNotFoundError: libtpu is missing.
    """
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+){1,2})", name)
    if match is None or match[1] not in CHIPS:
        raise ValueError(f"unknown topology {name!r}; write chip:AxB or chip:AxBxC, chips are {', '.join(CHIPS)}")
    for variable, value in _OFFLINE.items():
        os.environ.setdefault(variable, value)
    from jax.experimental import topologies

    sides = [int(side) for side in match[2].split("x")]
    # Hosts hold 2 x 2 chips; of smaller slices every chip counts as a host of its own.
    whole_hosts = sides[0] % 2 == 0 and sides[1] % 2 == 0
    options: dict[str, Any] = {} if whole_hosts else {"chips_per_host_bounds": [1, 1, 1]}
    if num_slices > 1:
        options["num_slices"] = num_slices
    try:
        return tuple(topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices)
    except jax.errors.JaxRuntimeError as error:
        if "libtpu" in str(error) and "not found" in str(error).lower():
            raise ModuleNotFoundError("libtpu is missing; pip install 'l4jax[tpu]'") from error
        raise ValueError(f"topology {name!r}: {' '.join(str(error).split())}") from error


def topology_mesh(name: str, shape: Sequence[int], axes: Sequence[str], num_slices: int = 1) -> Mesh:
    """Returns a mesh of a topology's first devices.

    Raises:
        ValueError: the topology has fewer devices than the shape asks for.
    """
    devices = topology_devices(name, num_slices)
    needed = math.prod(shape)
    if needed > len(devices):
        raise ValueError(f"a mesh of {'x'.join(map(str, shape))} needs {needed} devices, {name} has {len(devices)}")
    return Mesh(np.array(devices[:needed]).reshape(shape), axes, axis_types=(AxisType.Auto,) * len(axes))


def one_chip(chip: str) -> Mesh:
    """Returns a mesh of one device of a chip: for single kernels."""
    sides = "1x1x1" if chip in ("v5p", "tpu7x") else "1x1"
    return topology_mesh(f"{chip}:{sides}", (1,), ("x",))


def compile_ahead(function: Callable, mesh: Mesh, *abstract: Any, **jit_options: Any) -> jax.stages.Compiled:
    """Compiles `function` for the devices of `mesh`.

    Args:
        abstract: arguments, trees of `jax.ShapeDtypeStruct` with shardings of `mesh` (none: replicated).
        jit_options: for `jax.jit`: donate_argnums, static_argnames, out_shardings.
    """
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def place(leaf):
        if isinstance(leaf, jax.ShapeDtypeStruct) and leaf.sharding is None:
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated)
        return leaf

    # The abstract mesh tells kernels which chip they are for; a concrete one would send eager operations to it.
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jax.jit(function, **jit_options).lower(*jax.tree.map(place, abstract)).compile()
