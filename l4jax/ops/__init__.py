"""The kernels, as the model calls them: the only importer of `pallas_kernels`, and the place that adds the mesh.

Modules above see whole arrays; in here `shard_map` hands each device its part, and what must travel travels.
"""

from l4jax.ops.experts import routed_experts
from pallas_kernels import attention, decode_attention, merge_partial_attention

__all__ = ["attention", "decode_attention", "merge_partial_attention", "routed_experts"]
