"""What a chip can do, as its maker publishes it; and how large its pods are.

Sources: cloud.google.com/tpu/docs, pages v5e, v5p, v6e and tpu7x. `hbm_bytes` is what XLA's compiler lets a program
use, seen in its own out-of-memory messages.
"""

from dataclasses import dataclass

GIB = 1 << 30


@dataclass(frozen=True)
class Chip:
    """One device as jax counts them; tpu7x has two of them on a chip."""

    name: str
    device_kind: str
    bf16_flops: float
    """Per second."""
    int8_ops: float
    hbm_bytes: int
    """Usable."""
    hbm_bandwidth: float
    """Bytes a second."""
    link_bandwidth: float
    """Bytes a second of one link to a neighbour, in one direction."""
    torus_dims: int
    """Every device has two links along each."""
    pod: tuple[int, ...]
    """Largest slice, in chips."""


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", "TPU v5 lite", 197e12, 394e12, int(15.75 * GIB), 819e9, 50e9, 2, (16, 16)),
        Chip("v5p", "TPU v5", 459e12, 918e12, int(95.74 * GIB), 2765e9, 100e9, 3, (16, 20, 28)),
        Chip("v6e", "TPU v6 lite", 918e12, 1836e12, int(31.25 * GIB), 1640e9, 112e9, 2, (16, 16)),
        Chip("tpu7x", "TPU7x", 1153.5e12, 1153.5e12, int(94.74 * GIB), 3690e9, 100e9, 3, (16, 24, 24)),
    )
}
DCN_BANDWIDTH = 6.25e9
"""Bytes a second of one device's share of the network between slices: 200 Gbit/s for a host of four chips."""

GPU_BF16_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12}
"""Per second, dense, of the SXM form; found in the name of a device (nvidia.com, data sheets)."""


def peak_flops(device_kind: str) -> float | None:
    """Returns the published bfloat16 FLOPs a second of a device as jax names it; None if it is not known."""
    for chip in CHIPS.values():
        if chip.device_kind == device_kind:
            return chip.bf16_flops
    return next((flops for name, flops in GPU_BF16_FLOPS.items() if name in device_kind), None)
