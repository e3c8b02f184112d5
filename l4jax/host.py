"""What we ask of the machine below jax."""

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8  # of glibc's malloc.h


def keep_freed_memory() -> None:
    """Makes this process keep the memory that it frees, for its next allocation. On a CPU only; elsewhere a no-op.

    XLA:CPU allocates results and temporaries anew in every call. By default glibc fetches large blocks from the kernel
    and hands them back when freed, so every call pays for zeroed pages again: 0.3 s a GB, a third of a training step.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, 1)  # other arenas end at 64 MB, and larger blocks go around them
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)
