"""The kernels, as the model calls them: the only importer of `pallas_kernels`, and the place that adds the mesh.

Modules above see whole arrays; in here `shard_map` hands each device its part, and what must travel travels.
"""

from l4jax.ops.attention import attention, full_attention, is_balanced, to_balanced, to_natural
from l4jax.ops.cached import attention_to_slots, decode_attention, slot_axes, write_slots
from l4jax.ops.experts import routed_experts
from pallas_kernels import merge_partial_attention

__all__ = [
    "attention",
    "attention_to_slots",
    "decode_attention",
    "full_attention",
    "is_balanced",
    "merge_partial_attention",
    "routed_experts",
    "slot_axes",
    "to_balanced",
    "to_natural",
    "write_slots",
]
