"""What all GPU kernels share: when they can run, and the few operations that Triton wants in a form of its own.

The kernels are Pallas through Triton, for every NVIDIA GPU from Ampere on. Mosaic GPU, the alternative, is for Hopper
and later, and lets one arrange by hand what cuDNN has over these kernels (TMA, warp specialisation). Triton's kernels
can be checked without a GPU: their numbers by `interpret=True` on a CPU, and that they compile for sm_90 by
`scripts/check_gpu_compile.sh`. Times in these files are those of an H200 (jax 0.11.2). From jax 0.11 on Pallas says
that its way through Triton will be removed.

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
        # Not a Python number: a run may reach beyond the axis, where nothing is read, and jax 0.12 refuses that if it
        # can tell.
        return pl.ds(jnp.asarray(self.start, jnp.int32), self.size)


def load(ref, *index: Span | Array | int) -> Array:
    """Returns a part of an array in memory, zeros for what does not exist: an axis for each span."""
    zero = 0.0 if jnp.issubdtype(ref.dtype, jnp.floating) else 0  # an integer cannot become float8
    return plgpu.load(_view(ref, index), mask=(mask := _mask(index)), other=None if mask is None else zero)


def store(ref, value: Array, *index: Span | Array | int) -> None:
    """Writes a part of an array, where it exists."""
    plgpu.store(_view(ref, index), value.astype(ref.dtype), mask=_mask(index))


def _view(ref, index):
    def of(part):
        if isinstance(part, Span):
            return part.at
        return np.int32(part) if isinstance(part, int) else part  # interpreted, an index has a shape

    return ref.at[tuple(map(of, index))]


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


INT4_PER_WORD = 4


def unpack_int4(words: Array, dtype: jnp.dtype, interpret: bool) -> list[Array]:
    """Returns the four int4 of each int16, lowest bits first, in an array of the same shape for each place."""
    if interpret or dtype != jnp.bfloat16:
        return [((words << (12 - 4 * nth)) >> 12).astype(dtype) for nth in range(INT4_PER_WORD)]
    # bfloat16 keeps 8 bits: 128 + n is 0x4300 + n for n below 128. Three instructions make two numbers, of two words
    # that share a register; to convert an integer takes the time of eight. Four bits ^ 8 are a number + 8, so 128 + 8
    # are too many; 0x6A is (a & b) ^ c.
    return [
        _to_bfloat16(
            f"{{ .reg .b32 t, one, bias; mov.b32 one, 0x3F803F80; mov.b32 bias, 0xC308C308; shr.b32 t, $1, {4 * nth}; "
            "lop3.b32 t, t, 0x000F000F, 0x43084308, 0x6A; fma.rn.bf16x2 $0, t, one, bias; }",
            words,
        )
        for nth in range(INT4_PER_WORD)
    ]


def widen(values: Array, dtype: jnp.dtype, interpret: bool) -> Array:
    """Returns numbers of 8 bits in a dtype to multiply in."""
    if interpret or (values.dtype, dtype) != (jnp.int8, jnp.bfloat16):
        return values.astype(dtype)
    # 2 ** 23 + n is 0x4B000000 + n in float32, made by moving a byte. A byte ^ 128 is a number + 128.
    places = "".join(f"prmt.b32 f{n}, u, 0x4B000000, 0x744{n}; sub.rn.f32 f{n}, f{n}, bias; " for n in range(4))
    return _to_bfloat16(
        "{ .reg .b32 u; .reg .f32 f0, f1, f2, f3, bias; mov.b32 bias, 0x4B000080; xor.b32 u, $2, 0x80808080; "
        f"{places}cvt.rn.bf16x2.f32 $0, f1, f0; cvt.rn.bf16x2.f32 $1, f3, f2; }}",
        values,
    )


def _to_bfloat16(asm: str, array: Array) -> Array:
    """Returns what the instructions make of four bytes at a time."""
    count = 4 // array.dtype.itemsize
    [result] = plgpu.elementwise_inline_asm(
        asm,
        args=[array],
        constraints=",".join(["=r"] * (count // 2) + ["r"]),
        pack=count,
        result_shape_dtypes=[jax.ShapeDtypeStruct(array.shape, jnp.bfloat16)],
    )
    return result


def power_of_two(number: int, least: int = 1) -> int:
    """Returns the smallest power of two that is no less than either."""
    return max(least, 1 << (number - 1).bit_length())
