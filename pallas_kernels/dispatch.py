"""One registry: which implementation serves a call, and why the others were passed over.

An op registers its implementations in order of preference. `auto` takes the first one that does not refuse the call
and logs that choice once; a named implementation either serves the call or raises with its reason.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

logger = logging.getLogger(__name__)


class Implementation(NamedTuple):
    """One way to compute an op.

    Attributes:
        run: computes the op.
        refuse: takes the same arguments as `run` and returns why it cannot serve this call (platform, dtype, shape),
            or None when it can.
    """

    run: Callable[..., Any]
    refuse: Callable[..., str | None]


class Target(NamedTuple):
    """What a call is compiled for."""

    platform: str
    """"cpu", "gpu" or "tpu"."""
    device_kind: str
    """For example "TPU v6 lite"."""


def target() -> Target:
    """Returns the devices of the mesh that is set, which need not be here, else the machine's own."""
    device = jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]
    platform = "gpu" if device.platform in ("cuda", "rocm") else device.platform
    return Target(platform, device.device_kind)


def by_platform(tpu: tuple[Callable, Callable], gpu: tuple[Callable, Callable]) -> Implementation:
    """Returns two implementations under one name: `gpu` serves GPUs, `tpu` is asked everywhere else.

    Args:
        tpu, gpu: what computes the op and what says why it cannot, as in `Implementation`.
    """

    def choose() -> Implementation:
        return Implementation(*(gpu if target().platform == "gpu" else tpu))

    return Implementation(
        lambda *args, **kwargs: choose().run(*args, **kwargs), lambda *args, **kwargs: choose().refuse(*args, **kwargs)
    )


_registry: dict[str, dict[str, Implementation]] = {}


def _serves_every_call(*args, **kwargs) -> None:
    return None


def register(op: str, name: str, run: Callable[..., Any], refuse: Callable[..., str | None] = _serves_every_call):
    """Adds an implementation of `op`; the order of registration is the order in which `auto` tries them."""
    _registry.setdefault(op, {})[name] = Implementation(run, refuse)


def implementations(op: str) -> tuple[str, ...]:
    """Returns the names that `implementation=` accepts for `op`, besides "auto", best first."""
    return tuple(_registry[op])


def dispatch(op: str, implementation: str, *args, **kwargs) -> Any:
    """Runs `op` on the arguments with the implementation asked for.

    Raises:
        ValueError: the named implementation does not exist, or cannot serve this call; the message says why.
    """
    candidates = _registry[op]
    if implementation != "auto":
        if implementation not in candidates:
            names = ", ".join(("auto", *candidates))
            raise ValueError(f"{op} has no implementation {implementation!r}; choose one of: {names}")
        chosen = candidates[implementation]
        reason = chosen.refuse(*args, **kwargs)
        if reason is not None:
            raise ValueError(f"{op}: implementation {implementation!r} cannot serve this call: {reason}")
        return chosen.run(*args, **kwargs)

    passed_over = []
    for name, candidate in candidates.items():
        reason = candidate.refuse(*args, **kwargs)
        if reason is None:
            _log_choice(op, name, tuple(passed_over))
            return candidate.run(*args, **kwargs)
        passed_over.append(f"{name}: {reason}")
    raise ValueError(f"{op}: no implementation can serve this call: {'; '.join(passed_over)}")


@functools.cache
def _log_choice(op: str, name: str, passed_over: tuple[str, ...]) -> None:
    """Logs a choice of `auto`; the cache makes that once per choice and set of reasons."""
    reasons = f" (passed over {'; '.join(passed_over)})" if passed_over else " (first choice)"
    logger.info("%s: auto chose %s%s", op, name, reasons)
