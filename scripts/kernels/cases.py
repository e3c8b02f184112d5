"""What a case is: kernels of several projects for one call, each with the counts that follow from its listing."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels.dumps import Kernel
from l4jax.topology import one_chip

BYTES_PER_US = {"v5e": 819_000, "v5p": 2_765_000, "v6e": 1_640_000, "tpu7x": 3_690_000}
"""Published bandwidth. A device of tpu7x is one of the two cores of its chip, with half of it."""
CYCLES_PER_US = {"v5e": 1500, "v5p": 1750, "v6e": 1750, "tpu7x": 2200}
"""Clocks, inferred from published peaks."""
NUM_CORES = {"v5e": 1, "v5p": 2, "v6e": 1, "tpu7x": 1}
"""Cores of a device, which share its work."""


class Count(NamedTuple):
    """What one call costs.

    Attributes:
        bundles: of the busier core; a lower bound on cycles.
        bytes_moved: between the chip's memory and fast memory, on all cores.
        bytes_ideal: every operand and result once, as far as it is needed.
        flops: multiplications and additions in the products that the kernel computes, on all cores; what registers and
            matrix units add when they round up is not in them.
        flops_ideal: of the products that reach a result.
    """

    bundles: int
    bytes_moved: int
    bytes_ideal: int
    flops: int
    flops_ideal: int


class Program(NamedTuple):
    """A program that holds kernels of one project.

    Attributes:
        function: what is compiled.
        arguments: abstract, trees of `jax.ShapeDtypeStruct`.
        kernels: begin of the names of those to count; empty for a program with one kernel.
        count: computes the count from these, in their order.
    """

    function: Callable
    arguments: list[Any]
    kernels: tuple[str, ...]
    count: Callable[..., Count]


class Case(NamedTuple):
    """A call: its op, its shape in words, and who computes it: makes a program for a chip."""

    op: str
    shape: str
    programs: dict[str, Callable[[str], Program]]


def array(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))


def device_kind(chip: str) -> str:
    return one_chip(chip).devices.flat[0].device_kind


def select(kernels: list[Kernel], prefixes: tuple[str, ...]) -> list[Kernel]:
    """Returns the kernels whose names begin so; all, and that is one, without prefixes."""
    chosen = [kernel for prefix in prefixes or ("",) for kernel in kernels if kernel.name.startswith(prefix)]
    if len(chosen) != (len(prefixes) or 1):
        raise LookupError(f"expected {prefixes or 'one kernel'}, found {[kernel.name for kernel in kernels]}")
    return chosen


def moved(block_bytes: int, *indices: np.ndarray) -> int:
    """Returns the bytes of a block that is fetched whenever its indices, arrays over the steps, change."""
    changes = np.stack(indices)[:, 1:] != np.stack(indices)[:, :-1]
    return block_bytes * (1 + int(changes.any(0).sum()))
