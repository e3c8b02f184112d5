"""What we ask of the machine below jax, and of the machines beside it."""

import ctypes
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

DISTRIBUTED = "L4JAX_DISTRIBUTED"
PROCESS = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")

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


def start_distributed() -> None:
    """Joins this process with the others of its run; does nothing for a process alone. Comes before any use of jax.

    The environment decides, because it differs between processes that run the same command:
    `L4JAX_DISTRIBUTED=auto` lets jax find the others, on the workers of a TPU slice, on several slices, under Slurm and
    Open MPI; or `JAX_COORDINATOR_ADDRESS` (host:port of process 0), `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID` name them.

    Raises:
        ValueError: the variables are incomplete, or jax finds nobody.
    """
    given = {name: os.environ[name] for name in PROCESS if os.environ.get(name)}
    automatic = os.environ.get(DISTRIBUTED, "")
    if automatic not in ("", "auto"):
        raise ValueError(f"{DISTRIBUTED}={automatic} must be auto, or be left out")
    if not automatic and not given:
        return
    import jax

    if automatic:
        try:
            jax.distributed.initialize()
        except ValueError as error:
            raise ValueError(
                f"{DISTRIBUTED}=auto, but jax finds no TPU slice, Slurm or Open MPI here ({error}); leave it out for "
                f"one process, or set {', '.join(PROCESS)}"
            ) from error
        return
    if missing := [name for name in PROCESS if name not in given]:
        raise ValueError(f"{', '.join(given)} without {', '.join(missing)}; set all of {', '.join(PROCESS)}, or none")
    address, *numbers = given.values()
    if not all(number.isdigit() for number in numbers):
        raise ValueError(f"{PROCESS[1]}={numbers[0]} and {PROCESS[2]}={numbers[1]} must be whole numbers")
    jax.distributed.initialize(address, *map(int, numbers))


def is_remote(path: Any) -> bool:
    """Whether a path lies in a bucket: `gs://bucket/run`."""
    return "://" in os.fspath(path)


def open_path(text: str) -> Any:
    """Returns a `Path`, or for `gs://...` an object with the same methods. A plain Path would swallow a slash.

    Raises:
        ModuleNotFoundError: nothing here can read buckets.
    """
    if not is_remote(text):
        return Path(text)
    if text.startswith("gs:") and importlib.util.find_spec("gcsfs") is None:
        raise ModuleNotFoundError(f"{text} needs gcsfs, which is missing; pip install 'l4jax[gcs]'")
    from etils import epath

    return epath.Path(text)
