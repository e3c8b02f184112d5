"""The kernels, as the model calls them: the only importer of `pallas_kernels`, and the place that adds the mesh.

Modules above see whole arrays; in here `shard_map` hands each device its part, and what must travel travels.
"""

from l4jax.ops.cached import attention_to_slots, decode_attention, slot_axes, write_slots
from l4jax.ops.experts import routed_experts
from l4jax.ops.head import map_logits
from l4jax.ops.low_precision import LowPrecision
from l4jax.ops.product import product
from l4jax.ops.self_attention import attention, full_attention, is_balanced, to_balanced, to_natural
from pallas_kernels import QuantizedArray, merge_partial_attention, quantize
from pallas_kernels.dispatch import target

__all__ = [
    "LowPrecision",
    "QuantizedArray",
    "attention",
    "attention_to_slots",
    "decode_attention",
    "full_attention",
    "is_balanced",
    "map_logits",
    "merge_partial_attention",
    "platform",
    "product",
    "quantize",
    "routed_experts",
    "slot_axes",
    "to_balanced",
    "to_natural",
    "write_slots",
]


def platform() -> str:
    """Returns what is compiled for: "cpu", "gpu" or "tpu"; that of the mesh that is set, which need not be here."""
    return target().platform
