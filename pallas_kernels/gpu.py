"""What all GPU kernels share: when they can run, and the few operations that Triton wants in a form of its own.

The kernels are Pallas through Triton, for every NVIDIA GPU from Ampere on. Mosaic GPU, the alternative, is for Hopper
and later; what it lets one arrange by hand (TMA, warp specialisation) pays off when it is tuned on such a GPU. Triton's
kernels can be checked without one: their numbers by `interpret=True` on a CPU, and that they compile for sm_90, with
which registers and shared memory, by `scripts/check_gpu_compile.sh`. Nobody has timed them.

Every array in a kernel has a power of two of numbers; memory is read and written by explicit loads and stores; Triton
makes a loop over loads into a pipeline that fills shared memory ahead of the products.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array

from pallas_kernels.dispatch import target

LOWEST = -(2.0**100)
"""Below every score, yet finite: -inf - -inf would be NaN. A power of two, so that `exp2` finds no rounding error in a
difference of this number to itself."""


class Card(NamedTuple):
    """What a GPU has.

    Attributes:
        num_cores: streaming multiprocessors.
        shared_bytes: shared memory that one program may use.
        converts_fp8: whether it has instructions for float8_e4m3fn, without which Triton's compiler ends the process.
    """

    num_cores: int
    shared_bytes: int
    converts_fp8: bool


_CARDS = {
    "NVIDIA H100": Card(132, 227 << 10, True),
    "NVIDIA H200": Card(132, 227 << 10, True),
    "NVIDIA A100": Card(108, 163 << 10, False),
}
_OTHER_CARD = Card(64, 99 << 10, False)


def card() -> Card:
    """Returns what the GPU has that the call is compiled for, or what any of them has."""
    kind = target().device_kind
    return next((card for name, card in _CARDS.items() if kind.startswith(name)), _OTHER_CARD)


def refuse_platform() -> str | None:
    """Returns why Triton cannot compile this call, None if it can: the first question of every GPU kernel."""
    platform, kind = target()
    if platform != "gpu":
        return f"a Triton kernel needs a GPU, this is a {platform}"
    return None if kind.startswith("NVIDIA") else f"the kernels are made for GPUs of NVIDIA, this is {kind}"


def refuse_size(**arrays: Array | jax.ShapeDtypeStruct) -> str | None:
    """Returns which array Triton cannot address, None if it reaches all of them.

    Up to 4 GiB jax's lowering counts numbers in 32 signed bits (`_compute_offsets_from_indices`), which 8-bit arrays
    overflow from 2 GiB on.
    """
    for name, array in arrays.items():
        if array.dtype.itemsize == 1 and 1 << 31 < array.size <= 1 << 32:
            return f"{name} is 2 to 4 GiB of {array.dtype}: offsets would overflow; cut it in two"
    return None


def dot(a: Array, b: Array, contracting: tuple[int, int], interpret: bool) -> Array:
    """Returns the float32 product of two matrices, summed over the given axis of each.

    Tensor cores take float32 as three TF32 products, which keep its precision; a CPU, interpreting, has no such thing.
    """
    precision = None
    if a.dtype == jnp.float32:
        precision = lax.Precision.HIGHEST if interpret else lax.DotAlgorithmPreset.TF32_TF32_F32_X3
    dimensions = (((contracting[0],), (contracting[1],)), ((), ()))
    return lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


class Span(NamedTuple):
    """A run of indices along one axis of an array; `mask` says which of them exist, None that all do."""

    start: Array | int
    size: int
    mask: Array | None

    @classmethod
    def block(cls, index: Array | int, size: int, length: int) -> "Span":
        """Returns one of the blocks that cut an axis of the given length."""
        start = index * size
        return cls(start, size, None if length % size == 0 else start + jnp.arange(size) < length)

    @property
    def at(self) -> pl.Slice:
        return pl.ds(self.start, self.size)


def load(ref, *index: Span | Array | int | np.integer) -> Array:
    """Returns a part of an array in memory, zeros for what does not exist: an axis for each span."""
    return plgpu.load(_view(ref, index), mask=(mask := _mask(index)), other=None if mask is None else 0)


def store(ref, value: Array, *index: Span | Array | int | np.integer) -> None:
    """Writes a part of an array, where it exists."""
    plgpu.store(_view(ref, index), value.astype(ref.dtype), mask=_mask(index))


def _view(ref, index):
    return ref.at[tuple(part.at if isinstance(part, Span) else part for part in index)]


def _mask(index):
    """Returns the mask of the spans together, each along its own axis."""
    spans, mask = [part for part in index if isinstance(part, Span)], None
    for axis, span in enumerate(spans):
        if span.mask is not None:
            own = jnp.expand_dims(span.mask, [other for other in range(len(spans)) if other != axis])
            mask = own if mask is None else mask & own
    return mask


def exp2(x: Array, factor: float, shift: Array, interpret: bool) -> Array:
    """Returns `2 ** (x * factor - shift)` in float32, in two instructions where the compiler would take six.

    XLA neither contracts a product and a difference, nor lets denormal results of the exponential be zero.
    """
    if interpret:
        return jnp.exp2(x * factor - shift)
    bits = np.float32(factor).view(np.uint32)
    [result] = plgpu.elementwise_inline_asm(
        f"{{ .reg .f32 t; fma.rn.f32 t, $1, 0f{bits:08X}, $2; ex2.approx.ftz.f32 $0, t; }}",
        args=[x, jnp.broadcast_to(-shift, x.shape)],
        constraints="=f,f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, jnp.float32)],
    )
    return result


def power_of_two(number: int, least: int = 1) -> int:
    """Returns the smallest power of two that is no less than either."""
    return max(least, 1 << (number - 1).bit_length())
