"""Tile sizes; for TPUs chosen by counting static instruction bundles (`scripts/bench_kernels.py count`)."""

from typing import NamedTuple

from pallas_kernels.dispatch import target
from pallas_kernels.gpu import card

LANES = 128
MiB = 2**20


class Tiles(NamedTuple):
    """How a kernel cuts its arrays. A block is what one DMA brings; it is computed in tiles, to skip what is hidden.

    Attributes:
        q_block: queries per block, a multiple of `q_tile`.
        kv_block: keys per block, a multiple of `kv_tile`.
        q_tile: queries per tile of scores; a multiple of 16 forward and of 128 backward, where they lie along lanes.
        kv_tile: keys per tile of scores, a multiple of 128.
        kv_heads: kv heads per block, with all their query heads; divides K.
    """

    q_block: int
    kv_block: int
    q_tile: int
    kv_tile: int
    kv_heads: int


# Queries per tile, against 512 keys, where 256 is not the best choice. Bundles for 1024 scores on v5e, v5p, v6e, tpu7x
# (H = 128, groups of 5, bfloat16): forward 4.05 3.99 3.03 3.04 with 256 queries and 4.00 4.04 2.50 2.54 with 512;
# backward 9.48 9.49 4.25 4.02 with 256 and 8.89 8.89 4.45 3.97 with 512. A larger tile makes a longer program.
_FORWARD_Q_TILE = {"TPU v6 lite": 512, "TPU7x": 512}
_BACKWARD_Q_TILE = {"TPU v5 lite": 512, "TPU v5": 512}

# Up to this length one tile holds everything: an image of the vision tower has 577 patches.
_SHORT = 640

# Fast memory for the gradients of keys and values, which stay there until every query has passed: a quarter of it.
_GRADIENTS = {"TPU v5 lite": 32 * MiB, "TPU v6 lite": 32 * MiB}
_GRADIENTS_ELSEWHERE = 16 * MiB
# For the blocks, twice each, and for what the compiler spills.
_BLOCKS = 32 * MiB


def forward_tiles(num_queries: int, num_keys: int, num_heads: int, num_kv_heads: int, device_kind: str) -> Tiles:
    q_tile = _FORWARD_Q_TILE.get(device_kind, 256)
    return _tiles(num_queries, num_keys, num_heads, num_kv_heads, q_tile, q_multiple=16)


def backward_tiles(num_queries: int, num_keys: int, num_heads: int, num_kv_heads: int, device_kind: str) -> Tiles:
    q_tile = _BACKWARD_Q_TILE.get(device_kind, 256)
    return _tiles(num_queries, num_keys, num_heads, num_kv_heads, q_tile, q_multiple=LANES)


def _tiles(num_queries, num_keys, num_heads, num_kv_heads, q_tile, q_multiple) -> Tiles:
    group = num_heads // num_kv_heads
    # Eight heads are enough work for a visit. Two cores (TPU v5) share the blocks of heads, so there are two at least.
    fitting = [k for k in range(1, num_kv_heads // 2 + 1) if num_kv_heads % k == 0 and k * group <= 8]
    kv_heads = max(fitting, default=1)
    if num_queries <= _SHORT:
        q_tile = q_block = _round_up(num_queries, q_multiple)
    else:
        q_tile = q_tile if group <= 8 else LANES  # the program has every head of a group
        q_block = _round_up(min(1024, 8192 // (kv_heads * group)), q_tile)
    if num_keys <= _SHORT:
        kv_tile = kv_block = _round_up(num_keys, LANES)
    else:
        kv_tile, kv_block = 512, 1024
    return Tiles(q_block, kv_block, q_tile, kv_tile, kv_heads)


def _round_up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


def keys_per_pass(tiles: Tiles, head_dim: int, device_kind: str) -> int:
    """Returns how many keys one call of the backward kernel takes, so that their gradients fit."""
    bytes_per_block = 2 * tiles.kv_heads * tiles.kv_block * head_dim * 4
    return max(1, _GRADIENTS.get(device_kind, _GRADIENTS_ELSEWHERE) // bytes_per_block) * tiles.kv_block


def forward_vmem_limit() -> int:
    """Returns how many bytes of fast memory the forward kernel may take; every chip has 64 MiB."""
    return _BLOCKS


def backward_vmem_limit(device_kind: str) -> int:
    """Returns how many bytes of fast memory the backward kernel may take: 64 of 128 MiB, or 48 of 64."""
    return _BLOCKS + _GRADIENTS.get(device_kind, _GRADIENTS_ELSEWHERE)


class GpuTiles(NamedTuple):
    """Tiles of scores of a Triton kernel, its warps of 32 threads, and how many tiles of loads its pipeline holds."""

    q_block: int
    kv_block: int
    num_warps: int
    num_stages: int


class GpuKernels(NamedTuple):
    """The tiles of each kernel; see `gpu.py`."""

    forward: GpuTiles
    query_gradients: GpuTiles
    key_gradients: GpuTiles


# The fastest on an H200 among a dozen, with and without packed documents; several programs share a core.
_HOPPER = GpuKernels(GpuTiles(64, 64, 4, 3), GpuTiles(64, 64, 4, 3), GpuTiles(64, 64, 4, 2))
# At most 67 KB, without spills.
_ANY_GPU = GpuKernels(GpuTiles(64, 32, 4, 2), GpuTiles(64, 32, 4, 2), GpuTiles(32, 64, 4, 2))
# float32 takes twice the memory, and registers for the parts of a number: at most 99 KB.
_ANY_GPU_FLOAT32 = GpuKernels(*[GpuTiles(32, 32, 4, 2)] * 3)
# Interpreted on a CPU: tests have several of each.
_INTERPRETED = GpuKernels(GpuTiles(32, 16, 4, 1), GpuTiles(32, 16, 4, 1), GpuTiles(16, 32, 4, 1))


def gpu_tiles(itemsize: int) -> GpuKernels:
    """Returns the tiles for arrays of `itemsize` bytes a number."""
    if target().platform == "cpu":
        return _INTERPRETED
    if itemsize == 4:
        return _ANY_GPU_FLOAT32
    return _HOPPER if card().shared_bytes >= 200 << 10 else _ANY_GPU
