"""What all TPU kernels share: when they can run, and how they are interpreted on a CPU."""

from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.dispatch import target

INTERPRET = pltpu.InterpretParams(detect_races=True)
"""The interpreter of implementation "interpret": it models DMAs, semaphores and memory that nobody has written (NaN),
and reports accesses that race. Slow, about 15 ms a grid step; for tests and for finding mistakes."""


def refuse_platform() -> str | None:
    """Returns why Mosaic cannot compile this call, None if it can: the first question of every TPU kernel."""
    platform = target().platform
    return None if platform == "tpu" else f"a Mosaic kernel needs a TPU, this is a {platform}"
