"""Llama 4 in JAX: load the released weights, look at pictures, chat, train.

>>> import l4jax
>>> model = l4jax.load("Llama-4-Scout-17B-16E-Instruct")
>>> print(model.generate("The capital of France is", max_new_tokens=16, temperature=0).text)

Nothing heavy is imported before it is used.
"""

from importlib import import_module
from typing import Any

__all__ = ["Llama4", "Llama4Config", "__version__", "load"]

_HOMES = {"load": "l4jax.inference.loaded", "Llama4": "l4jax.model.llama4", "Llama4Config": "l4jax.config"}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("l4jax")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'l4jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
